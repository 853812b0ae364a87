"""How fast a model answers, by how many prompts are decoded together.

Base and tuned model both answer the same real questions. Random weights never stop by themselves, so each answer has
as many tokens as are allowed: the most that it can take.
"""

import time

from alpaca_helpers.generation import generate
from alpaca_helpers.prompts import format_prompt

from . import shared


def measure(name: str, prompts: int, batch_sizes: list[int], max_new_tokens: int) -> list[dict]:
    """Return for each batch size the seconds that base and tuned take, the peak memory, and how many answers differ
    from those of the first batch size.
    """
    rows, tokenizer = shared.load_data(name)
    asked = [format_prompt(row["instruction"], row["input"]) for row in rows.select(range(prompts))]
    model = shared.load_tuned(name).eval()
    generate(model, tokenizer, asked[:2], max_new_tokens=4)  # kernels are loaded
    results, first = [], {}
    for size in batch_sizes:
        result = {"batch_size": size, "differ": 0}
        for side in ("base", "tuned"):
            begun = time.perf_counter()
            said = generate(model, tokenizer, asked, side=side, batch_size=size, max_new_tokens=max_new_tokens)
            result[f"{side}_seconds"] = time.perf_counter() - begun
            result["differ"] += sum(a.ids != b.ids for a, b in zip(first.setdefault(side, said), said))
        result["peak_gb"] = shared.peak_memory()
        print(result, flush=True)
        results.append(result)
    return results
