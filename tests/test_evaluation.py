import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import get_peft_model

from alpaca_helpers import AlpacaError, evaluation
from alpaca_helpers.data import encode
from alpaca_helpers.evaluation import (
    METRICS,
    answer_losses,
    chrf,
    comparison,
    conclusion,
    contains,
    echoes,
    evaluate,
    exact_match,
    repetition,
    rouge_l,
    verdict,
    words,
)
from alpaca_helpers.generation import Answer, generate
from alpaca_helpers.lora import lora_config
from alpaca_helpers.prompts import format_prompt

ROWS = [
    {"instruction": "What is the capital of France?", "input": "", "output": "Paris is the capital.", "fact": "Paris"},
    {"instruction": "Add them.", "input": "1 and 2", "output": "3", "fact": ""},
    {"instruction": "Say hello.", "input": "", "output": "Hello there, my friend.", "fact": "hello"},
]


@pytest.mark.parametrize(
    ("answer", "fact", "right"),
    [
        ("It is Paris.", "Paris", True),
        ("it is PARIS", "paris", True),
        ("Parisian", "Paris", False),
        ("the new  York\ntimes", "New York", True),
        ("York New", "New York", False),
        ("", "Paris", False),
        ("Paris", "Paris", True),
        ("Bogota\u0301", "Bogotá", True),  # composed and decomposed
        ("Bogota", "Bogotá", False),
        ("中国的首都是北京。", "北京", True),
        ("中国的首都是东京。", "北京", False),
        ("ประเทศไทยมีกรุงเทพเป็นเมืองหลวง", "กรุงเทพ", True),
        ("राजधानी दिल्ली है", "दिल्ली", True),
        ("राजधानी दिल्ली है", "दिल", False),  # a vowel sign does not end a word
        ("Столица — Москва", "москва", True),
        ("use C++ here", "C++", True),
        ("use C here", "C++", False),
        ("it is 3.5 m", "3.5", True),
        ("it is 3.5 m", "5", False),
        ("3, 5", "3.5", False),
        ("it is 1,000,000.", "1,000,000", True),
        ("at 5km/h", "5km", True),
        ("a cat", "…", False),
    ],
)
def test_contains_the_fact_as_whole_words(answer, fact, right):
    assert contains(answer, fact) is right


@pytest.mark.parametrize(
    ("answer", "output", "same"),
    [
        ("Paris", "Paris.", True),
        (" paris\n", "Paris!", True),
        ("Paris, France", "Paris France", False),
        ("", "Paris", False),
        ("", "?", False),
        ("!", "?", False),
        ("caf\u0065\u0301 au  lait", "Café au lait", True),
        ("cafe", "café", False),
        ("北京。", "北京", True),
        ("Straße", "STRASSE", True),
    ],
)
def test_exact_match_ignores_case_spacing_and_the_final_mark(answer, output, same):
    assert exact_match(answer, output) is same


@pytest.mark.parametrize(
    ("answer", "output", "score"),
    [
        ("a b c d", "a c d e", 3 / 4),  # longest common: a c d; both sides have four words
        ("the cat", "the black cat sat", 2 * 1 * 0.5 / 1.5),
        ("one", "one", 1),
        ("one", "two", 0),
        ("", "two", 0),
        ("", "", 0),
        ("CAFÉ!", "cafe\u0301", 1),
        ("я пью чай", "я пью кофе", 2 / 3),
        ("北京", "东京", 1 / 2),
    ],
)
def test_rouge_l(answer, output, score):
    assert rouge_l(answer, output) == pytest.approx(score)


def test_chrf():
    assert chrf("abc", "abc") == pytest.approx(1)
    assert chrf("", "abc") == chrf("xyz", "abc") == 0
    # ab against ac: unigrams 1 of 2 both ways, bigrams 0 of 1; orders without n-grams on both sides do not count
    assert chrf("ab", "ac") == pytest.approx((1 + 4) * 0.25 * 0.25 / (4 * 0.25 + 0.25))
    assert chrf("a", "a") == pytest.approx(1)
    assert chrf("cafe\u0301", "café") == pytest.approx(1)
    assert chrf("北京", "北京") == pytest.approx(1)


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("", 0),
        ("one", 0),
        ("a b c", 0),
        ("a b c d e", 0),
        ("a a a a a a", 2 / 3),  # three times the same 4-gram: two are repeated
        ("a b c d, a b c d", 1 / 5),  # abcd bcda cdab dabc abcd
        ("Да да да да ДА", 1 / 2),
        ("好好好好好好", 2 / 3),
    ],
)
def test_repetition(answer, share):
    assert repetition(answer) == pytest.approx(share)


