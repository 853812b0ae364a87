"""How one answer is scored against the expected one, and how each metric is named and shown."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

from .text import plain, unmarked, words, words_and_marks


@dataclass(frozen=True)
class Metric:
    """How a metric is named and shown."""

    label: str
    unit: str  # "%": stored as a share of 1, shown times 100
    better: int  # +1: more is better, -1: less is better, 0: neither

    @property
    def heading(self) -> str:
        """The label, with the unit where the values do not carry it."""
        return self.label + (f", {self.unit}" if len(self.unit) > 1 else "")

    def show(self, value: float | None, signed: bool = False, change: float = 0.0) -> str:
        """Return the value as text, as exactly as its size and a `change` beside it need.

        A signed share is in percentage points, without a sign for percent.
        """
        if value is None:
            return "–"
        scale, digits = (100, 1) if self.unit == "%" else (1, 2)
        sizes = [math.floor(math.log10(abs(scale * number))) + 1 for number in (value, change) if number]
        least = {"%": 0, "tokens": 1, "seconds": 1}.get(self.unit, 2) if abs(value) < 1000 else 0
        decimals = min(4, max([least, *(digits - size for size in sizes)]))
        number = f"{scale * value:{'+' if signed else ''}z.{decimals}f}"
        return number + "%" if self.unit == "%" and not signed else number


METRICS = {
    "contains": Metric("answer holds the fact", "%", +1),
    "exact_match": Metric("answer is exact", "%", +1),
    "stop_rate": Metric("stops by itself", "%", +1),
    "rouge_l": Metric("ROUGE-L", "%", +1),
    "chrf": Metric("chrF", "%", +1),
    "repetition": Metric("repeated 4-grams", "%", -1),
    "echo_rate": Metric("repeats the question", "%", -1),
    "token_accuracy": Metric("next token right", "%", +1),
    "answer_loss": Metric("answer loss", "nats per token", -1),
    "perplexity": Metric("perplexity", "", -1),
    "mean_answer_tokens": Metric("answer length", "tokens", 0),
}


def contains(answer: str, fact: str) -> bool:
    """Return whether the answer holds the fact as whole words, its punctuation included.

    A fact that is a list ("red, yellow and blue") may have its items in any order.
    """
    said, wanted = _list_words(answer), _list_words(fact)
    starts, items = range(len(said) - len(wanted) + 1), _items(wanted)
    return bool(wanted) and any(_items(said[start : start + len(wanted)]) == items for start in starts)


def _list_words(text: str) -> list[str]:
    """Return words and marks, with one "," for whatever stands between two items of a list, such as ", and" or "et"."""
    said = ["," if word in {",", ";", "&", "and", "et"} else word for word in words_and_marks(text)]
    return [word for word, before in zip(said, ["", *said]) if (word, before) != (",", ",")]


def _items(words: list[str]) -> list[str]:
    return sorted(" ".join(words).split(" , "))


def exact_match(answer: str, output: str) -> bool:
    """Return whether the answer is the expected one, whatever its case, spacing, quotes and final mark."""
    return plain(answer) == plain(output) or unmarked(answer) == unmarked(output) != ""


def rouge_l(answer: str, output: str) -> float:
    """Return ROUGE-L's F1, 0 to 1: the longest common subsequence of words (Lin, 2004; rouge-score)."""
    own_words = SimpleNamespace(tokenize=words)  # rouge-score's tokenizer drops every letter that is not a to z
    return RougeScorer(["rougeL"], tokenizer=own_words).score(output, answer)["rougeL"].fmeasure


def chrf(answer: str, output: str) -> float:
    """Return chrF, 0 to 1: the F2 of character 1- to 6-grams (Popović, 2015; sacrebleu)."""
    return CHRF().sentence_score(plain(answer), [plain(output)]).score / 100


def repetition(answer: str) -> float:
    """Return the share of the answer's word 4-grams that it has written before; 0 for fewer than four words."""
    said = words(answer)
    grams = list(zip(*(said[start:] for start in range(4))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def echoes(answer: str, instruction: str) -> bool:
    """Return whether the answer begins with the question, whatever its punctuation."""
    question = words(instruction)
    return bool(question) and words(answer)[: len(question)] == question
