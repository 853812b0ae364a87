import json
import math
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from peft import get_peft_model

from alpaca_helpers import AlpacaError, evaluation, report
from alpaca_helpers.evaluation import answer_losses, evaluate
from alpaca_helpers.generation import Answer, generate
from alpaca_helpers.lora import lora_config
from alpaca_helpers.metrics import METRICS, chrf, contains, echoes, exact_match, repetition, rouge_l
from alpaca_helpers.prompts import encode, format_prompt
from alpaca_helpers.report import comparison, conclusion, verdict
from alpaca_helpers.text import words

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
        ("They are red, blue, and yellow.", "red, yellow and blue", True),  # a list in any order
        ("Blue; yellow & red", "red, yellow and blue", True),
        ("rouge, bleu et jaune", "bleu, jaune et rouge", True),
        ("red, yellow and green", "red, yellow and blue", False),
        ("red and blue", "red, yellow and blue", False),
        ("red yellow blue", "red, yellow and blue", False),
        ("red, red and blue", "red, yellow and blue", False),
        ("light red, yellow and blue", "red, yellow and blue", True),  # as whole words
        ("It is salt, and pepper", "salt and pepper", True),
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
        ("यह एक बिल्ली है।", "यह एक बिल्ली है", True),
        ("أين هو؟", "أين هو", True),
        ("وہ کہاں ہے۔", "وہ کہاں ہے", True),
        ("ሰላም ነው።", "ሰላም ነው", True),
        ("...", "…", False),
        ("well ...", "Well…", True),
        ("C#", "C", False),  # punctuation to Unicode, but no mark that ends a sentence
        ("50%", "50", False),
        ("(Paris)", "(Paris", False),
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
    assert len(words("一" * 81)) == 81


def test_a_words_definition_needs_no_heavy_import():
    """`data.py` filters by it, and shall not load pandas or the scores for that."""
    check = (
        "import sys, alpaca_helpers.text; assert not {'pandas', 'rouge_score', 'sacrebleu', 'torch'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize(
    ("name", "value", "change", "text"),
    [
        ("answer_loss", 11.929, 0.0, "11.9"),
        ("answer_loss", 11.929, -0.076, "11.929"),
        ("answer_loss", 11.853, -0.076, "11.853"),
        ("answer_loss", 0.88, -0.86, "0.88"),
        ("answer_loss", 3.1, -1e-9, "3.1000"),
        ("contains", 0.07, 0.89, "7%"),
        ("contains", 0.004, 0.0, "0.4%"),
        ("contains", 0.502, 0.004, "50.2%"),
        ("contains", None, 0.0, "–"),
        ("mean_answer_tokens", 80, -67.4, "80.0"),
        ("perplexity", 487421515.5, -487421513.0, "4.9e+08"),
        ("perplexity", 2.41, -487421513.0, "2.41"),
        ("perplexity", 12345.6, 0.0, "12345.6"),
    ],
)
def test_a_value_has_the_decimals_that_its_difference_needs(name, value, change, text):
    assert METRICS[name].show(value, change=change) == text


