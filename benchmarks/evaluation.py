"""Evaluation in batches, one model, against the document's way: a pipeline call a question, two models."""

import time

from datasets import load_from_disk
from transformers import pipeline

from alpaca_helpers.evaluation import evaluate
from alpaca_helpers.lora import load_adapter
from alpaca_helpers.models import load_tokenizer
from alpaca_helpers.pocket import MODEL
from alpaca_helpers.prompts import encode, format_prompt
from alpaca_helpers.run import Run

from .shared import load_model

MAX_NEW_TOKENS = 80


def measure(run: Run, rows: int) -> dict[str, float | int]:
    """Return the seconds that both ways take for the answers of base and tuned on held-out rows of the pocket's run.

    The batched way is the whole of `evaluation.evaluate`: it also asks the bare question, and computes losses, metrics
    and intervals. `equal` counts the answers, of `2 * rows`, that are the same text of as many tokens.
    """
    heldout = load_from_disk(run.artifact("data"))["heldout"].select(range(rows))
    prompts = [format_prompt(row["instruction"], row["input"]) for row in heldout]
    tokenizer = load_tokenizer(str(MODEL))
    base, tuned = load_model("pocket"), load_adapter(load_model("pocket"), run.artifact("adapter"))
    evaluate(tuned, tokenizer, heldout.select(range(2)), max_new_tokens=2)  # the first call of anything is slow

    started = time.perf_counter()
    _, answers = evaluate(tuned, tokenizer, heldout, MAX_NEW_TOKENS)
    batched = time.perf_counter() - started

    equal, started = 0, time.perf_counter()
    for side, model in (("base", base), ("tuned", tuned)):
        answering = pipeline("text-generation", model=model, tokenizer=tokenizer)
        for prompt, text, tokens in zip(prompts, answers[side], answers[f"{side}_tokens"]):
            (made,) = answering(prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_tensors=True)
            ids = made["generated_token_ids"][len(encode([prompt], tokenizer)[0]) :]
            written = [token for token in ids if token != tokenizer.eos_token_id]
            equal += (tokenizer.decode(written).strip(), len(written)) == (text, tokens)
    singly = time.perf_counter() - started
    return {
        "rows": rows,
        "one_by_one_s": round(singly, 2),
        "batched_s": round(batched, 2),
        "times_faster": round(singly / batched, 1),
        "answers": 2 * rows,
        "equal": equal,
    }
