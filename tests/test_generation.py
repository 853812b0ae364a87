"""Answers: which tokens are drawn, where they end, and what is left after an interrupt or under odd settings.

Greedy answers are held against transformers' in tests/test_architectures.py.
"""

import signal
import threading

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from alpaca_helpers import AlpacaError, generation
from alpaca_helpers.evaluation import answer_losses
from alpaca_helpers.generation import generate, stream
from alpaca_helpers.prompts import encode, format_prompt

PROMPTS = [format_prompt(text) for text in ("Hi", "What is the capital of France?", "Add 1 and 2 please, if you can")]
SIDES = ("base", "tuned")


@pytest.fixture
def ask(tiny_model, pocket_tokenizer):
    """`generate` on the tiny model."""
    return lambda prompts=PROMPTS, **settings: generate(tiny_model, pocket_tokenizer, prompts, **settings)


def test_base_and_tuned_in_one_batch_are_each_alone(tiny_model, pocket_tokenizer, ask):
    *_, (base, tuned) = stream(tiny_model, pocket_tokenizer, PROMPTS[:1] * 2, sides=SIDES, max_new_tokens=12)
    assert [base] == ask(PROMPTS[:1], side="base", max_new_tokens=12)
    assert [tuned] == ask(PROMPTS[:1], side="tuned", max_new_tokens=12)
    assert base.text != tuned.text


def test_a_merged_adapter_has_no_base_side(tiny_model, ask):
    tuned = ask(max_new_tokens=4)
    tiny_model.merge_adapter()
    assert ask(max_new_tokens=4) == tuned
    with pytest.raises(AlpacaError, match="merged into the base"):
        ask(side="base")


def test_a_seed_gives_the_same_sample_in_any_batch(ask):
    settings = {"temperature": 0.9, "top_p": 0.95, "top_k": 100, "seed": 3, "max_new_tokens": 10}
    together = ask(**settings)
    assert together == [ask([prompt], **settings)[0] for prompt in PROMPTS]
    assert ask(**settings | {"seed": 4}) != together


@pytest.mark.parametrize(
    "size, top_k, top_p",
    [(50, 0, 1.0), (50, 5, 1.0), (50, 0, 0.6), (50, 20, 0.8), (50, 1, 0.01), (50, 99, 0.9), (2000, 0, 0.95)],
)
def test_samples_are_drawn_by_transformers_probabilities(size, top_k, top_p):
    """Each of 2000 equal parts is drawn once: a token's share is its probability, but for a part at either end."""
    draws, settings = (torch.arange(2000)[:, None] + 0.5) / 2000, {"temperature": 0.7, "top_k": top_k, "top_p": top_p}
    logits = 2 * torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    warpers = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(top_k or size), TopPLogitsWarper(top_p)]
    for row, wanted in zip(logits, LogitsProcessorList(warpers)(None, logits).softmax(-1)):
        drawn = torch.tensor(generation._next_tokens(row.expand(2000, -1), draws, settings))
        shares = drawn.bincount(minlength=size) / 2000
        assert not shares[wanted == 0].any()
        torch.testing.assert_close(shares, wanted, atol=1 / 2000 + 1e-6, rtol=0)


def test_float64_is_made_on_the_cpu_alone(monkeypatch):
    """Apple's MPS has none: the probabilities come from the device to the CPU first."""
    done = []
    for name in ("cpu", "double"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda value, name=name, real=real: done.append(name) or real(value))
    generation._next_tokens(torch.randn(2, 50), torch.rand(1, 1), {"temperature": 0.7, "top_k": 5, "top_p": 0.9})
    assert done == ["cpu", "double"]


def test_a_small_model_decodes_on_one_thread_and_leaves_the_setting(tiny_model, ask, monkeypatch):
    before, seen = torch.get_num_threads(), []
    tiny_model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        ask(PROMPTS[:1], max_new_tokens=3)
        monkeypatch.setattr(generation, "_SMALL", 0)
        ask(PROMPTS[:1], max_new_tokens=1)
        assert seen == [1, 1, 1, 2] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_model_that_computes_no_numbers_is_one_sentence(tiny_model, ask):
    tiny_model.register_forward_hook(lambda _, __, output: setattr(output, "logits", output.logits * torch.nan))
    for temperature in (0, 0.7):
        with pytest.raises(AlpacaError, match="output is not a number"):
            ask(temperature=temperature)


