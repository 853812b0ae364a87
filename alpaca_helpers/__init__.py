"""Helpers of the notebook series: prompt, data, LoRA, training, generation and evaluation for GPT-2."""

__version__ = "0.1.0"


class AlpacaError(Exception):
    """Something a user can put right: one sentence with what is wrong, where, and what to do."""
