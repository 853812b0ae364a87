"""Evaluation in batches, one model, against the document's way: a pipeline call a question, two models.

python -m benchmarks.evaluation [RUN]    a finished run's adapter and held-out rows (pocket)
"""

import json
import sys
import time

from datasets import load_from_disk
from transformers import pipeline

from alpaca_helpers import AlpacaError
from alpaca_helpers.evaluation import evaluate
from alpaca_helpers.lora import load_adapter
from alpaca_helpers.models import load_base, load_tokenizer
from alpaca_helpers.prompts import encode, format_prompt
from alpaca_helpers.run import Run


def measure(run: str = "pocket", rows: int = 200, max_new_tokens: int = 80) -> dict[str, float | int]:
    """Return the seconds that both ways take for the answers of base and tuned on up to `rows` held-out rows.

    The batched way is the whole of `evaluation.evaluate`: it also asks the bare question, and computes losses, metrics
    and intervals. `equal` counts the answers, of `2 * rows`, that are the same text of as many tokens.

    Raises AlpacaError if the run has no adapter.
    """
    folder = Run.named(run).folder
    adapter, made_of = Run(folder).artifact("adapter"), Run(folder).record("training")
    heldout = load_from_disk(Run(folder).artifact("data"))["heldout"]
    heldout = heldout.select(range(min(rows, len(heldout))))
    prompts = [format_prompt(row["instruction"], row["input"]) for row in heldout]
    tokenizer = load_tokenizer(made_of["model"], made_of["model_revision"])
    base, tuned = (load_base(made_of["model"], made_of["model_revision"]) for _ in range(2))
    tuned = load_adapter(tuned, adapter)
    evaluate(tuned, tokenizer, heldout.select(range(2)), max_new_tokens=2)  # the first call of anything is slow

    started = time.perf_counter()
    _, answers = evaluate(tuned, tokenizer, heldout, max_new_tokens)
    batched = time.perf_counter() - started

    equal, started = 0, time.perf_counter()
    for side, model in (("base", base), ("tuned", tuned)):
        answering = pipeline("text-generation", model=model, tokenizer=tokenizer)
        for prompt, text, tokens in zip(prompts, answers[side], answers[f"{side}_tokens"]):
            (made,) = answering(prompt, max_new_tokens=max_new_tokens, do_sample=False, return_tensors=True)
            ids = made["generated_token_ids"][len(encode([prompt], tokenizer)[0]) :]
            written = [token for token in ids if token != tokenizer.eos_token_id]
            equal += (tokenizer.decode(written).strip(), len(written)) == (text, tokens)
    singly = time.perf_counter() - started
    return {
        "rows": len(heldout),
        "one_by_one_s": round(singly, 2),
        "batched_s": round(batched, 2),
        "times_faster": round(singly / batched, 1),
        "answers": 2 * len(heldout),
        "equal": equal,
    }


if __name__ == "__main__":
    try:
        print(json.dumps(measure(*sys.argv[1:]), indent=2))
    except AlpacaError as error:
        sys.exit(str(error))
