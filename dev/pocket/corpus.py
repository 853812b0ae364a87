"""Facts become two texts: what the pocket reads in pretraining, and the instructions that teach it to answer.

The pretraining documents state every fact in several ways and hold lists of requests without an answer. The
instruction rows ask for the same facts. Rows are split by entity: what a held-out row asks for is stated in
pretraining and appears in no training row, so a right answer there shows that answering was learned, not the fact.
"""

import csv
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from alpaca_helpers.prompts import format_example

FOLDER = Path(__file__).parent
FACTS = FOLDER / "facts"
SEED = 42
ROUNDS = 160  # how often the pretraining text goes through all facts
HELDOUT_SHARE = 0.2
TRAIN_ROWS_A_KIND = 60
HELDOUT_ROWS_A_KIND = 18

# What may stand before a line: a text of many forms, so that a colon alone does not tell what comes after it.
LABELS = ("Note: ", "Item: ", "Line: ", "Card: ", "Page: ", "Remark: ", "Entry: ", "Notice: ", "Chalk: ", "Margin: ")

COUNTS = {3: "three", 4: "four", 5: "five", 6: "six"}

# The columns by which a row of a table can be recognized in a text; elsewhere the first column.
NAMES = {
    "countries": ("country", "capital"),
    "creators": ("work", "creator"),
    "opposites": ("word", "opposite"),
}

# The tables whose cells are sentences or lists, in which any word may occur.
PROSE = ("lists", "advice", "definitions", "groups", "explanations")

# The tables whose subjects stand in no heading: a phrase above its translation is close to a question with its answer.
UNHEADED = ("french_phrases", "arithmetic")

# What the lessons ask: always held out.
ALWAYS_HELDOUT = {
    "France", "Japan", "William Shakespeare", "What happened ?", "three primary colors", "animals", "staying healthy",
}  # fmt: skip

# What the lessons ask, in their own words: always among the held-out rows.
QUESTIONS = (
    "What is the capital of France?",
    "Name the capital of Japan.",
    "What are the three primary colors?",
    "Traduit : What happened ?",
    "Give three tips for staying healthy.",
    "Create a list of five different animals",
    "Who wrote 'Romeo and Juliet'?",
    "Tell me who wrote Hamlet.",
)


def read_table(path: Path) -> list[dict[str, str]]:
    """Return a table's rows, each by the names of its columns."""
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


@dataclass
class Kind:
    """One kind of fact. In its templates `{country}` is that cell of the table, `{a_animal}` one after "a" or "an"."""

    name: str
    table: str
    fact: str  # the column that a correct answer must contain; empty where there is no single right answer
    answer: str  # its one form
    below: str  # a request whose subject is the row's input, and the input's column; empty where there is none
    input: str
    statements: list[str]  # other ways to state it
    requests: list[str]


def read_kinds() -> list[Kind]:
    """Return the kinds of facts with their templates, in the order of `kinds.csv`."""
    templates: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in read_table(FOLDER / "wordings.csv"):
        templates[row["kind"], row["use"]].append(row["text"])
    return [
        Kind(**row, statements=templates[row["name"], "statement"], requests=templates[row["name"], "request"])
        for row in read_table(FOLDER / "kinds.csv")
    ]


KINDS = read_kinds()


@dataclass
class Fact:
    """One thing to say about one entity: a kind and the cells that fill its templates."""

    kind: Kind
    cells: dict[str, str]
    entity: str

    @cached_property
    def answer(self) -> str:
        return fill(self.kind.answer, self.cells)

    @property
    def value(self) -> str:
        """The string that a correct answer must contain, or "" where there is no single right answer."""
        return self.cells[self.kind.fact] if self.kind.fact else ""

    @cached_property
    def statements(self) -> list[str]:
        """All other ways to state the fact."""
        return [fill(statement, self.cells) for statement in self.kind.statements]

    @cached_property
    def heading(self) -> str:
        """What the fact is about, as a request has it for an input, or "" where that would be a question."""
        return self.cells[self.kind.input] if self.kind.below and self.kind.table not in UNHEADED else ""

    @cached_property
    def requests(self) -> list[tuple[str, str]]:
        """All ways to ask for the fact, as (instruction, input), without those that already hold the answer."""
        asked = [(fill(request, self.cells), "") for request in self.kind.requests]
        if self.kind.below:
            asked.append((fill(self.kind.below, self.cells), self.cells[self.kind.input]))
        return [(i, x) for i, x in asked if not self.value or self.value.casefold() not in f"{i} {x}".casefold()]