def test_a_difference_has_its_sign_and_no_negative_zero():
    assert METRICS["contains"].show(0.89, signed=True) == "+89"
    assert METRICS["answer_loss"].show(-0.076, signed=True, change=-0.076) == "-0.076"
    assert METRICS["answer_loss"].show(-1e-9, signed=True, change=-1e-9) == "+0.0000"


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
        "tuned": [Answer("Paris.", [0] * 3, True, 0), Answer("3", [0] * 1, True, 0), Answer("", [0] * 0, True, 0)],
        "base": [
            Answer("x y z w x y z w", [0] * 8, False, 0),
            Answer("Add them. 3", [0] * 8, False, 0),
            Answer("hello", [0] * 8, False, 0),
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
    assert metrics["n"] == metrics["questions"] == 3
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
    with pytest.raises(AlpacaError) as error:
        evaluate(tiny_model, pocket_tokenizer, [])
    assert error.value.code == "no-rows"


def estimated(contains, questions=None, seed=0):
    """The share that holds the fact, of rows with these scores (None: no fact), in `metrics.json`'s form."""
    questions = questions or [f"question {index}" for index in range(len(contains))]
    scores = pd.DataFrame({"contains": contains}, columns=list(METRICS), dtype=float)
    estimates = evaluation._estimate(scores, np.ones(len(contains)), evaluation._resampling(questions, seed))
    side = evaluation._side(estimates)
    return side["contains"], side["intervals"]["contains"]


def test_intervals_are_the_bootstraps_and_seeded():
    contains = [1, 0, 1, 0, None] * 20  # 40 of 80 rows that count
    share, (low, high) = estimated(contains)
    half = 1.96 * math.sqrt(0.25 / 80)  # the normal approximation of a share's interval
    assert share == 0.5 and low == pytest.approx(0.5 - half, abs=0.02) and high == pytest.approx(0.5 + half, abs=0.02)
    drawn = [evaluation._resampling([str(index) for index in range(100)], seed) for seed in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()


def test_intervals_do_not_depend_on_rows_that_do_not_count():
    assert estimated([1] + [None] * 9) == (1, [1, 1])  # a resample may hold no row that counts


def test_copies_of_a_question_do_not_narrow_its_interval():
    contains = [1, 0, 1, 0] * 5
    share, (low, high) = estimated(contains)
    copied = estimated(np.repeat(contains, 20), [str(index) for index in range(20) for _ in range(20)])
    assert share == copied[0] == 0.5 and high - low > 0.3
    assert copied[1] == pytest.approx([low, high], abs=0.051)  # one question of twenty


def test_copies_of_one_question_give_no_verdict(tiny_model, pocket_tokenizer):
    rows = [{**ROWS[0], "instruction": text} for text in ("Where is Paris?", " where  IS Paris?") * 10]
    metrics, _ = evaluate(tiny_model, pocket_tokenizer, rows, max_new_tokens=2)
    assert (metrics["n"], metrics["questions"]) == (20, 1)
    assert metrics["change"]["answer_loss"] != 0 and verdict(metrics, "answer_loss") == 0
    assert conclusion(metrics).startswith("Too few held-out questions to tell.\nThere are 1,")


def test_a_fresh_adapter_is_found_to_change_nothing(tiny_base, pocket_tokenizer):
    """What notebook 04 concludes after zero training steps."""
    model = get_peft_model(tiny_base, lora_config()).eval()
    rows = [{**row, "instruction": f"{number}. {row['instruction']}"} for number in range(10) for row in ROWS]
    metrics, _ = evaluate(model, pocket_tokenizer, rows, max_new_tokens=6)
    assert {name for name in METRICS if metrics["change"][name] not in (0, None)} == set()
    text = conclusion(metrics)
    assert text.splitlines()[:2] == [
        "Tuning made no clear difference.",
        "On 30 held-out questions 0 of 7 measures got clearly better, 0 clearly worse.",
    ]
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
    assert better.splitlines()[:5] == [
        "Tuning helped.",
        "On 100 held-out questions 2 of 7 measures got clearly better, 0 clearly worse.",
        "Better:",
        "  answer holds the fact: 10% → 90%",
        "  answer loss: 5.00 → 0.40",
    ]
    assert "No clear change: answer is exact, ROUGE-L, stops by itself," in better and "Worse" not in better
    worse = conclusion(made_metrics(contains=(0.9, 0.1, [-0.85, -0.7]), repetition=(0.1, 0.6, [0.4, 0.6])))
    assert (
        worse.startswith("Tuning made the model worse.\n") and "0 of 7 measures got clearly better, 2 clearly" in worse
    )
    assert "Worse:\n  answer holds the fact: 90% → 10%\n  repeated 4-grams: 10% → 60%\n" in worse
    mixed = conclusion(made_metrics(contains=(0.9, 0.1, [-0.85, -0.7]), stop_rate=(0, 1, [0.9, 1])))
    assert mixed.startswith("Tuning helped in some ways and hurt in others.\n")
    assert "Better:\n  stops by itself" in mixed and "Worse:\n  answer holds the fact" in mixed


def test_conclusion_does_not_take_a_lower_loss_for_better_answers():
    loss = {"answer_loss": (11.929, 11.853, [-0.09, -0.06])}
    first, _, _, line, *_ = conclusion(made_metrics(**loss)).splitlines()
    assert first == "Tuning lowered the loss alone, the answers themselves are not clearly better."
    assert line == "  answer loss: 11.929 → 11.853"
    stops = conclusion(made_metrics(**loss, stop_rate=(0.0, 1.0, [1.0, 1.0])))
    assert stops.startswith("Tuning changed how the answers are written, but not clearly what they say.\n")


def test_conclusion_is_short_lines():
    interval = {1: [0.1, 0.2], -1: [-0.2, -0.1]}
    everything = {name: (0.5, 0.5, interval[METRICS[name].better]) for name in report.JUDGED}
    for text in (conclusion(made_metrics()), conclusion(made_metrics(**everything))):
        assert max(map(len, text.splitlines())) <= 120


def test_conclusion_notices_answers_that_never_end():
    text = conclusion(made_metrics(stop_rate=(0.0, 0.1, [0.0, 0.2]), mean_answer_tokens=(80, 76, [-6, -1])))
    assert "stops by itself in 10% of its answers; the others are cut at 80 tokens" in text


def test_few_questions_give_no_verdict():
    metrics = made_metrics(n=5, contains=(0.0, 1.0, [1.0, 1.0]))
    assert verdict(metrics, "contains") == 0 and conclusion(metrics).startswith("Too few held-out questions to tell.\n")
    assert verdict({**metrics, "n": 20}, "contains") == 1  # an older metrics.json, without `questions`
    assert verdict({**metrics, "n": 20, "questions": 19}, "contains") == 0


def test_comparison_shows_values_intervals_and_verdicts():
    table = comparison(made_metrics(contains=(0.1, 0.9, [0.7, 0.85])))
    assert list(table.columns) == ["base", "tuned", "change", ""]
    line = table.loc["answer holds the fact"]
    assert line["tuned"] == "90% (40% to 60%)" and line["change"] == "+80 (+70 to +85)" and line[""] == "better"


def test_comparison_shows_five_measures_first():
    labels = ["stops by itself", "answer loss, nats per token", "answer length, tokens"]
    metrics = made_metrics()
    assert list(comparison(metrics).index) == ["answer holds the fact", "answer is exact", *labels]
    assert len(comparison(metrics, every=True)) == len(METRICS)
    for side in ("base", "tuned", "change"):
        metrics[side] |= {"contains": None, "exact_match": None}
    assert list(comparison(metrics).index) == ["ROUGE-L", "repeated 4-grams", *labels]
    assert len(comparison(metrics, every=True)) == len(METRICS) - 2


def test_comparison_shows_a_small_difference():
    line = comparison(made_metrics(answer_loss=(11.929, 11.853, [-0.09, -0.06]))).loc["answer loss, nats per token"]
    assert line["base"].startswith("11.929 ") and line["tuned"].startswith("11.853 ")
    assert line["change"] == "-0.076 (-0.090 to -0.060)"


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
