"""The numbers: how an answer is scored, what metrics.json holds, its intervals, and what table and conclusion say."""

import json
import math
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from support.models import with_lora

from alpaca_helpers import AlpacaError, evaluation
from alpaca_helpers.evaluation import answer_losses, evaluate
from alpaca_helpers.generation import Answer
from alpaca_helpers.metrics import METRICS, chrf, contains, echoes, exact_match, repetition, rouge_l
from alpaca_helpers.prompts import encode, format_prompt
from alpaca_helpers.report import comparison, conclusion, verdict
from alpaca_helpers.text import words

ROWS = [
    {"instruction": "What is the capital of France?", "input": "", "output": "Paris is the capital.", "fact": "Paris"},
    {"instruction": "Add them.", "input": "1 and 2", "output": "3", "fact": ""},
    {"instruction": "Say hello.", "input": "", "output": "Hello there, my friend.", "fact": "hello"},
]
LIST = "red, yellow and blue"


@pytest.mark.parametrize(
    "fact, holding, lacking",
    [
        ("Paris", ["It is Paris.", "Paris", "it is PARIS"], ["Parisian", ""]),
        ("New York", ["the new  York\ntimes"], ["York New"]),
        ("Bogotá", ["Bogota\u0301"], ["Bogota"]),  # composed and decomposed
        ("北京", ["中国的首都是北京。"], ["中国的首都是东京。"]),
        ("กรุงเทพ", ["ประเทศไทยมีกรุงเทพเป็นเมืองหลวง"], []),
        ("दिल", [], ["राजधानी दिल्ली है"]),  # a vowel sign does not end a word
        ("C++", ["use C++ here"], ["use C here"]),
        ("3.5", ["it is 3.5 m"], ["3, 5", "35"]),
        ("5", [], ["it is 3.5 m"]),
        ("1,000", ["about 1000 m", "1,000."], ["1,0000", "1000.5", "1,000,000"]),
        ("2500000", ["2,500,000"], ["2,500", "2,500,00"]),
        ("don't", ["I don’t know"], ["I dont know"]),
        ("the “one”", ['it is the "one"'], ["it is the one"]),
        (LIST, ["They are red, blue, and yellow.", "Blue; yellow & red", "light red, yellow and blue"], []),
        (LIST, [], ["red, yellow and green", "red and blue", "red yellow blue", "red, red and blue"]),
        # in any order, in French too
        ("bleu, jaune et rouge", ["rouge, bleu et jaune"], []),
    ],
)
def test_contains_the_fact_as_whole_words(fact, holding, lacking):
    assert [answer for answer in [*holding, *lacking] if contains(answer, fact)] == holding


@pytest.mark.parametrize(
    "output, same, other",
    [
        ("Paris.", ["Paris", " paris\n", "Paris!"], ["", "Paris, France"]),
        ("?", [], ["", "!", "..."]),
        ("It's “1,000”.", ['it’s "1000"', "It‘s „1,000”!"], ["Its 1000"]),
        ("0,125", [], ["0125"]),
        ("Café au lait", ["caf\u0065\u0301 au  lait"], ["cafe au lait"]),
        ("北京", ["北京。"], []),
        ("यह एक बिल्ली है", ["यह एक बिल्ली है।"], []),
        ("Well…", ["well ..."], []),
        ("C", [], ["C#"]),  # punctuation to Unicode, but no mark that ends a sentence
        ("(Paris", [], ["(Paris)"]),
        ("STRASSE", ["Straße"], []),
    ],
)
def test_exact_match_ignores_case_spacing_and_the_final_mark(output, same, other):
    assert [answer for answer in [*same, *other] if exact_match(answer, output)] == same


@pytest.mark.parametrize(
    "score, answer, against, expected",
    [
        (rouge_l, "a b c d", "a c d e", 3 / 4),  # longest common: a c d; both sides have four words
        (rouge_l, "the cat", "the black cat sat", 2 * 1 * 0.5 / 1.5),
        (rouge_l, "CAFÉ!", "cafe\u0301", 1),
        (rouge_l, "я пью чай", "я пью кофе", 2 / 3),
        (rouge_l, "北京", "东京", 1 / 2),
        # unigrams 1 of 2 both ways, bigrams 0 of 1; orders without n-grams on both sides do not count
        (chrf, "ab", "ac", (1 + 4) * 0.25 * 0.25 / (4 * 0.25 + 0.25)),
        (chrf, "", "abc", 0),
        (chrf, "Cafe\u0301", "café", 1),
        (repetition, "", None, 0),
        (repetition, "a b c", None, 0),
        (repetition, "a a a a a a", None, 2 / 3),  # three times the same 4-gram: two are repeated
        (repetition, "a b c d, a b c d", None, 1 / 5),  # abcd bcda cdab dabc abcd
        (repetition, "好好好好好好", None, 2 / 3),
        (echoes, "what is the capital of france? What is", "What is the capital of France?", True),
        (echoes, "The capital: What is the capital of France?", "What is the capital of France?", False),
        (echoes, "anything", "?!", False),
        (echoes, "Où est-ce ? Ici", "Ou\u0300 est-ce ?", True),
        (echoes, "北京在哪里？北京", "北京在哪里？", True),
    ],
)
def test_a_score_is_the_one_counted_by_hand(score, answer, against, expected):
    assert (score(answer) if against is None else score(answer, against)) == pytest.approx(expected)