def fill(template: str, cells: dict[str, str]) -> str:
    """Return the template with its columns filled in and its first letter made a capital."""
    with_articles = cells | {f"a_{column}": with_article(cell) for column, cell in cells.items()}
    sentence = template.format(**with_articles)
    return sentence[:1].upper() + sentence[1:]


def with_article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def read_tables() -> dict[str, list[dict[str, str]]]:
    """Return every table of facts by name: the committed CSV files, and arithmetic, which is computed."""
    tables = {path.stem: read_table(path) for path in sorted(FACTS.glob("*.csv"))}
    tables["opposites"] += [{"word": row["opposite"], "opposite": row["word"]} for row in tables["opposites"]]
    tables["lists"] = [
        {"topic": row["topic"], "count": word, "items": enumerate_items(row["items"].split(";")[:count])}
        for row in tables["lists"]
        for count, word in COUNTS.items()
    ]
    tables["arithmetic"] = arithmetic()
    return tables


def enumerate_items(items: list[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}"


def arithmetic() -> list[dict[str, str]]:
    """Return doubles and squares, those with a result of two digits or more."""
    doubles = [(f"the double of {n}", 2 * n) for n in range(5, 31)]
    squares = [(f"the square of {n}", n * n) for n in range(4, 21)]
    return [{"operation": operation, "result": str(result)} for operation, result in doubles + squares]


def read_facts() -> list[Fact]:
    """Return every fact, in a fixed order; a kind has none where the table's cell is empty."""
    tables = read_tables()
    return [
        Fact(kind, cells, entity(kind.table, cells))
        for kind in KINDS
        for cells in tables[kind.table]
        if not kind.fact or cells[kind.fact]
    ]


def entity(table: str, cells: dict[str, str]) -> str:
    """Return what rows are split by: both directions of a pair, and all works of one creator, are one entity."""
    if table == "creators":
        return cells["creator"]
    if table == "opposites":
        return " and ".join(sorted(cells.values()))
    return next(iter(cells.values()))


def names(fact: Fact) -> list[str]:
    """Return the names by which a text can be seen to speak of the fact's entity."""
    columns = NAMES.get(fact.kind.table, (next(iter(fact.cells)),))
    return [fact.cells[column] for column in columns]


def mentions(text: str, name: str) -> bool:
    """Tell whether the text holds the name as whole words, in any case."""
    return name.casefold() in text.casefold() and whole(name).search(text) is not None


@cache
def whole(name: str) -> re.Pattern:
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)


def choose_heldout(facts: list[Fact]) -> set[tuple[str, str]]:
    """Return the held-out (table, entity) pairs: a seeded share of each table, and what the lessons ask.

    A name that the wordings or another table's prose use ("word", "tea") cannot be kept out of the training rows: it is
    not chosen.
    """
    by_entity: dict[tuple[str, str], list[str]] = defaultdict(list)
    for fact in facts:
        by_entity[fact.kind.table, fact.entity] += names(fact)
    wordings = [text for kind in KINDS for text in (kind.answer, *kind.requests)]
    chosen = {key for key in by_entity if key[1] in ALWAYS_HELDOUT}
    for table in dict.fromkeys(table for table, _ in by_entity):
        entities = [key for key in by_entity if key[0] == table]
        random.Random(f"{SEED} {table}").shuffle(entities)
        prose = [fact.answer for fact in facts if fact.kind.table in PROSE and fact.kind.table != table]
        fixed = "\n".join(wordings + prose)
        free = [key for key in entities if not any(mentions(fixed, name) for name in by_entity[key])]
        wanted = 0 if table == "explanations" else max(2, round(HELDOUT_SHARE * len(entities)))
        for key in free:
            if sum(held[0] == table for held in chosen) >= wanted:
                break
            chosen.add(key)
    return chosen


