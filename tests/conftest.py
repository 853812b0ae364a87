"""What the tests share: tiny models made on the spot, and real rows and the real vocabulary where they are at hand."""

import os
import signal
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests are the CPU's on every machine; nbval's run takes what is there

import pytest
from support import REAL
from support.models import with_lora
from support.runs import tiny_gpt2
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from alpaca_helpers import pocket
from alpaca_helpers.models import load_tokenizer


def pytest_collection_modifyitems(items) -> None:
    """Mark as `unit` what has no other tier."""
    for item in items:
        if not any(item.get_closest_marker(tier) for tier in ("integration", "nightly")):
            item.add_marker("unit")


@pytest.fixture(scope="session")
def alpaca_like(tmp_path_factory, pocket_tokenizer) -> Path:
    """The folder with real data, or one of the same form made of the pocket's rows and vocabulary."""
    if REAL.is_dir():
        return REAL
    folder = tmp_path_factory.mktemp("alpaca-like")
    (folder / "gpt2-tokenizer").mkdir()
    pocket_tokenizer.backend_tokenizer.model.save(str(folder / "gpt2-tokenizer"))  # vocab.json, merges.txt
    lines = pocket.TRAIN.read_text(encoding="utf-8").splitlines()
    (folder / "alpaca_en_demo.json").write_text(f"[{','.join(lines)}]", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def gpt2_tokenizer() -> GPT2Tokenizer:
    """GPT-2's own, of real data that are not part of the project."""
    if not REAL.is_dir():
        pytest.skip(f"real rows and vocabulary are not at {REAL}: set ALPACA_TEST_DATA to their folder")
    vocabulary = REAL / "gpt2-tokenizer"
    tokenizer = GPT2Tokenizer(vocab=str(vocabulary / "vocab.json"), merges=str(vocabulary / "merges.txt"))
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="session")
def pocket_tokenizer():
    return load_tokenizer(str(pocket.MODEL))


@pytest.fixture
def tiny_base(pocket_tokenizer) -> GPT2LMHeadModel:
    """A random GPT-2 of 2 layers x 32 with 128 positions, over the pocket's vocabulary."""
    end = {"bos_token_id": pocket_tokenizer.eos_token_id, "eos_token_id": pocket_tokenizer.eos_token_id}
    return tiny_gpt2(vocab_size=len(pocket_tokenizer), initializer_range=0.02, **end).eval()


@pytest.fixture
def tiny_model(tiny_base):
    """The tiny base under an adapter that changes its answers."""
    return with_lora(tiny_base)


@pytest.fixture
def interrupts():
    """Python's own handling of SIGINT, also where the tests run in the background and the shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