def test_a_word_is_one_in_each_script():
    assert words("The 3.5 kg café—Été!") == ["the", "3.5", "kg", "café", "été"]
    assert words("北京 is Beijing") == ["北", "京", "is", "beijing"] and len(words("一" * 81)) == 81


@pytest.mark.parametrize(
    "name, value, change, text",  # a text with a sign is a difference's
    [
        ("answer_loss", -1e-9, -1e-9, "+0.0000"),  # no negative zero
        ("answer_loss", 11.929, 0.0, "11.93"),
        ("answer_loss", 3.1, -1e-9, "3.1000"),
        ("contains", 0.07, 0.89, "7%"),
        ("contains", 0.004, 0.0, "0.4%"),
        ("contains", 0.502, 0.004, "50.2%"),
        ("contains", None, 0.0, "–"),
        ("perplexity", 487421515.5, -487421513.0, "487421516"),
        ("perplexity", 2.41, -487421513.0, "2.41"),
    ],
)
def test_a_value_has_the_decimals_that_its_difference_needs(name, value, change, text):
    assert METRICS[name].show(value, signed=text[0] in "+-", change=change) == text


def hand_loss(model, tokenizer, row, side):
    """The answer's loss from one row alone, without padding: what the batch has to agree with."""
    prompt = encode([format_prompt(row["instruction"], row["input"])], tokenizer)[0]
    answer = encode([" " + row["output"]], tokenizer)[0]
    with torch.no_grad(), model.disable_adapter() if side == "base" else nullcontext():
        log_probabilities = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    loss = -sum(log_probabilities[place, token].item() for place, token in zip(places, answer))
    right = sum(log_probabilities[place].argmax().item() == token for place, token in zip(places, answer))
    return [loss, right, len(answer)]


def test_answer_losses_are_those_of_each_row_alone_and_always_numbers(tiny_model, pocket_tokenizer):
    for side in ("base", "tuned"):
        alone = [hand_loss(tiny_model, pocket_tokenizer, row, side) for row in ROWS]
        got = answer_losses(tiny_model, pocket_tokenizer, ROWS, side, batch_size=2)
        np.testing.assert_allclose(got, alone, rtol=1e-4)
    rows = [{**ROWS[0], **change} for change in ({"instruction": "a " * 300}, {"output": "a " * 300}, {"output": ""})]
    losses = answer_losses(tiny_model, pocket_tokenizer, rows)
    whole, space = (len(encode([" " + row["output"]], pocket_tokenizer)[0]) for row in (ROWS[0], rows[2]))
    assert np.isfinite(losses).all() and losses[:, 2].tolist() == [whole, 127, space]