def test_prompt_and_answer_fit_the_positions(pocket_tokenizer, ask):
    for length in (117, 118, 119, 300):
        prompt = " a" * length  # a token each
        assert len(encode([prompt], pocket_tokenizer)[0]) == length
        assert ask([prompt], max_new_tokens=10)[0].prompt_cut == max(0, length - 118)
    assert ask([]) == [] and len(ask([""], max_new_tokens=2)) == 1


def test_stop_ends_a_stream_where_it_is(tiny_model, pocket_tokenizer):
    stop, seen = threading.Event(), []
    for (answer,) in stream(tiny_model, pocket_tokenizer, PROMPTS[:1], sides=["tuned"], stop=stop, max_new_tokens=40):
        seen.append(answer.tokens)
        if answer.tokens == 3:
            stop.set()
    assert seen[:3] == [1, 2, 3] and seen[-1] <= 4
    tiny_model.register_forward_hook(lambda *_: pytest.fail("a forward after the stop"))
    ((answer,),) = stream(tiny_model, pocket_tokenizer, PROMPTS[:1], sides=["tuned"], stop=stop)
    assert answer.tokens == 0


def test_two_threads_answer_as_one_after_the_other_and_training_mode_stays(tiny_model, ask):
    expected, got = {side: ask(side=side, max_new_tokens=20) for side in SIDES}, {}
    tiny_model.train()  # answers are without dropout all the same

    def often(side):
        got[side] = [ask(side=side, max_new_tokens=20) for _ in range(3)]

    threads = [threading.Thread(target=often, args=(side,)) for side in SIDES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {side: [answers] * 3 for side, answers in expected.items()}
    assert tiny_model.training and torch.is_grad_enabled()


NO_NUMBER = [2.5, float("nan"), float("inf"), 2**70, "3", None]
OUT_OF_RANGE = {
    "max_new_tokens": [-1, 0, 128, *NO_NUMBER],
    "top_k": [-1, *NO_NUMBER],
    "seed": [-1, *NO_NUMBER],
    "temperature": [-1.0, -0.1, float("nan"), float("inf"), "1", None, True, [1]],
    "top_p": [-0.1, -1.0, 1.5, float("nan"), "1", None],
}


def test_a_setting_out_of_range_is_one_sentence_and_one_at_its_end_gives_an_answer(ask):
    for setting, values in OUT_OF_RANGE.items():
        for value in values:
            with pytest.raises(AlpacaError, match=f"^{setting} is .*: choose"):
                ask(**{"temperature": 1.0, setting: value})
    for wrong, named in (({"side": "tune"}, "'tune'"), ({"temprature": 1.0}, "'temprature'")):
        with pytest.raises(AlpacaError, match=named):
            ask(**wrong)
    for wrong in ("Why?", ""):
        with pytest.raises(AlpacaError, match="one text: pass a list"):
            ask(wrong)
    for extreme in ({"temperature": 1e-6}, {"temperature": 1e30}, {"seed": 2**62}):  # within their range
        (answer,) = ask(PROMPTS[:1], max_new_tokens=3, **extreme)
        assert answer.tokens or answer.stopped
    for almost in ({"temperature": 1e-30}, {"temperature": 1e-6}, {"temperature": 1.0, "top_p": 0.0}):  # greedy
        assert ask(max_new_tokens=8, **almost) == ask(max_new_tokens=8), almost


@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_or_out_of_memory_leaves_the_model_as_it_was(fault, tiny_model, pocket_tokenizer, ask, interrupts):
    rows = [{"instruction": "Hi", "input": "", "output": "there"}] * 2

    def losses(side):
        return answer_losses(tiny_model, pocket_tokenizer, rows, side).tolist()

    def answers():
        return [(ask(PROMPTS[:1] * 2, side=side, max_new_tokens=8), losses(side)) for side in SIDES]

    before = answers()
    assert before[0][0] != before[1][0] and before[0][1] != before[1][1]
    for sides, step in (["base", "tuned"], 1), (["base"], 4), (["tuned"], 4), (["base"], 0), (["tuned"], 0):
        left = [1] * (step or 1)

        def fail(*_, left=left):
            left.pop()
            if not left and fault is KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)  # as Ctrl-C and Jupyter's stop button send it
            elif not left:
                raise fault

        with tiny_model.base_model.model.transformer.h[1].mlp.register_forward_pre_hook(fail), pytest.raises(fault):
            if step:
                list(stream(tiny_model, pocket_tokenizer, PROMPTS[:1] * len(sides), sides=sides))
            else:  # in mid-evaluation
                losses(*sides)
        assert answers() == before and not tiny_model.training