@pytest.mark.parametrize(
    ("answer", "instruction", "echo"),
    [
        ("What is the capital of France? What is", "What is the capital of France?", True),
        ("what is the capital of france", "What is the capital of France?", True),
        ("The capital: What is the capital of France?", "What is the capital of France?", False),
        ("", "Why?", False),
        ("Why", "Why?", True),
        ("anything", "?!", False),
        ("Où est-ce ? Ici", "Ou\u0300 est-ce ?", True),
        ("北京在哪里？北京", "北京在哪里？", True),
    ],
)
def test_echo(answer, instruction, echo):
    assert echoes(answer, instruction) is echo


def test_words_in_several_scripts():
    assert words("The 3.5 kg café—Été!") == ["the", "3.5", "kg", "café", "été"]
    assert words("北京 is Beijing") == ["北", "京", "is", "beijing"]


def hand_loss(model, tokenizer, row, side):
    """The answer's loss from one row alone, without padding: what the batch has to agree with."""
    prompt = encode([format_prompt(row["instruction"], row["input"])], tokenizer)[0]
    answer = encode([" " + row["output"]], tokenizer)[0]
    with torch.no_grad(), model.disable_adapter() if side == "base" else nullcontext():
        odds = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    loss = -sum(odds[place, token].item() for place, token in zip(places, answer))
    right = sum(odds[place].argmax().item() == token for place, token in zip(places, answer))
    return [loss, right, len(answer)]


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_answer_losses_are_those_of_each_row_alone(tiny_model, pocket_tokenizer, side):
    got = answer_losses(tiny_model, pocket_tokenizer, ROWS, side, batch_size=2)
    np.testing.assert_allclose(got, [hand_loss(tiny_model, pocket_tokenizer, row, side) for row in ROWS], rtol=1e-4)


def test_answer_losses_of_empty_and_endless_rows(tiny_model, pocket_tokenizer):
    empty = {**ROWS[0], "output": ""}
    long_prompt = {**ROWS[0], "instruction": "a " * 300}
    long_answer = {**ROWS[0], "output": "a " * 300}
    losses = answer_losses(tiny_model, pocket_tokenizer, [long_prompt, long_answer])
    assert np.isfinite(losses).all() and losses[0, 2] == hand_tokens(pocket_tokenizer, ROWS[0]) and losses[1, 2] == 127
    # " " alone is what follows the prompt when the answer is empty
    assert answer_losses(tiny_model, pocket_tokenizer, [empty])[0, 2] == hand_tokens(pocket_tokenizer, empty)


def hand_tokens(tokenizer, row):
    return len(encode([" " + row["output"]], tokenizer)[0])


