"""The prompt format, its inverse, and text to token ids: the one place where the template is spelled.

Training, generation, evaluation and the chat box all come through here, so that the prompt
a user types into can never drift from the one the adapter was trained on.
"""


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


def parse_answer(continuation: str) -> str:
    """Return the answer in what follows a prompt: the inverse of `format_answer`.

    A prompt is cut off by its length, never searched for: a user may type the template's own words.
    """
    return continuation.removeprefix(" ")


def encode(texts: list[str], tokenizer) -> list[list[int]]:
    """Return the ids of each text; special tokens typed in a text stay plain text."""
    # not verbose: that a text is longer than the model's positions is seen to by whoever cuts it
    quiet = {"return_attention_mask": False, "verbose": False}
    ids = tokenizer(texts, split_special_tokens=True, add_special_tokens=False, **quiet)
    return ids["input_ids"]
