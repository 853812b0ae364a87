"""Small rows, for the notebooks and for batches; small notebooks."""

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

ENGLISH = [("Name a bird.", "A robin."), ("Name a fish.", "A pike."), ("Say hello.", "Hello!")]


def made_of(pairs, times=4, **more):
    """Rows of (instruction, output) pairs, each several times with a number so that the questions differ."""
    return [
        {"instruction": f"{question} {number}" if number else question, "output": answer, **more}
        for number in range(times)
        for question, answer in pairs
    ]


def write_notebook(path: Path, *sources: str) -> None:
    """Write a notebook of code cells, the first of which has the parameters."""
    cells = [new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