def instruction_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the training rows and the held-out rows, each with the columns of Alpaca and `fact`.

    `fact` is the string that a correct answer contains, never found in the request; it is empty where a request
    has no single right answer.
    """
    facts = read_facts()
    heldout = choose_heldout(facts)
    heldout_names = {name for fact in facts if (fact.kind.table, fact.entity) in heldout for name in names(fact)}
    train_rows, heldout_rows = [], []
    for kind in KINDS:
        mine = [fact for fact in facts if fact.kind == kind]
        rng = random.Random(f"{SEED} {kind.name}")
        rng.shuffle(mine)
        test = rows_of([f for f in mine if (f.kind.table, f.entity) in heldout], rng)
        train = rows_of([f for f in mine if (f.kind.table, f.entity) not in heldout], rng)
        train = [row for row in train if not any(mentions(row["text"], name) for name in heldout_names)]
        train_rows += train[:TRAIN_ROWS_A_KIND]
        asked = [row for row in test if row["instruction"] in QUESTIONS]
        heldout_rows += asked + [row for row in test if row not in asked][: HELDOUT_ROWS_A_KIND - len(asked)]
    random.Random(SEED).shuffle(train_rows)
    random.Random(SEED).shuffle(heldout_rows)
    return train_rows, heldout_rows


def rows_of(facts: list[Fact], rng: random.Random) -> list[dict[str, str]]:
    """Return one row a fact, its wordings taken in turn; a fact that the lessons ask for is asked in their words."""
    rows = []
    turn = 0
    for fact in facts:
        requests = fact.requests
        if not requests:
            continue
        asked = [request for request in requests if request[0] in QUESTIONS]
        instruction, below = asked[0] if asked else requests[turn % len(requests)]
        turn += 1
        rows.append(
            {
                "instruction": instruction,
                "input": below,
                "output": fact.answer,
                "text": format_example(instruction, fact.answer, below),
                "fact": fact.value,
            }
        )
    return rows


def documents() -> list[str]:
    """Return the pretraining text: documents that state facts, and documents of requests without an answer."""
    facts = read_facts()
    rng = random.Random(SEED)
    texts = []
    for _ in range(ROUNDS):
        for group in groupings(facts, rng):
            (style,) = rng.choices(tuple(STYLES), tuple(STYLES.values()))
            if lines := style(group, rng):
                texts.append(" ".join(lines) if style is state and rng.random() < 0.3 else as_lines(lines, rng))
    rng.shuffle(texts)
    return texts


def groupings(facts: list[Fact], rng: random.Random) -> list[list[Fact]]:
    """Return all facts as groups for one document each: facts of one entity, else up to ten facts, mixed or sorted."""
    order = rng.sample(facts, len(facts))
    by = rng.choice(("kind", "entity", "nothing"))
    if by == "entity":
        entities = defaultdict(list)
        for fact in order:
            entities[fact.kind.table, fact.entity].append(fact)
        return list(entities.values())
    if by == "kind":
        order.sort(key=lambda fact: fact.kind.name)
    groups = []
    while order:
        size = rng.randint(1, 10)
        groups.append(order[:size])
        order = order[size:]
    return groups


def state(facts: list[Fact], rng: random.Random) -> list[str]:
    """Return each fact as one sentence, as often in the form of its answer as in all others."""
    return [rng.choice((fact.answer, rng.choice(fact.statements or [fact.answer]))) for fact in facts]


def restate(facts: list[Fact], rng: random.Random) -> list[str]:
    """Return each fact as up to three sentences, one in the form of its answer: to read on is to look back."""
    sentences = []
    for fact in facts:
        forms = [fact.answer, *rng.sample(fact.statements, min(len(fact.statements), 2))]
        sentences += rng.sample(forms, len(forms))
    return sentences


def entry(facts: list[Fact], rng: random.Random) -> list[str]:
    """Return facts as an encyclopedia has them: what they are about on a line of its own, then their answers."""
    lines: list[str] = []
    for fact in facts:
        if fact.heading and fact.heading not in lines:
            lines.append(fact.heading)
        lines.append(fact.answer)
    return lines


def ask(facts: list[Fact], rng: random.Random) -> list[str]:
    """Return one to four requests a fact, none of which holds the answer of another."""
    asked = []
    for fact in facts:
        requests = fact.requests
        for instruction, below in rng.sample(requests, min(len(requests), rng.randint(1, 4))):
            asked.append(f"{instruction}\n{below}" if below else instruction)
    values = [fact.value for fact in facts if fact.value]
    return [request for request in asked if not any(mentions(request, value) for value in values)]


def as_lines(sentences: list[str], rng: random.Random) -> str:
    """Return one document with a sentence a line, sometimes after a dash, or after labels that say nothing of it."""
    marks = rng.choice((("",), ("",), ("- ",), rng.sample(LABELS, 2)))
    return "\n".join(rng.choice(marks) + sentence for sentence in sentences)


STYLES = {state: 4, restate: 3, entry: 3, ask: 4}  # of a document, and how often it is taken
