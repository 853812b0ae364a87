"""How each kind of fact is asked and stated: the templates that turn a table of facts into sentences.

A template names columns of its table: `{country}` is the cell, `{a_animal}` the cell after "a" or "an".
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of fact: its table, the one form of its answer, other ways to state it and ways to ask for it."""

    name: str
    table: str
    fact: str  # the column that a correct answer must contain; empty where there is no single right answer
    answer: str
    statements: tuple[str, ...]
    requests: tuple[str, ...]
    below: tuple[str, str] | None = None  # an instruction, and the column that its input comes from


KINDS = (
    Kind(
        "capital", "countries", "capital",
        "The capital of {country} is {capital}.",
        (
            "{capital} is the capital of {country}.",
            "The capital city of {country} is {capital}.",
            "{country} has {capital} as its capital.",
            "{country} is governed from its capital, {capital}.",
            "As for {country}, its capital is {capital}.",
            "In {country}, the capital is {capital}.",
            "The name of the capital of {country} is {capital}.",
        ),
        (
            "What is the capital of {country}?",
            "Name the capital of {country}.",
            "Tell me the capital of {country}.",
            "Which city is the capital of {country}?",
            "Give the name of the capital city of {country}.",
            "What's the capital city of {country}?",
        ),
        ("Name the capital of the country below.", "country"),
    ),
    Kind(
        "country", "countries", "country",
        "{capital} is the capital of {country}.",
        (
            "The country whose capital is {capital} is {country}.",
            "{capital} is in {country}.",
            "The city of {capital} is the capital of {country}.",
            "The capital of {country} is {capital}.",
        ),
        (
            "Which country has {capital} as its capital?",
            "{capital} is the capital of which country?",
            "Name the country whose capital is {capital}.",
            "Of which country is {capital} the capital?",
        ),
        ("Name the country of the capital below.", "capital"),
    ),
    Kind(
        "continent", "countries", "continent",
        "{country} is in {continent}.",
        (
            "{country} is a country in {continent}.",
            "{country} lies in {continent}.",
            "The continent of {country} is {continent}.",
            "One of the countries of {continent} is {country}.",
            "On a map, {country} is found in {continent}.",
        ),
        (
            "On which continent is {country}?",
            "Name the continent of {country}.",
            "What continent is {country} in?",
            "Tell me on which continent {country} lies.",
        ),
    ),
    Kind(
        "language", "countries", "language",
        "The main language of {country} is {language}.",
        (
            "{language} is the main language of {country}.",
            "In {country}, the main language is {language}.",
            "People in {country} speak {language}.",
            "Most people in {country} speak {language}.",
            "{language} is spoken in {country}.",
            "As for {country}, its main language is {language}.",
        ),
        (
            "What is the main language of {country}?",
            "Which language do people speak in {country}?",
            "Name the main language of {country}.",
            "Tell me which language is spoken in {country}.",
            "What language is spoken in {country}?",
        ),
        ("Name the main language of the country below.", "country"),
    ),
    Kind(
        "currency", "countries", "currency",
        "The currency of {country} is the {currency}.",
        (
            "The {currency} is the currency of {country}.",
            "In {country}, the currency is the {currency}.",
            "People in {country} pay with the {currency}.",
            "The money of {country} is the {currency}.",
            "As for {country}, its currency is the {currency}.",
        ),
        (
            "What is the currency of {country}?",
            "Name the currency of {country}.",
            "Which currency is used in {country}?",
            "What money do people use in {country}?",
            "Tell me the currency of {country}.",
        ),
        ("Name the currency of the country below.", "country"),
    ),
    Kind(
        "creator", "creators", "creator",
        "{work} was {participle} by {creator}.",
        (
            "{creator} {verb} {work}.",
            "It was {creator} who {verb} {work}.",
            "'{work}' was {participle} by {creator}.",
            "{creator} {verb} '{work}'.",
            "Everyone knows that {work} was {participle} by {creator}.",
            "We owe {work} to {creator}.",
        ),
        (
            "Who {verb} {work}?",
            "Who {verb} '{work}'?",
            "Tell me who {verb} {work}.",
            "Tell me who {verb} '{work}'.",
            "By whom was {work} {participle}?",
            "Name the person who {verb} {work}.",
            "Do you know who {verb} {work}?",
        ),
        ("Who {verb} the work named below?", "work"),
    ),
    Kind(
        "young", "animals", "young",
        "A young {animal} is called {a_young}.",
        (
            "The young of {a_animal} is called {a_young}.",
            "{a_young} is a young {animal}.",
            "A baby {animal} is {a_young}.",
            "The name for a baby {animal} is {young}.",
            "The word for a young {animal} is {young}.",
        ),
        (
            "What is a young {animal} called?",
            "What do we call the young of {a_animal}?",
            "Name the young of {a_animal}.",
            "What is the word for a baby {animal}?",
            "Give the name of a young {animal}.",
        ),
        ("Name the young of the animal below.", "animal"),
    ),
    Kind(
        "sound", "animals", "sound",
        "{a_animal} {sound}.",
        (
            "When {a_animal} makes itself heard, it {sound}.",
            "Everyone knows that {a_animal} {sound}.",
            "We say that {a_animal} {sound}.",
            "As for {a_animal}, it {sound}.",
        ),
        (
            "What sound does {a_animal} make?",
            "Which sound does {a_animal} make?",
            "Tell me the sound that {a_animal} makes.",
            "How does {a_animal} make itself heard?",
        ),
    ),
    Kind(
        "class", "animals", "class",
        "The class of {a_animal} is {class}.",
        (
            "{a_animal} is {a_class}.",
            "{a_animal} belongs to the class {class}.",
            "Among living things, {a_animal} is {a_class}.",
        ),
        (
            "What is the class of {a_animal}?",
            "To which class does {a_animal} belong?",
            "Which class of living things does {a_animal} belong to?",
            "Name the class of {a_animal}.",
        ),
        ("Name the class of the animal below.", "animal"),
    ),
    Kind(
        "opposite", "opposites", "opposite",
        "The opposite of {word} is {opposite}.",
        (
            "{word} is the opposite of {opposite}.",
            "{word} and {opposite} are opposites.",
            "The contrary of {word} is {opposite}.",
            "The word with the opposite meaning of {word} is {opposite}.",
            "An antonym of {word} is {opposite}.",
        ),
        (
            "What is the opposite of {word}?",
            "Give the opposite of {word}.",
            "Name the opposite of the word {word}.",
            "Give me an antonym of {word}.",
            "Which word means the opposite of {word}?",
        ),
        ("Give the opposite of the word below.", "word"),
    ),
    Kind(
        "past", "verbs", "past",
        "The past tense of {verb} is {past}.",
        (
            "{past} is the past tense of {verb}.",
            "The past of {verb} is {past}.",
            "In the past tense, {verb} becomes {past}.",
            "The verb {verb} has the past tense {past}.",
            "Today I {verb}, yesterday I {past}.",
        ),
        (
            "What is the past tense of {verb}?",
            "Give the past tense of {verb}.",
            "Put the verb {verb} into the past tense.",
            "Write the past tense of the verb {verb}.",
        ),
        ("Give the past tense of the verb below.", "verb"),
    ),
    Kind(
        "plural", "plurals", "plural",
        "The plural of {noun} is {plural}.",
        (
            "{plural} is the plural of {noun}.",
            "In the plural, {noun} becomes {plural}.",
            "The plural form of {noun} is {plural}.",
            "One {noun}, two {plural}.",
        ),
        (
            "What is the plural of {noun}?",
            "Give the plural of {noun}.",
            "Write the plural of the noun {noun}.",
            "Put the noun {noun} into the plural.",
        ),
        ("Give the plural of the noun below.", "noun"),
    ),
    Kind(
        "french word", "french_words", "french",
        "The French word for {english} is {french}.",
        (
            "{french} is the French word for {english}.",
            "In French, {english} is called {french}.",
            "The word {french} means {english} in French.",
            "The French say {french} for {english}.",
            "{english} in French is {french}.",
        ),
        (
            "What is the French word for {english}?",
            "How do you say {english} in French?",
            "Give the French word for {english}.",
            "Translate the word {english} into French.",
        ),
        ("Translate the word below into French.", "english"),
    ),
    Kind(
        "french phrase", "french_phrases", "french",
        'In French, "{english}" is "{french}".',
        (
            '"{english}" in French is "{french}".',
            '"{french}" is French for "{english}".',
            'In French, one says "{french}" for "{english}".',
            'The French for "{english}" is "{french}".',
            'The French translation of "{english}" is "{french}".',
        ),
        (
            "Traduit : {english}",
            "Translate into French: {english}",
            'How do you say "{english}" in French?',
            'Translate "{english}" into French.',
            "Traduit en français : {english}",
        ),
        ("Translate the sentence into French.", "english"),
    ),
    Kind(
        "element", "elements", "element",
        "The element with the symbol {symbol} is {element}.",
        (
            "The symbol of {element} is {symbol}.",
            "{symbol} is the symbol of {element}.",
            "The chemical symbol {symbol} stands for {element}.",
            "In chemistry, {element} is written {symbol}.",
        ),
        (
            "Which element has the symbol {symbol}?",
            "What element has the symbol {symbol}?",
            "Name the element with the symbol {symbol}.",
            "Which element does the symbol {symbol} stand for?",
        ),
    ),
    Kind(
        "profession", "professions", "profession",
        "A person who {task} is called {a_profession}.",
        (
            "{a_profession} is a person who {task}.",
            "Someone who {task} is {a_profession}.",
            "The job of {a_profession}: a person who {task}.",
            "If a person {task}, that person is {a_profession}.",
        ),
        (
            "What do we call a person who {task}?",
            "What is a person who {task} called?",
            "Name the job of a person who {task}.",
            "Who {task}?",
        ),
    ),
    Kind(
        "landmark", "landmarks", "country",
        "{landmark} is in {country}.",
        (
            "{landmark} can be visited in {country}.",
            "{country} is the home of {landmark}.",
            "{landmark} stands in {country}.",
            "Travelers go to {country} to see {landmark}.",
        ),
        (
            "In which country is {landmark}?",
            "Where is {landmark}?",
            "Name the country of {landmark}.",
            "Tell me in which country {landmark} is.",
        ),
    ),
    Kind(
        "color", "colours", "color",
        "The color of {thing} is {color}.",
        (
            "{thing} is {color}.",
            "{color} is the color of {thing}.",
            "As for {thing}, its color is {color}.",
        ),
        (
            "What is the color of {thing}?",
            "What color is {thing}?",
            "Name the color of {thing}.",
            "Tell me the color of {thing}.",
        ),
    ),
    Kind(
        "group", "groups", "members",
        "The {group} are {members}.",
        (
            "{members} are the {group}.",
            "Here are the {group}: {members}.",
            "We call {members} the {group}.",
            "Remember the {group}: {members}.",
        ),
        (
            "What are the {group}?",
            "Name the {group}.",
            "List the {group}.",
            "Tell me the {group}.",
        ),
    ),
    Kind(
        "number", "numbers", "total",
        "The number of {count} is {total}.",
        (
            "There are {total} {count}.",
            "{total} is the number of {count}.",
            "Count the {count} and you find {total}.",
        ),
        (
            "How many {count} are there?",
            "What is the number of {count}?",
            "Give the number of {count}.",
            "Tell me the number of {count}.",
        ),
    ),
    Kind(
        "planet", "planets", "planet",
        "The {position} planet from the Sun is {planet}.",
        (
            "{planet} is the {position} planet from the Sun.",
            "Counting from the Sun, the {position} planet is {planet}.",
        ),
        (
            "What is the {position} planet from the Sun?",
            "Name the {position} planet from the Sun.",
            "Which planet is the {position} from the Sun?",
        ),
    ),
    Kind(
        "arithmetic", "arithmetic", "result",
        "{operation} is {result}.",
        (
            "{operation} equals {result}.",
            "{operation} makes {result}.",
            "The result of {operation} is {result}.",
        ),
        (
            "What is {operation}?",
            "Calculate {operation}.",
            "How much is {operation}?",
            "Give the result of {operation}.",
        ),
        ("Calculate the result.", "operation"),
    ),
    Kind(
        "definition", "definitions", "",
        "{a_term} is {definition}.",
        (
            "{a_term} is defined as {definition}.",
            "The word {term} means {definition}.",
            "By {a_term} we mean {definition}.",
        ),
        (
            "What is {a_term}?",
            "Define the word {term}.",
            "Explain what {a_term} is.",
            "What does the word {term} mean?",
        ),
        ("Define the word below.", "term"),
    ),
    Kind(
        "list", "lists", "",
        "{count} different {topic}: {items}.",
        (
            "Here are {count} different {topic}: {items}.",
            "{items} are {count} different {topic}.",
            "{count} {topic}: {items}.",
        ),
        (
            "Create a list of {count} different {topic}",
            "List {count} different {topic}.",
            "Name {count} {topic}.",
            "Give me {count} different {topic}.",
            "Make a list of {count} {topic}.",
        ),
    ),
    Kind(
        "advice", "advice", "",
        "Three tips for {topic}:\n1. {first}.\n2. {second}.\n3. {third}.",
        (
            "Here are three tips for {topic}:\n1. {first}.\n2. {second}.\n3. {third}.",
            "Good advice for {topic}: {first}. {second}. {third}.",
        ),
        (
            "Give three tips for {topic}.",
            "Give me three tips for {topic}.",
            "What are three tips for {topic}?",
            "List three tips for {topic}.",
            "I need advice for {topic}.",
        ),
    ),
    Kind(
        "explanation", "explanations", "",
        "{text}",
        (),
        ("Explain in detail {topic}.", "Describe in a paragraph {topic}."),
    ),
)
