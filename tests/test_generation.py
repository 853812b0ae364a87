import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from alpaca_helpers import AlpacaError, generation
from alpaca_helpers.generation import generate, stream
from alpaca_helpers.prompts import encode, format_prompt

PROMPTS = [format_prompt(text) for text in ("Hi", "What is the capital of France?", "Add 1 and 2 please, if you can")]


def reference(model, tokenizer, prompt, side, limit):
    """The ids that transformers' own greedy generation adds to one prompt."""
    ids = torch.tensor(encode([prompt], tokenizer))
    adapter = model.disable_adapter() if side == "base" else nullcontext()
    with adapter:
        new = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return new[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_equals_transformers_generate(tiny_model, pocket_tokenizer, side, batch_size):
    answers = generate(tiny_model, pocket_tokenizer, PROMPTS, side=side, batch_size=batch_size, max_new_tokens=12)
    for prompt, answer in zip(PROMPTS, answers):
        ids = reference(tiny_model, pocket_tokenizer, prompt, side, 12)
        assert answer.text == pocket_tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_base_and_tuned_in_one_batch_are_each_alone(tiny_model, pocket_tokenizer):
    *_, (base, tuned) = stream(
        tiny_model, pocket_tokenizer, PROMPTS[:1] * 2, sides=["base", "tuned"], max_new_tokens=12
    )
    assert [base] == generate(tiny_model, pocket_tokenizer, PROMPTS[:1], side="base", max_new_tokens=12)
    assert [tuned] == generate(tiny_model, pocket_tokenizer, PROMPTS[:1], side="tuned", max_new_tokens=12)
    assert base.text != tuned.text


def test_end_of_text_ends_an_answer_and_leaves_the_others(tiny_model, pocket_tokenizer):
    ids = [reference(tiny_model, pocket_tokenizer, prompt, "tuned", 12) for prompt in PROMPTS]
    place, eos = next((i, token) for i, token in enumerate(ids[0]) if token not in ids[0][:i] + ids[1] + ids[2])
    tokenizer = copy.deepcopy(pocket_tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    answers = generate(tiny_model, tokenizer, PROMPTS, max_new_tokens=12)
    assert [(answer.tokens, answer.stopped) for answer in answers] == [(place, True), (12, False), (12, False)]


def test_a_seed_gives_the_same_sample_in_any_batch(tiny_model, pocket_tokenizer):
    settings = {"temperature": 0.9, "top_p": 0.95, "top_k": 100, "seed": 3, "max_new_tokens": 10}
    together = generate(tiny_model, pocket_tokenizer, PROMPTS, **settings)
    alone = [generate(tiny_model, pocket_tokenizer, [prompt], **settings)[0] for prompt in PROMPTS]
    assert together == alone
    assert generate(tiny_model, pocket_tokenizer, PROMPTS, **{**settings, "seed": 4}) != together


@pytest.mark.integration
@pytest.mark.parametrize(
    "size, top_k, top_p",
    [(50, 0, 1.0), (50, 5, 1.0), (50, 0, 0.6), (50, 20, 0.8), (50, 1, 0.01), (50, 99, 0.9), (2000, 0, 0.95)],
)
def test_samples_are_drawn_as_transformers_odds_have_it(size, top_k, top_p):
    logits = 2 * torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    warpers = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(top_k or size), TopPLogitsWarper(top_p)]
    odds = LogitsProcessorList(warpers)(None, logits).softmax(-1)
    generators = [torch.Generator().manual_seed(0) for _ in range(3)]
    drawn = torch.tensor([generation._next_tokens(logits, generators, 0.7, top_k, top_p) for _ in range(4000)])
    shares = torch.stack([(drawn == token).float().mean(0) for token in range(size)], dim=-1)
    assert not (shares[odds == 0]).any()
    torch.testing.assert_close(shares, odds, atol=0.03, rtol=0)  # four standard errors


def test_a_small_model_decodes_on_one_thread_and_leaves_the_setting(tiny_model, pocket_tokenizer, monkeypatch):
    before, seen = torch.get_num_threads(), []
    tiny_model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        generate(tiny_model, pocket_tokenizer, PROMPTS[:1], max_new_tokens=3)
        monkeypatch.setattr(generation, "_SMALL", 0)
        generate(tiny_model, pocket_tokenizer, PROMPTS[:1], max_new_tokens=1)
        assert seen == [1, 1, 1, 2] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_model_that_computes_no_numbers_is_one_sentence(tiny_model, pocket_tokenizer, temperature):
    tiny_model.register_forward_hook(lambda _, __, output: setattr(output, "logits", output.logits * torch.nan))
    with pytest.raises(AlpacaError, match="output is not a number"):
        generate(tiny_model, pocket_tokenizer, PROMPTS, temperature=temperature)


@pytest.mark.parametrize("length", [117, 118, 119, 300])
def test_prompt_and_answer_fit_the_positions(tiny_model, pocket_tokenizer, length):
    prompt = " a" * length  # a token each
    assert len(encode([prompt], pocket_tokenizer)[0]) == length
    (answer,) = generate(tiny_model, pocket_tokenizer, [prompt], max_new_tokens=10)
    assert answer.prompt_cut == max(0, length - 118)


def test_stop_ends_a_stream_where_it_is(tiny_model, pocket_tokenizer):
    stop, seen = threading.Event(), []
    for (answer,) in stream(tiny_model, pocket_tokenizer, PROMPTS[:1], sides=["tuned"], stop=stop, max_new_tokens=40):
        seen.append(answer.tokens)
        if answer.tokens == 3:
            stop.set()
    assert seen[:3] == [1, 2, 3] and seen[-1] <= 4


@pytest.mark.integration
def test_two_threads_answer_as_one_after_the_other(tiny_model, pocket_tokenizer):
    expected = {side: generate(tiny_model, pocket_tokenizer, PROMPTS, side=side) for side in ("base", "tuned")}
    got = {}

    def ask(side):
        got[side] = [generate(tiny_model, pocket_tokenizer, PROMPTS, side=side) for _ in range(3)]

    threads = [threading.Thread(target=ask, args=(side,)) for side in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {side: [answers] * 3 for side, answers in expected.items()}


def test_training_mode_and_gradients_are_left_as_they_were(tiny_model, pocket_tokenizer):
    expected = generate(tiny_model, pocket_tokenizer, PROMPTS)
    tiny_model.train()
    assert generate(tiny_model, pocket_tokenizer, PROMPTS) == expected  # no dropout
    assert tiny_model.training and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "setting, value",
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 128),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
    ],
)
def test_a_setting_out_of_range_is_one_sentence(tiny_model, pocket_tokenizer, setting, value):
    with pytest.raises(AlpacaError, match=f"{setting} is .*: choose") as raised:
        generate(tiny_model, pocket_tokenizer, PROMPTS, **{setting: value})
    assert raised.value.code == "bad-setting"


def test_no_prompts_no_answers(tiny_model, pocket_tokenizer):
    assert generate(tiny_model, pocket_tokenizer, []) == []
    assert len(generate(tiny_model, pocket_tokenizer, [""], max_new_tokens=2)) == 1
