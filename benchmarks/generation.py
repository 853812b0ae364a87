"""How fast a model answers, by how many prompts are decoded together: `python -m benchmarks.generation --help`.

Base and tuned model both answer the same real questions. Random weights never stop by themselves, so each answer has
as many tokens as are allowed: the most that it can take.
"""

import argparse
import json
import time
from pathlib import Path

from alpaca_helpers.generation import generate
from alpaca_helpers.prompts import format_prompt
from benchmarks import bench


def measure(name: str, prompts: int, batch_sizes: list[int], max_new_tokens: int) -> list[dict]:
    """Return for each batch size the seconds that base and tuned take, the peak memory, and how many answers differ
    from those of the first batch size.
    """
    rows, tokenizer = bench.load_data(name)
    asked = [format_prompt(row["instruction"], row["input"]) for row in rows.select(range(prompts))]
    model = bench.load_tuned(name).eval()
    generate(model, tokenizer, asked[:2], max_new_tokens=4)  # kernels are loaded
    results, first = [], {}
    for size in batch_sizes:
        result = {"batch_size": size, "differ": 0}
        for side in ("base", "tuned"):
            begun = time.perf_counter()
            said = generate(model, tokenizer, asked, side=side, batch_size=size, max_new_tokens=max_new_tokens)
            result[f"{side}_seconds"] = time.perf_counter() - begun
            result["differ"] += sum(a.ids != b.ids for a, b in zip(first.setdefault(side, said), said))
        result["peak_gb"] = bench.peak_memory()
        print(result, flush=True)
        results.append(result)
    return results


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2-medium", choices=["pocket", *bench.SHAPES])
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 128, 300])
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = measure(options.model, options.prompts, options.batch_sizes, options.max_new_tokens)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
