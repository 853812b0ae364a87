"""The computed memory of a training step against what a process really takes, and the true shape on a T4."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from alpaca_helpers.lora import lora_config
from alpaca_helpers.memory import step_memory
from alpaca_helpers.profiles import choose_profile

MEASURE = """
import torch
from pathlib import Path
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel
from alpaca_helpers.lora import lora_config
from alpaca_helpers.memory import step_memory

ROWS, TOKENS = 16, 128
model = get_peft_model(GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=256, n_head=4, vocab_size=20_000)), lora_config())
model.train()

def step(rows):
    ids = torch.zeros(rows, TOKENS, dtype=torch.long)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

step(1)  # what torch takes once and for all
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
step(ROWS)
print(resident("VmHWM") - before, step_memory(model, ROWS, TOKENS)["activations"])
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured through Linux's /proc")
def test_the_computed_peak_is_what_a_process_takes():
    # glibc keeps freed blocks for later (here 13%, and never the same): so each tensor has its own mapping
    tidy = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=PROJECT, env=tidy, capture_output=True, text=True)
    measured, computed = map(int, done.stdout.split())
    assert 0.9 * measured < computed < 1.1 * measured, (measured, computed)


def test_gpt2_medium_fits_a_t4_with_room():
    with torch.device("meta"):
        model = get_peft_model(GPT2LMHeadModel(GPT2Config(n_layer=24, n_embd=1024, n_head=16)), lora_config())
    parts = step_memory(model, rows=8, tokens=128, fp16=True)
    assert parts["weights"] == 4 * 354_823_168 and parts["adapter, gradients, AdamW"] == 16 * 786_432
    assert sum(parts.values()) < 0.5 * 15e9
    settings = choose_profile("gpt2-medium")
    parts = step_memory(model, settings.micro_batch_size, settings.max_length, fp16=True)
    assert sum(parts.values()) < 2 / 3 * 15e9


def test_twice_the_rows_take_twice_the_activations(tiny_model):
    one, two = (step_memory(tiny_model, rows, tokens=64) for rows in (8, 16))
    assert two["activations"] == pytest.approx(2 * one["activations"], rel=0.05)
    assert (
        two["weights"] == one["weights"] == sum(p.nbytes for n, p in tiny_model.named_parameters() if "lora" not in n)
    )


def test_counting_leaves_the_random_state_and_the_model_alone(tiny_model):
    before, state = [p.clone() for p in tiny_model.parameters()], torch.get_rng_state()
    step_memory(tiny_model, rows=2, tokens=16)
    assert torch.equal(torch.get_rng_state(), state) and not tiny_model.training
    assert all(torch.equal(was, now) for was, now in zip(before, tiny_model.parameters()))
