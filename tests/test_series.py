"""A notebook executed twice or wrongly skipped by the batch, its failures; what authors do with the notebooks."""

import json
import shutil
from unittest.mock import Mock

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from support import contents, refusal
from support.models import with_lora
from support.notebooks import write_notebook
from support.runs import byte_tokenizer, locked_elsewhere, prepare_run, record_adapter, save_adapter, tiny_gpt2

from alpaca_helpers import AlpacaError, models, series
from alpaca_helpers.cells import notebook_parameters
from alpaca_helpers.config import parse_parameters
from alpaca_helpers.files import write_json
from alpaca_helpers.run import Run
from tools import notebooks as authors

FIRST = 'push_to: str = "o/a"  # a word\nrun: str = ""  # the run\nmerged: bool = False  # whether to fail'
SECOND = """from pathlib import Path

folder = Path(run) if "/" in run else Path("runs") / run
open(folder / "seen", "a").write(push_to[-1])
if merged:
    raise ValueError("the bread is burnt")
print(push_to)"""


def execute(notebook, executed, parameters, **options):
    """Stand in for papermill's `execute_notebook`: execute the cells in this process, and write after each."""
    made, names = parameterize_notebook(load_notebook_node(str(notebook)), parameters), {}
    made.metadata["papermill"] = {"duration": 0.0}
    for number, cell in enumerate(made.cells):
        nbformat.write(made, executed)
        cell.metadata["papermill"] = {"duration": 0.0}
        try:
            exec(cell.source, names)
        except BaseException as error:
            kind = type(error).__name__
            raise papermill.PapermillExecutionError(number, number + 1, cell.source, kind, str(error), []) from error
    nbformat.write(made, executed)
    return made


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    paths = [tmp_path / "01_one.ipynb", tmp_path / "02_two.ipynb"]
    for path in paths:
        write_notebook(path, FIRST, SECOND)
    for module in (series, authors):
        monkeypatch.setattr(module, "NOTEBOOKS", paths)
        monkeypatch.setattr(module, "FURTHER", [])
    monkeypatch.setattr(papermill, "execute_notebook", execute)
    return paths


def seen(folder):
    return (folder / "seen").read_text()


