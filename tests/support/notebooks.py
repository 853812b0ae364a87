"""The notebooks' cells executed in this process, and small rows for them."""

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from alpaca_helpers.cells import notebook_parameters

ENGLISH = [("Name a bird.", "A robin."), ("Name a fish.", "A pike."), ("Say hello.", "Hello!")]


def execute(notebook, parameters):
    """Return the notebook's variables after its last cell, with the parameters set as papermill sets them."""
    namespace = {}
    code = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    for number, source in enumerate(code):
        exec(compile(TransformerManager().transform_cell(source), f"{notebook.name}, cell {number}", "exec"), namespace)
        if not number:
            namespace |= {name: parameters[name] for name in notebook_parameters(notebook) if name in parameters}
    return namespace


def made_of(pairs, times=4, **more):
    """Rows of (instruction, output) pairs, each several times with a number so that the questions differ."""
    return [
        {"instruction": f"{question} {number}" if number else question, "output": answer, **more}
        for number in range(times)
        for question, answer in pairs
    ]