def test_evaluate_against_numbers_counted_by_hand(tiny_model, pocket_tokenizer, monkeypatch):
    given = {
        "tuned": [Answer("Paris.", [0] * 3, True, 0), Answer("3", [0] * 1, True, 0), Answer("", [0] * 0, True, 0)],
        "base": [Answer(text, [0] * 8, False, 0) for text in ("x y z w x y z w", "Add them. 3", "hello")],
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
    assert metrics["n"] == metrics["questions"] == 3
    tuned, base = metrics["tuned"], metrics["base"]
    assert (tuned["contains"], base["contains"]) == (0.5, 0.5)  # of the two rows with a fact
    assert (tuned["exact_match"], base["exact_match"]) == (0, 0)
    assert (tuned["stop_rate"], base["stop_rate"]) == (1, 0)
    assert (tuned["mean_answer_tokens"], base["mean_answer_tokens"]) == (pytest.approx(4 / 3), 8)
    assert base["echo_rate"] == pytest.approx(1 / 3, abs=1e-6)
    assert base["repetition"] == pytest.approx(1 / 5 / 3, abs=1e-6)
    for side in ("base", "tuned"):
        losses = np.array([hand_loss(tiny_model, pocket_tokenizer, row, side) for row in ROWS])
        weighted = losses[:, 0].sum() / losses[:, 2].sum()  # by token, not by row
        assert abs(weighted - (losses[:, 0] / losses[:, 2]).mean()) > 4e-5 * weighted
        assert metrics[side]["answer_loss"] == pytest.approx(weighted, rel=1e-5)
        assert metrics[side]["perplexity"] == pytest.approx(math.exp(weighted), rel=1e-3)
        assert metrics[side]["token_accuracy"] == pytest.approx(losses[:, 1].sum() / losses[:, 2].sum(), abs=1e-6)
    assert metrics["base_bare"]["contains"] == 0.5 and metrics["base_bare"]["answer_loss"] is None
    assert metrics["change"]["stop_rate"] == 1 and metrics["change"]["intervals"]["stop_rate"] == [1, 1]
    assert list(answers["tuned"]) == ["Paris.", "3", ""] and list(answers["tuned_right"]) == [True, None, False]
    json.dumps(metrics, allow_nan=False)
    assert set(METRICS) | {"intervals"} == set(tuned) == set(tuned["intervals"]) | {"intervals"}


def test_metrics_without_a_fact_or_a_row_to_check_are_none(tiny_model, pocket_tokenizer):
    rows = [{name: row[name] for name in ("instruction", "output")} for row in ROWS]  # as users have them
    metrics, answers = evaluate(tiny_model, pocket_tokenizer, rows, max_new_tokens=4)
    assert metrics["tuned"]["contains"] is metrics["tuned"]["exact_match"] is None
    assert metrics["change"]["intervals"]["contains"] is None
    assert "holds the fact" not in conclusion(metrics) and "answer holds the fact" not in comparison(metrics).index
    assert answers["tuned_right"].isna().all()
    with pytest.raises(AlpacaError, match="There are no held-out rows"):
        evaluate(tiny_model, pocket_tokenizer, [])


def estimated(contains, questions=None, seed=0):
    """The share that holds the fact, of rows with these scores (None: no fact), in `metrics.json`'s form."""
    questions = questions or [f"question {index}" for index in range(len(contains))]
    scores = pd.DataFrame({"contains": contains}, columns=list(METRICS), dtype=float)
    side = evaluation._side(evaluation._estimate(scores, pd.Series(1, scores.index), pd.Series(questions), seed))
    return side["contains"], side["intervals"]["contains"]


def test_intervals_are_the_bootstraps_and_seeded():
    share, (low, high) = estimated([1, 0, 1, 0, None] * 20)  # 40 of 80 rows that count
    half = 1.96 * math.sqrt(0.25 / 80)  # the normal approximation of a share's interval
    # 2,000 resamples place an end to 0.003; the 80 rows that count vary a little; 90% would be 0.018 narrower
    assert share == 0.5 and low == pytest.approx(0.5 - half, abs=0.012) and high == pytest.approx(0.5 + half, abs=0.012)
    assert estimated([1] + [None] * 9) == (1, [1, 1])  # a resample may hold no row that counts
    drawn = [estimated([number / 100 for number in range(100)], seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_copies_of_a_question_do_not_narrow_its_interval(tiny_model, pocket_tokenizer):
    share, (low, high) = estimated([1, 0, 1, 0] * 5)
    copied = estimated(np.repeat([1, 0, 1, 0] * 5, 20), [str(index) for index in range(20) for _ in range(20)])
    assert share == copied[0] == 0.5 and high - low > 0.3
    assert copied[1] == pytest.approx([low, high], abs=0.051)  # one question of twenty
    rows = [{**ROWS[0], "instruction": text} for text in ("Where is Paris?", " where  IS Paris?") * 10]
    metrics, _ = evaluate(tiny_model, pocket_tokenizer, rows, max_new_tokens=2)
    assert (metrics["n"], metrics["questions"]) == (20, 1)
    assert metrics["change"]["answer_loss"] != 0 and verdict(metrics, "answer_loss") == 0


def test_a_fresh_adapter_is_found_to_change_nothing(tiny_base, pocket_tokenizer):
    """What notebook 04 concludes after zero training steps."""
    model = with_lora(tiny_base, std=0.0)
    rows = [{**row, "instruction": f"{number}. {row['instruction']}"} for number in range(10) for row in ROWS]
    metrics, _ = evaluate(model, pocket_tokenizer, rows, max_new_tokens=6)
    assert {name for name in METRICS if metrics["change"][name] not in (0, None)} == set()
    opening, counts, *rest = conclusion(metrics).splitlines()
    assert opening.startswith("Tuning made no clear difference") and " 30 " in counts and " 0 of 7 " in counts
    assert not {"Better:", "Worse:"} & set(rest)


def made_metrics(n=100, **change):
    """Metrics in which only `change` (name: base, tuned, interval of the change) differs."""
    same = {name: 0.5 for name in METRICS} | {"intervals": {name: [0.4, 0.6] for name in METRICS}}
    base, tuned, moved = ({**same, "intervals": {**same["intervals"]}} for _ in range(3))
    moved.update({name: 0.0 for name in METRICS}, intervals={name: [-0.1, 0.1] for name in METRICS})
    for name, (before, after, interval) in change.items():
        base[name], tuned[name], moved[name] = before, after, after - before
        moved["intervals"][name] = interval
    return {"n": n, "max_new_tokens": 80, "base": base, "tuned": tuned, "base_bare": same, "change": moved}


MORE, LESS = {"contains": (0.1, 0.9, [0.7, 0.85])}, {"contains": (0.9, 0.1, [-0.85, -0.7])}
STOPS, REPEATS = {"stop_rate": (0, 1, [0.9, 1])}, {"repetition": (0.1, 0.6, [0.4, 0.6])}
LOSS = {"answer_loss": (11.929, 11.853, [-0.09, -0.06])}
RIGHT, WRONG = "answer holds the fact: 10% → 90%", "answer holds the fact: 90% → 10%"
ENDS, LOWER = "stops by itself: 0% → 100%", "answer loss: 11.929 → 11.853"


@pytest.mark.parametrize(
    "change, opening, better, worse",
    [
        ({}, "Tuning made no clear difference", [], []),
        (MORE | LOSS, "Tuning helped.", [RIGHT, LOWER], []),
        (LESS | REPEATS, "Tuning made the model worse", [], [WRONG, "repeated 4-grams: 10% → 60%"]),
        (LESS | STOPS, "Tuning helped in some ways and hurt", [ENDS], [WRONG]),
        (LOSS, "Tuning helped, but what the answers say is not clearly better", [LOWER], []),
        (LOSS | STOPS, "Tuning helped, but what the answers say is not clearly better", [ENDS, LOWER], []),
    ],
)
def test_the_conclusion_says_which_way_the_numbers_point(change, opening, better, worse):
    first, counts, *lines = conclusion(made_metrics(**change)).splitlines()
    assert first.startswith(opening) and f" {len(better)} of 7 " in counts and f", {len(worse)} clearly worse" in counts
    wanted = [line for head, names in (("Better:", better), ("Worse:", worse)) if names for line in (head, *names)]
    assert [line.strip() for line in lines[: len(wanted)]] == wanted
    assert {"No clear change:", "  ROUGE-L: 50% → 50%"} <= set(lines) and max(map(len, [first, *lines])) <= 100


def test_the_conclusion_notices_answers_that_never_end_and_questions_too_few():
    text = conclusion(made_metrics(stop_rate=(0.0, 0.1, [0.0, 0.2]), mean_answer_tokens=(80, 76, [-6, -1])))
    assert "in 10% of its answers" in text and "cut at 80 tokens" in text
    few = made_metrics(n=5, contains=(0.0, 1.0, [1.0, 1.0]))
    assert verdict(few, "contains") == 0 and conclusion(few).startswith("Too few") and "Better:" not in conclusion(few)
    assert verdict({**few, "n": 20}, "contains") == 1  # an older metrics.json, without `questions`
    assert verdict({**few, "n": 20, "questions": 19}, "contains") == 0


def test_the_comparison_shows_five_measures_with_intervals_and_verdicts():
    metrics = made_metrics(**MORE, **LOSS)
    table = comparison(metrics)
    labels = ["stops by itself", "answer loss, nats per token", "answer length, tokens"]
    assert list(table.columns) == ["base", "tuned", "change", ""]
    assert list(table.index) == ["answer holds the fact", "answer is exact", *labels]
    assert list(table.iloc[0])[1:] == ["90% (40% to 60%)", "+80 (+70 to +85)", "better"]
    base, tuned, change, _ = table.loc[labels[1]]
    assert (base.split()[0], tuned.split()[0], change) == ("11.929", "11.853", "-0.076 (-0.090 to -0.060)")
    assert len(comparison(metrics, every=True)) == len(METRICS)
    for side in ("base", "tuned", "change"):
        metrics[side] |= {"contains": None, "exact_match": None}
    assert list(comparison(metrics).index) == ["ROUGE-L", "repeated 4-grams", *labels]
    assert len(comparison(metrics, every=True)) == len(METRICS) - 2