@pytest.mark.integration
def test_in_a_real_kernel_it_writes_under_its_lock_and_fails_with_a_sentence(notebooks, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    locked = "from alpaca_helpers.run import Run\nwith Run(folder).lock():\n    print('Note: at it')"
    write_notebook(notebooks[0], FIRST, SECOND.replace("if merged", "if False"), locked)
    with pytest.raises(AlpacaError, match="ValueError: the bread is burnt .cell 3 of .*02_two.ipynb"):
        series.run_series({"run": str(tmp_path / "r"), "push_to": "o/b", "merged": True}, notebooks)
    assert seen(tmp_path / "r") == "bb"
    told = capsys.readouterr().out
    assert told.count("\n    Note: at it\n") == 1 == told.count("the longest cells: ") and " s print('Note" in told
    assert list(Run(tmp_path / "r").manifest()["notebooks"]) == ["01_one"]
    assert "the bread is burnt" in (tmp_path / "r" / "02_two.ipynb").read_text()


LEAVES = """
from alpaca_helpers.files import atomic_folder
from alpaca_helpers.run import Run
with atomic_folder(folder / "adapter") as part:
    (part / "adapter_model.safetensors").write_text("rows")
    (part / "more").mkdir()
    (part / "more" / "words").write_text("whole")
(folder / "adapter" / "README.md").write_text("a card")
with atomic_folder(folder / "merged") as part:
    (part / "model").write_text("whole")
(folder / "pictures").mkdir(exist_ok=True)
(folder / "pictures" / "losses.png").write_text("picture")
Run(folder).write_record("adapter", {"seed": 0})
(folder / "r.gguf").write_text("whole")
Run(folder).write_record("gguf", {"r.gguf": "its hash"})
"""
MEASURES = """
(folder / "adapter" / "README.md").write_text("a card with metrics")
(folder / "metrics.json").write_text("{}")
"""


def edit(notebook, change):
    """Change the notebook's list of cells."""
    content = nbformat.read(notebook, as_version=4)
    change(content.cells)
    nbformat.write(content, notebook)


def test_only_what_changed_or_is_not_as_a_notebook_left_it_is_executed_again(notebooks, tmp_path, monkeypatch, capsys):
    """A changed artifact is made again by the notebook that wrote it last, and by those after it."""
    for notebook, source in zip(notebooks, (LEAVES, MEASURES)):
        write_notebook(
            notebook,
            FIRST + '\nother_run: str = ""\ndataset_name: str = ""\ngguf: bool = False',
            SECOND,
            source,
            "1 + 1",
        )
    monkeypatch.setattr(series, "PRODUCERS", {"adapter": "01_one", "metrics.json": "02_two"})
    folder, other, rows = tmp_path / "r", tmp_path / "other", tmp_path / "rows.json"
    rows.write_text("[1]")
    helper = tmp_path / "alpaca_helpers" / "series.py"
    helper.parent.mkdir()
    helper.write_text("1")
    monkeypatch.setattr(series, "PACKAGE", helper.parent)
    parameters = {"run": str(folder), "push_to": "o/a", "dataset_name": str(rows), "gguf": True}
    executed, pictures, merged = folder / "01_one.ipynb", folder / "pictures", folder / "merged"
    weights, card = (folder / "adapter" / name for name in ("adapter_model.safetensors", "README.md"))

    def train_the_other(std):
        save_adapter(with_lora(tiny_gpt2(), std), byte_tokenizer(), other / "adapter")
        record_adapter(other)

    def forget_the_adapter():
        write_json(folder / "manifest.json", {"notebooks": Run(folder).manifest()["notebooks"]})

    def from_an_early_version():
        Run(folder).write_record("notebooks", {"01_one": ["0", {}], "02_two": None})

    train_the_other(0.5)
    changes = {  # and by a letter of `push_to` for each notebook what is executed then
        "nothing, at first": (lambda: None, "aa"),
        "nothing": (lambda: None, ""),
        "the second notebook": (lambda: edit(notebooks[1], lambda cells: cells[-1].update(source="1")), "a"),
        "a parameter": (lambda: parameters.update(push_to="o/b"), "bb"),
        "it back, when the run was remade since": (lambda: parameters.update(push_to="o/a"), "aa"),
        "other rows under the same name": (lambda: rows.write_text("[2]"), "aa"),
        "the helpers": (lambda: helper.write_text("2"), "aa"),
        "the other run": (lambda: parameters.update(other_run=str(other)), "aa"),
        "its adapter": (lambda: train_the_other(0.2), "aa"),
        "the card, emptied": (lambda: card.write_text(""), "a"),
        "the metrics": ((folder / "metrics.json").unlink, "a"),
        "the merged model": (lambda: shutil.rmtree(merged), "aa"),
        "the pictures": (lambda: shutil.rmtree(pictures), "aa"),
        "a picture, emptied": (lambda: (pictures / "losses.png").write_text(""), "aa"),
        "the merged model, cut": (lambda: (merged / "model").write_text("w"), "aa"),
        "the model for llama.cpp": ((folder / "r.gguf").unlink, "aa"),
        "a weight": (lambda: weights.write_text("rwos"), "aa"),
        "the weights": (weights.unlink, "aa"),
        "a folder of the adapter": (lambda: shutil.rmtree(weights.with_name("more")), "aa"),
        "the manifest's record": (forget_the_adapter, "aa"),
        "an executed notebook": ((folder / "02_two.ipynb").unlink, "a"),
        "a truncated notebook": (lambda: executed.write_bytes(executed.read_bytes()[:-50]), "aa"),
        "a notebook with a cell less": (lambda: edit(executed, lambda cells: cells.__delitem__(slice(2))), "aa"),
        "a space in a cell": (lambda: edit(notebooks[0], lambda cells: cells[-1].update(source="1 + 1 ")), "aa"),
        "a cell's type": (lambda: edit(notebooks[0], lambda cells: cells[-1].update(cell_type="raw")), "aa"),
        "the model for llama.cpp, no longer asked for": (lambda: parameters.update(gguf=False), "aa"),
        "it, made again by a command": (lambda: (folder / "r.gguf").write_text("new"), ""),
        "a file of the reader's own": (lambda: (folder / "thesis.txt").write_text("mine"), ""),
        "a cell of the reader's own": (lambda: edit(executed, lambda cells: cells.append(new_markdown_cell("me"))), ""),
        "an early version's marks": (from_an_early_version, "aa"),
        "nothing, at last": (lambda: None, ""),
    }
    before = ""
    for what, (change, again) in changes.items():
        change()
        assert series.run_series(parameters) == folder
        assert seen(folder) == before + again, what
        assert capsys.readouterr().out.count(": unchanged") == 2 - len(again), what
        assert (weights.read_text(), card.read_text()) == ("rows", "a card with metrics"), what
        before += again
    assert (folder / "thesis.txt").read_text() == "mine"


def test_an_executed_notebook_that_the_reader_changed_is_kept(notebooks, tmp_path, capsys):
    parameters = {"run": str(tmp_path / "r")}
    executed = series.run_series(parameters) / "01_one.ipynb"
    for number, solution in enumerate(("x = 1", "x = 2"), 1):
        edit(executed, lambda cells, source=solution: cells.append(new_code_cell(source)))
        parameters["push_to"] = f"o/{number}"
        series.run_series(parameters)
        kept = executed.with_name(f"01_one-changed-{number}.ipynb")
        assert nbformat.read(kept, as_version=4).cells[-1].source == solution
        assert f"is kept as {kept.name}" in capsys.readouterr().out
    write_notebook(notebooks[0], FIRST, "1 / 0", "1")  # of a newer version, and it fails
    for _ in range(2):
        refusal(series.run_series, parameters)
    assert len(list(executed.parent.glob("*.ipynb"))) == 4 and "is kept" not in capsys.readouterr().out


def test_notebooks_changed_while_they_are_refreshed_stay(notebooks, tmp_path, monkeypatch):
    def run(parameters, which):
        write_notebook(notebooks[1], FIRST, "mine")
        return tmp_path

    monkeypatch.setattr(authors, "run_series", run)
    with pytest.raises(AlpacaError, match="02_two.ipynb was changed while"):
        authors.refresh()
    assert nbformat.read(notebooks[1], as_version=4).cells[1].source == "mine"


def test_a_killed_kernel_is_one_sentence(notebooks, tmp_path, monkeypatch):
    died = type("DeadKernelError", (RuntimeError,), {})("Kernel died")  # as nbclient names it
    monkeypatch.setattr(papermill, "execute_notebook", Mock(side_effect=died))
    assert "01_one.ipynb was killed" in refusal(series.run_series, {"run": str(tmp_path / "r")})


def opened(run, **values):
    """Return the settings of notebook 04 on a run, as its first cells have them."""
    given = {"profile": "pocket", "run": str(run), "other_run": "", "max_new_tokens": 8, "run_earlier": False}
    return series.open_run("04_comparison_and_chat", given | values)[0]


def finish(folder, model=None, **changes):
    """Make a finished run on a tiny base model."""
    prepare_run(folder)
    save_adapter(with_lora(tiny_gpt2(**changes)), byte_tokenizer(), folder / "adapter")
    made = Run(folder).record("data")
    record_adapter(folder, model=model or made["model"], fingerprint=made["fingerprint"])


def test_the_other_run_is_looked_at_before_anything_is_computed(tmp_path):
    for name, changes in (("a", {}), ("b", {}), ("c", {"initializer_range": 0.3})):
        finish(tmp_path / name, **changes)
    for other, phrase in (("c", "another base model"), ("nowhere", "run notebook")):
        said = refusal(opened, tmp_path / "a", other_run=str(tmp_path / other))
        assert phrase in said and str(tmp_path / other) in said
    said = refusal(series.run_series, {"run": str(tmp_path / "new"), "other_run": str(tmp_path / "nowhere")})
    assert "run notebook" in said and not list((tmp_path / "new").glob("*.ipynb"))
    assert opened(tmp_path / "a", other_run=str(tmp_path / "b")).other_run == tmp_path / "b"


def test_the_commit_of_a_model_on_the_hub_is_recorded_and_another_is_noticed(tmp_path, monkeypatch):
    """Of one whose revision nobody named."""
    finish(tmp_path / "a", model="owner/name")
    for commit in ("1111", "2222"):
        shutil.copytree(tmp_path / "a" / "base", tmp_path / "snapshots" / commit)
    newest, snapshots = ["1111"], tmp_path / "snapshots"
    monkeypatch.setattr(models, "cached_folder", lambda _, commit, *rest: snapshots / (commit or newest[0]))
    given = {"profile": "pocket", "run": str(tmp_path / "b"), "model_name": "owner/name", "max_new_tokens": 8}
    settings, _ = series.open_run("01_base_model", given)
    assert (settings.model, settings.model_revision) == ("owner/name", "1111")
    record = Run(tmp_path / "a").record("adapter")
    del record["model_revision"]  # as an early version wrote it
    Run(tmp_path / "a").write_record("adapter", record)
    assert opened(tmp_path / "a").model_revision == "1111"

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    write_notebook(tmp_path / "one.ipynb", FIRST + "\nmodel_name: str = None", SECOND)
    for commit, times in (("1111", 1), ("1111", 1), ("2222", 2)):
        newest[0] = commit
        parameters = {"run": str(tmp_path / "c"), "model_name": "owner/name"}
        assert len(seen(series.run_series(parameters, [tmp_path / "one.ipynb"]))) == times


def test_a_failed_cell_is_not_done_and_its_fault_is_a_sentence(notebooks, tmp_path):
    folder, parameters = tmp_path / "r", {"run": str(tmp_path / "r")}
    for source, done in {
        "import shutil; shutil.rmtree(run); open(run + '/x')": None,
        "print(1, file=open('/dev/full', 'w', buffering=1))": ["01_one"],
        "raise ValueError('burnt')": ["01_one"],
    }.items():
        write_notebook(notebooks[1], FIRST, source, "1")
        said = refusal(series.run_series, parameters)
        assert "[cell " in said and str(folder) in said
        assert done is None or list(Run(folder).manifest()["notebooks"]) == done
    write_notebook(notebooks[1], FIRST, "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        series.run_series(parameters)
    write_notebook(notebooks[1], FIRST, SECOND)
    assert seen(series.run_series(parameters)) == "aa"
    write_notebook(notebooks[0], FIRST, "1 / 0")
    refusal(series.run_series, parameters)
    assert Run(folder).manifest()["notebooks"] == {}  # nor the one that rests on it


@pytest.mark.integration
def test_a_second_series_on_the_run_is_refused_before_it_touches_anything(notebooks, tmp_path):
    folder = series.run_series({"run": str(tmp_path / "r")})
    before = contents(folder)
    with locked_elsewhere(folder):
        said = refusal(series.run_series, {"run": str(folder), "push_to": "o/b"})
    assert f"Another process is writing to the run {folder}" in said and contents(folder) == before


def test_a_bad_parameter_is_refused_before_anything_is_made_and_the_command_lines_values_are_read(notebooks, tmp_path):
    phrases = {"wrod": "The parameter `wrod`", "seed": "The parameter `seed`", "lora_rank": "take no lora_rank"}
    for name, phrase in phrases.items():
        value = 4 if name == "lora_rank" else "x"  # a good one, that neither of the two takes
        assert phrase in refusal(series.run_series, {"run": str(tmp_path / "r"), name: value})
        assert not (tmp_path / "r").exists()
    given = {"3": ["3"], '["a", "b"]': ["a", "b"], "None": None, "null": None, "[a": ["[a"]}
    for text, value in given.items():
        assert parse_parameters([("target_modules", text)], run=5) == {"run": "5", "target_modules": value}


def test_a_parameter_given_twice_on_the_command_line_is_refused_unless_it_is_the_same(monkeypatch):
    taken = []
    monkeypatch.setattr(series, "run_series", lambda parameters, notebooks: taken.append(parameters))
    command = ["series", "--further", "--run", "mine"]
    for more in ("-p run null", "-p run other", "-p seed 1 -p seed 2", "--profile pocket -p profile gpt2-medium"):
        monkeypatch.setattr("sys.argv", [*command, *more.split()])
        with pytest.raises(AlpacaError, match="`(run|seed|profile)` is given twice"):
            series.main()
        assert not taken
    for more in ("-p run mine -p seed 1", "--profile auto -p profile pocket -p seed 1 -p seed 1"):
        monkeypatch.setattr("sys.argv", [*command, *more.split()])
        series.main()
        assert (taken[-1]["run"], taken.pop()["seed"]) == ("mine", 1)


def test_a_parameter_is_known_whatever_its_annotation_and_its_value(notebooks, tmp_path):
    """papermill reads such lines one by one, and misses some: the batch then left `run` out."""
    lines = """from typing import Literal, Optional
recipe: Literal["a", "b"] = "a"
model_name: str | None = None  # a = b
run: Optional[str] = ""
push_to: str = "o/a=b"
seed = 1
max_words: int = (
    80
)"""
    write_notebook(notebooks[0], lines, SECOND.replace("merged", "False"))
    names = ["recipe", "model_name", "run", "push_to", "max_words", "seed"]
    assert sorted(notebook_parameters(notebooks[0])) == sorted(names)
    folder = series.run_series({"run": str(tmp_path / "r"), "push_to": "o/b", "max_words": 3}, notebooks[:1])
    assert folder == tmp_path / "r" and seen(folder) == "b"


def test_the_run_has_one_name_for_batch_and_notebooks(notebooks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run, name in (("", "pocket"), (None, "pocket"), (0, "0"), ("mine", "mine")):
        folder = series.run_series({"run": run, "profile": "pocket"})
        assert folder == tmp_path / "runs" / name and seen(folder) == "aa"
        assert {path.name for path in folder.glob("*.ipynb")} == {"01_one.ipynb", "02_two.ipynb"}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"pocket", "0", "mine"}


def test_what_an_earlier_notebook_makes_is_made_once_where_it_is_missing(notebooks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(series, "PRODUCERS", {"seen": "01_one", "later": "03_three"})
    folder = tmp_path / "r"
    series.run_earlier_notebooks([], "pocket", str(folder))
    assert not (folder / "seen").exists() and capsys.readouterr().out == ""
    for _ in range(2):
        series.run_earlier_notebooks(["seen"], "pocket", str(folder))
    assert seen(folder) == "a" and not (folder / "02_two.ipynb").exists()
    told = capsys.readouterr().out
    assert told.startswith(f"The run {folder} has no seen: running 01_one first.")
    assert told.count("running") == 1


def test_a_broken_notebook_or_one_without_parameters_is_a_sentence(notebooks, tmp_path):
    typo = json.dumps({"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "seed = ("}]})
    for content in ("", "{", '{"cells": 3}', '{"cells": [], "metadata": {}, "nbformat": 4}', "[" * 100_000, typo):
        notebooks[0].write_text(content)
        said = refusal(series.run_series, {"run": str(tmp_path / "r")})
        assert "01_one.ipynb" in said and "take it from the project again" in said


def test_clean_drops_what_belongs_to_one_execution():
    cell = new_code_cell("1", execution_count=7, metadata={"tags": ["x"], "papermill": {"duration": 1}})
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "0"}, "text/plain": "0%"}
    cell.outputs = [
        new_output("stream", name="stderr", text="50%"),
        *(new_output("stream", name="stdout", text=text) for text in ("a ", "line\n")),
        new_output("display_data", data=widget),
        new_output("stream", name="stdout", text="more\n"),
        new_output("execute_result", data={"text/plain": "1"}, execution_count=7),
    ]
    injected = new_code_cell("run = '/x'", metadata={"tags": ["injected-parameters"]})
    notebook = new_notebook(cells=[injected, cell], metadata={"widgets": {}, "papermill": {}, "accelerator": "GPU"})
    cleaned = authors.clean(notebook)
    assert [(c.source, c.metadata) for c in cleaned.cells] == [("1", {"tags": ["x"]})]
    printed, result = cleaned.cells[0].outputs
    assert (printed.text, result.output_type, result.execution_count) == ("a line\nmore\n", "execute_result", 1)
    assert cleaned.metadata == {"accelerator": "GPU", "language_info": {"name": "python", "file_extension": ".py"}}


def test_copies_for_nbval_have_parameters_and_of_another_profile_independent_cells_alone(notebooks, tmp_path):
    tagged = {"2 + 2": "every-profile", "3 + 3": "nbval-ignore-output"}
    more = [new_code_cell(source, metadata={"tags": [tag]}) for source, tag in tagged.items()]
    edit(notebooks[0], lambda cells: cells[1].update(outputs=[new_output("stream", text="a\n")]))
    edit(notebooks[0], lambda cells: cells.extend(more))
    for profile, compared in {"pocket": [SECOND, "2 + 2"], "gpt2-medium": ["2 + 2"]}.items():
        authors.write_for_nbval(tmp_path / "copies", {"push_to": "b", "run": "r", "profile": profile})
        parameters, *cells = nbformat.read(tmp_path / "copies" / "01_one.ipynb", as_version=4).cells[1:]
        assert parameters.metadata.tags[0] == "injected-parameters" and 'push_to = "b"' in parameters.source
        assert cells[0].outputs[0].text == "a\n" and cells[-1].metadata.tags == ["nbval-ignore-output"]
        assert [cell.source for cell in cells if "nbval-ignore-output" not in cell.metadata.tags] == compared


def test_copies_for_nbval_replace_copies_alone(notebooks, tmp_path):
    solved, empty = tmp_path / "solved", tmp_path / "empty"
    (solved / "run").mkdir(parents=True)
    for name in ("01_one.ipynb", "run/thesis.txt"):
        (solved / name).write_text("mine")
    empty.mkdir()
    parameters = {"run": "r", "profile": "pocket"}
    for folder in (solved, series.NOTEBOOKS[0].parent):
        before = contents(tmp_path)
        with pytest.raises(AlpacaError, match=f"{folder}.* is in the way"):
            authors.write_for_nbval(folder, parameters)
        assert contents(tmp_path) == before
    authors.write_for_nbval(empty, parameters)
    assert {path.name for path in empty.glob("*.ipynb")} == {path.name for path in notebooks}


@pytest.mark.parametrize("which", [0, 1])
def test_cells_saved_without_ids_get_them_back_or_nothing_is_rewritten(which, tmp_path, monkeypatch):
    """A notebook of two cells and its French edition, one of them as an editor of nbformat 4.4 saves it."""
    (tmp_path / "fr").mkdir()
    editions = {tmp_path / "01_one.ipynb": "A word", tmp_path / "fr" / "01_one.ipynb": "Un mot"}
    monkeypatch.setattr(authors, "NOTEBOOKS", list(editions)[:1])
    monkeypatch.setattr(authors, "FURTHER", [])
    for path, prose in editions.items():
        cells = [new_markdown_cell(prose, id="a"), new_code_cell("1 + 1", id="b", metadata={"tags": []})]
        nbformat.write(new_notebook(cells=cells), path)
    damaged = list(editions)[which]
    saved = json.loads(damaged.read_text()) | {"nbformat_minor": 4}
    for cell in saved["cells"]:
        del cell["id"]
    damaged.write_text(json.dumps(saved | {"cells": saved["cells"][:1]}))
    before = contents(tmp_path)
    with pytest.raises(AlpacaError, match=f"{damaged.name}.*an editor that keeps ids"):
        authors.clean_all()
    assert contents(tmp_path) == before
    damaged.write_text(json.dumps(saved))
    authors.clean_all()
    for path, prose in editions.items():
        cells = nbformat.read(path, as_version=4).cells
        assert [(cell.id, cell.source) for cell in cells] == [("a", prose), ("b", "1 + 1")]
    edit(list(editions)[1], lambda cells: cells.append(new_markdown_cell("Un mot de plus", id="c")))
    before = contents(tmp_path)
    with pytest.raises(AlpacaError, match="fr/01_one.ipynb has a cell of prose, c, "):
        authors.clean_all()
    assert contents(tmp_path) == before