def test_evaluate_against_numbers_counted_by_hand(tiny_model, pocket_tokenizer, monkeypatch):
    given = {
        "tuned": [Answer("Paris.", 3, True, 0), Answer("3", 1, True, 0), Answer("", 0, True, 0)],
        "base": [
            Answer("x y z w x y z w", 8, False, 0),
            Answer("Add them. 3", 8, False, 0),
            Answer("hello", 8, False, 0),
        ],
    }
    asked = []

    def answer(model, tokenizer, prompts, side, **settings):
        asked.append((side, list(prompts), settings["max_new_tokens"]))
        return given[side]

    monkeypatch.setattr(evaluation, "generate", answer)
    metrics, answers = evaluate(tiny_model, pocket_tokenizer, ROWS, max_new_tokens=8)
    templated = [format_prompt(row["instruction"], row["input"]) for row in ROWS]
    bare = ["What is the capital of France?", "Add them. 1 and 2", "Say hello."]
    assert asked == [("base", templated, 8), ("tuned", templated, 8), ("base", bare, 8)]
    tuned, base = metrics["tuned"], metrics["base"]
    assert metrics["n"] == 3
    assert (tuned["contains"], base["contains"]) == (0.5, 0.5)  # of the two rows with a fact
    assert (tuned["exact_match"], base["exact_match"]) == (0, 0)
    assert (tuned["stop_rate"], base["stop_rate"]) == (1, 0)
    assert (tuned["mean_answer_tokens"], base["mean_answer_tokens"]) == (pytest.approx(4 / 3), 8)
    assert base["echo_rate"] == pytest.approx(1 / 3, abs=1e-6)
    assert base["repetition"] == pytest.approx(1 / 5 / 3, abs=1e-6)
    losses = np.array([hand_loss(tiny_model, pocket_tokenizer, row, "tuned") for row in ROWS])
    weighted = losses[:, 0].sum() / losses[:, 2].sum()  # by token, not by row
    assert tuned["answer_loss"] == pytest.approx(weighted, rel=1e-5)
    assert abs(weighted - (losses[:, 0] / losses[:, 2]).mean()) > 4e-5 * weighted
    assert tuned["perplexity"] == pytest.approx(math.exp(weighted), rel=1e-3)
    assert tuned["token_accuracy"] == pytest.approx(losses[:, 1].sum() / losses[:, 2].sum(), abs=1e-6)
    assert metrics["base_bare"]["contains"] == 0.5 and metrics["base_bare"]["answer_loss"] is None
    assert metrics["change"]["stop_rate"] == 1 and metrics["change"]["intervals"]["stop_rate"] == [1, 1]
    assert list(answers["tuned"]) == ["Paris.", "3", ""] and list(answers["tuned_right"]) == [True, None, False]
    json.dumps(metrics, allow_nan=False)
    assert set(METRICS) | {"intervals"} == set(tuned) == set(tuned["intervals"]) | {"intervals"}


def test_metrics_without_a_fact_to_check_are_none(tiny_model, pocket_tokenizer):
    rows = [{**row, "fact": ""} for row in ROWS]
    metrics, answers = evaluate(tiny_model, pocket_tokenizer, rows, max_new_tokens=4)
    assert metrics["tuned"]["contains"] is metrics["tuned"]["exact_match"] is None
    assert metrics["change"]["intervals"]["contains"] is None
    assert "holds the fact" not in conclusion(metrics) and "answer holds the fact" not in comparison(metrics).index
    assert answers["tuned_right"].isna().all()


def test_no_rows(tiny_model, pocket_tokenizer):
    with pytest.raises(AlpacaError, match="notebook 02"):
        evaluate(tiny_model, pocket_tokenizer, [])


def test_intervals_are_the_bootstraps_and_seeded():
    fraction = np.array([[1, 1], [0, 1], [1, 1], [0, 1], [0, 0]] * 20, dtype=float)  # 40 of 80 rows that count
    one, two, other = (
        evaluation._estimate({"contains": fraction}, evaluation._resampling(100, seed))["contains"]
        for seed in (0, 0, 1)
    )
    assert one[0] == 0.5 and (one == two).all() and (one != other).any()
    low, high = evaluation._side({"contains": one})["intervals"]["contains"]
    half = 1.96 * math.sqrt(0.25 / 80)  # the normal approximation of a share's interval
    assert low == pytest.approx(0.5 - half, abs=0.02) and high == pytest.approx(0.5 + half, abs=0.02)


def test_intervals_do_not_depend_on_rows_that_do_not_count():
    fraction = np.array([[1, 1]] + [[0, 0]] * 9, dtype=float)  # a resample may hold no row that counts
    side = evaluation._side(evaluation._estimate({"contains": fraction}, evaluation._resampling(10, 0)))
    assert side["contains"] == 1 and side["intervals"]["contains"] == [1, 1]


def test_a_fresh_adapter_is_found_to_change_nothing(tiny_base, pocket_tokenizer):
    """What notebook 04 concludes after zero training steps."""
    model = get_peft_model(tiny_base, lora_config()).eval()
    metrics, _ = evaluate(model, pocket_tokenizer, ROWS * 10, max_new_tokens=6)
    assert {name for name in METRICS if metrics["change"][name] not in (0, None)} == set()
    text = conclusion(metrics)
    assert "On 30 held-out rows tuning made no clear difference: of 7 measures 0 got clearly better, 0" in text
    assert "Better" not in text and "Worse" not in text


