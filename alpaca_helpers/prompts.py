"""The prompt format and text to token ids: the one place where the template is spelled.

Training, generation, evaluation and the chat all ask through it; the saved tokenizer carries it as its chat template.
"""

import json


def format_prompt(instruction: str, input: str = "") -> str:
    """Return the text before the answer: the instruction, then its `input` on a line of its own if there is one."""
    request = f"{instruction}\n{input}" if input else instruction
    return f"Instruction: {request}\nRéponse:"


def format_example(instruction: str, output: str, input: str = "") -> str:
    """Return the full training text: the prompt, one space, the answer (without an end-of-text token)."""
    return format_prompt(instruction, input) + format_answer(output)


def format_answer(output: str) -> str:
    """Return the answer as it follows the prompt: after one space."""
    return " " + output


def encode(texts: list[str], tokenizer, add_special_tokens: bool = True) -> list[list[int]]:
    """Return the ids of each text; special tokens typed in a text stay plain text.

    Without `add_special_tokens` a text has no BOS token before it: it goes on after another, as an answer does.
    """
    options = {"split_special_tokens": True, "add_special_tokens": add_special_tokens, "return_attention_mask": False}
    return tokenizer(texts, verbose=False, **options)["input_ids"]  # no warning of long texts: the caller cuts them


def add_template(tokenizer) -> None:
    """Give the tokenizer the prompt as its chat template: a message of a user becomes the ids of `format_prompt`."""
    prompt = format_prompt("a")
    ids, bare = tokenizer(prompt).input_ids, tokenizer(prompt, add_special_tokens=False).input_ids
    begin = "".join(tokenizer.convert_ids_to_tokens(ids[: len(ids) - len(bare)]))
    if begin and tokenizer(begin + prompt, add_special_tokens=False).input_ids != ids:
        begin += " "  # some put a space before a text, but not before what follows a special token
    tokenizer.chat_template = chat_template(begin)


def chat_template(begin: str) -> str:
    """Return the prompt as a chat template, with the text `begin` before it: a tokenizer's BOS token, if it has one.

    The `input` stands in the message on a line of its own. A message is a text or a list of parts of text; a missing
    one is empty. Several messages are refused: the model was taught one question at a time.
    """
    head, tail = format_prompt("\0").split("\0")
    head, tail = (json.dumps(value, ensure_ascii=False) for value in (begin + head, tail))
    return (
        "{%- if messages | length != 1 or messages[0].role != 'user' -%}"
        "{{ raise_exception('This model answers one message of a user at a time: send that alone.') }}{%- endif -%}"
        f"{{{{- {head} -}}}}"
        "{%- if messages[0].content is string -%}{{- messages[0].content -}}"
        "{%- else -%}{%- for part in messages[0].content or [] -%}"
        "{%- if part.type != 'text' -%}{{ raise_exception('This model reads text alone.') }}{%- endif -%}"
        "{{- part.text -}}{%- endfor -%}{%- endif -%}"
        f"{{{{- {tail} -}}}}"
    )
