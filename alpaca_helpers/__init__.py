"""Helpers of the notebook series: prompt, data, LoRA, training, generation and evaluation for GPT-2."""