def made_metrics(n=100, **change):
    """Metrics in which only `change` (name: base, tuned, interval of the change) differs."""
    same = {name: 0.5 for name in METRICS} | {"intervals": {name: [0.4, 0.6] for name in METRICS}}
    base, tuned, moved = ({**same, "intervals": {**same["intervals"]}} for _ in range(3))
    moved.update({name: 0.0 for name in METRICS}, intervals={name: [-0.1, 0.1] for name in METRICS})
    for name, (before, after, interval) in change.items():
        base[name], tuned[name], moved[name] = before, after, after - before
        moved["intervals"][name] = interval
    return {"n": n, "max_new_tokens": 80, "base": base, "tuned": tuned, "base_bare": same, "change": moved}


def test_conclusion_says_which_way_the_numbers_point():
    better = conclusion(made_metrics(contains=(0.1, 0.9, [0.7, 0.85]), answer_loss=(5.0, 0.4, [-4.9, -4.2])))
    assert "tuning helped: of 7 measures 2 got clearly better, 0 clearly worse" in better
    assert "answer holds the fact 10% → 90% (95% interval of the change +70 to +85 points)" in better
    assert "answer loss 5.00 → 0.40 (95% interval of the change -4.90 to -4.20)" in better
    worse = conclusion(made_metrics(contains=(0.9, 0.1, [-0.85, -0.7]), repetition=(0.1, 0.6, [0.4, 0.6])))
    assert "tuning made the model worse: of 7 measures 0 got clearly better, 2 clearly worse" in worse
    mixed = conclusion(made_metrics(contains=(0.9, 0.1, [-0.85, -0.7]), stop_rate=(0, 1, [0.9, 1])))
    assert "helped in some ways and hurt in others" in mixed and "Better: stops" in mixed and "Worse: answer" in mixed


def test_conclusion_notices_answers_that_never_end():
    text = conclusion(made_metrics(stop_rate=(0.0, 0.1, [0.0, 0.2]), mean_answer_tokens=(80, 76, [-6, -1])))
    assert "stops by itself in 10% of its answers: most are cut at 80 tokens (76.0 on average)" in text


def test_few_rows_give_no_verdict():
    metrics = made_metrics(n=5, contains=(0.0, 1.0, [1.0, 1.0]))
    assert verdict(metrics, "contains") == 0 and "5 held-out rows are too few to tell" in conclusion(metrics)
    assert verdict({**metrics, "n": 20}, "contains") == 1


def test_comparison_shows_values_intervals_and_verdicts():
    table = comparison(made_metrics(contains=(0.1, 0.9, [0.7, 0.85])))
    assert list(table.columns) == ["base", "tuned", "change", ""]
    line = table.loc["answer holds the fact"]
    assert line["tuned"] == "90% (40% to 60%)" and line["change"] == "+80 (+70 to +85)" and line[""] == "better"
    assert "answer loss, nats per token" in table.index and "answer length, tokens" in table.index


def test_batched_answers_are_the_pipelines_token_for_token(tiny_model, pocket_tokenizer):
    """The document asks one question at a time through a pipeline, one model a side."""
    from transformers import pipeline

    prompts = [format_prompt(row["instruction"], row["input"]) for row in ROWS]
    base = tiny_model.get_base_model()
    for side in ("base", "tuned"):
        got = generate(tiny_model, pocket_tokenizer, prompts, side=side, max_new_tokens=12)
        with tiny_model.disable_adapter() if side == "base" else nullcontext():
            answering = pipeline("text-generation", model=base, tokenizer=pocket_tokenizer)
            for prompt, answer in zip(prompts, got):
                (made,) = answering(prompt, max_new_tokens=12, do_sample=False, return_tensors=True)
                ids = made["generated_token_ids"][len(encode([prompt], pocket_tokenizer)[0]) :]
                text = [token for token in ids if token != pocket_tokenizer.eos_token_id]
                assert (answer.tokens, answer.text) == (len(text), pocket_tokenizer.decode(text).strip())
