"""Interrupts and odd settings while a model answers: `python -m pytest tests/test_faults_generation.py`.

What tests/test_generation.py covers already (settings out of range, threads, training mode, stop) is not repeated.
"""

import signal

import pytest

from alpaca_helpers import AlpacaError
from alpaca_helpers.chat.conversation import Conversation, Ending
from alpaca_helpers.evaluation import answer_losses
from alpaca_helpers.generation import generate, stream

PROMPT = "Instruction: Hi\nRéponse:"


@pytest.fixture(autouse=True)
def interrupts():
    """Python's own handling of SIGINT, also where the tests run in the background and the shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_at(monkeypatch, model, step):
    """Have a real SIGINT come in the middle of the `step`-th forward, as Ctrl-C and Jupyter's stop button send it."""
    place, passes = model.base_model.model.transformer.h[1].mlp, []
    forward = place.forward

    def interrupted(*arguments):
        passes.append(1)
        if len(passes) == step:
            signal.raise_signal(signal.SIGINT)
        return forward(*arguments)

    monkeypatch.setattr(place, "forward", interrupted)


@pytest.mark.integration
@pytest.mark.parametrize("sides", [["base", "tuned"], ["base"], ["tuned"]])
@pytest.mark.parametrize("step", [1, 4])
def test_an_interrupt_in_mid_answer_leaves_the_model_as_it_was(sides, step, tiny_model, pocket_tokenizer, monkeypatch):
    def answers():
        return [generate(tiny_model, pocket_tokenizer, [PROMPT] * n, side=s) for n in (1, 3) for s in ("base", "tuned")]

    before = answers()
    assert before[0] != before[1]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_at(patched, tiny_model, step)
        for _ in stream(tiny_model, pocket_tokenizer, [PROMPT] * len(sides), sides=sides):
            pass
    assert answers() == before
    assert not tiny_model.training


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_an_interrupt_in_mid_evaluation_leaves_the_model_as_it_was(side, tiny_model, pocket_tokenizer, monkeypatch):
    rows = [{"instruction": "Hi", "input": "", "output": "there"}] * 2
    losses = {side: answer_losses(tiny_model, pocket_tokenizer, rows, side).tolist() for side in ("base", "tuned")}
    assert losses["base"] != losses["tuned"]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_at(patched, tiny_model, 1)
        answer_losses(tiny_model, pocket_tokenizer, rows, side)
    for other, before in losses.items():
        assert answer_losses(tiny_model, pocket_tokenizer, rows, other).tolist() == before


def test_a_conversation_goes_on_after_an_interrupt(tiny_model, pocket_tokenizer, monkeypatch):
    talk = Conversation(tiny_model, pocket_tokenizer, max_new_tokens=6, temperature=0)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_at(patched, tiny_model, 3)
        for _ in talk.answer(talk.add("Hi")):
            pass
    assert [(reply.tokens, reply.ending) for reply in talk.exchanges[0].replies] == [(2, Ending.INTERRUPTED)] * 2
    for _ in talk.answer(talk.add("Hi")):
        pass
    whole = [generate(tiny_model, pocket_tokenizer, [PROMPT], side=s, max_new_tokens=6)[0] for s in ("base", "tuned")]
    assert [reply.text for reply in talk.exchanges[1].replies] == [answer.text for answer in whole]


def test_running_out_of_memory_in_mid_answer_leaves_the_model_as_it_was(tiny_model, pocket_tokenizer, monkeypatch):
    before = generate(tiny_model, pocket_tokenizer, [PROMPT], max_new_tokens=4)

    def fail(*arguments):
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(tiny_model.base_model.model.transformer.h[1].mlp, "forward", fail)
        generate(tiny_model, pocket_tokenizer, [PROMPT] * 2, side="base")
    assert generate(tiny_model, pocket_tokenizer, [PROMPT], max_new_tokens=4) == before


@pytest.mark.parametrize("name", ["max_new_tokens", "top_k", "seed"])
@pytest.mark.parametrize("value", [2.5, float("nan"), float("inf"), 2**70, "3", None])
def test_what_is_no_whole_number_is_one_sentence(name, value, tiny_model, pocket_tokenizer):
    with pytest.raises(AlpacaError, match=f"{name} is .*: choose"):
        generate(tiny_model, pocket_tokenizer, [PROMPT], **{"temperature": 1.0, name: value})


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": -1}, {"temperature": -0.1}, {"top_p": -1.0}, {"top_p": float("nan")}]
)
def test_negative_and_nan_settings_are_one_sentence(settings, tiny_model, pocket_tokenizer):
    with pytest.raises(AlpacaError, match="is .*: choose"):
        generate(tiny_model, pocket_tokenizer, [PROMPT], **settings)


def test_extreme_settings_within_their_range_give_answers(tiny_model, pocket_tokenizer):
    for settings in (
        {"temperature": 0.01},
        {"temperature": 1e30},
        {"temperature": 1.0, "top_p": 1e-9},
        {"seed": 2**62},
    ):
        (answer,) = generate(tiny_model, pocket_tokenizer, [PROMPT], max_new_tokens=3, **settings)
        assert answer.tokens or answer.stopped
