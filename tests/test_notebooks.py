"""The notebooks: what is stored in them is clean and true, and they run through on any rows and any model."""

import ast
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import nbformat
import pytest
from datasets import load_from_disk
from IPython.core.inputtransformer2 import TransformerManager
from matplotlib import pyplot as plt
from nbclient import NotebookClient
from safetensors.torch import load_file
from support import PROJECT
from support.models import save
from support.notebooks import ENGLISH, made_of

from alpaca_helpers import AlpacaError, training
from alpaca_helpers.cells import FURTHER, NAMES, NOTEBOOKS, notebook_parameters
from alpaca_helpers.lora import WEIGHTS
from alpaca_helpers.report import conclusion
from alpaca_helpers.run import Run

IGNORED = "nbval-ignore-output"
LOCAL_PATH = re.compile(r"(?<![\w.:/])/(home|root|tmp|Users|content|work|mnt)/|(?<![A-Za-z])[A-Z]:\\")
SHORT = {"profile": "pocket", "num_train_epochs": 2, "max_new_tokens": 12, "max_heldout_rows": 6, "batch_size": 4}


# What is stored


@pytest.fixture(params=[*NOTEBOOKS, *FURTHER], ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def cells(path: Path, kind: str = "code") -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def in_french(path: Path) -> Path:
    return PROJECT / "notebooks" / "fr" / path.relative_to(PROJECT / "notebooks")


@pytest.mark.parametrize(
    "loaded, absent, repo_url, wanted",
    [
        (["google.colab"], "", "", ["pip uninstall --quiet --yes torchao"]),
        (["google.colab", "peft"], "", "", "restart the session"),  # peft has found torchao already
        (["google.colab"], "torchao", "", []),
        ([], "", "", []),  # a reader's own torchao stays
        (["peft"], "torchao", "", []),
        (["google.colab"], "alpaca_helpers", "https://a/b", ["pip uninstall", 'pip install --quiet "git+https://a/b"']),
        (["google.colab"], "alpaca_helpers", "", "set repo_url"),
        (["peft"], "alpaca_helpers", "https://a/b", "restart the session"),
    ],
)
def test_the_opening_cell_changes_libraries_on_colab_alone_and_no_loaded_ones(path, loaded, absent, repo_url, wanted):
    """What is loaded stays as it was until the session is restarted, whatever pip does."""
    calls = []
    shell = SimpleNamespace(run_line_magic=lambda *words: calls.append(" ".join(words).format(repo_url=repo_url)))
    names = {"repo_url": repo_url, "get_ipython": lambda: shell, "sys": SimpleNamespace(modules=loaded)}
    names["importlib"] = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name != absent))
    source = TransformerManager().transform_cell(cells(path)[1].source).replace("import ", "# import ")
    if isinstance(wanted, str):
        with pytest.raises(AssertionError, match=wanted):
            exec(source, names)
    else:
        exec(source, names)
        assert len(calls) == len(wanted) and all(map(str.startswith, calls, wanted))


def test_the_parts_are_the_documents():
    headings = {"01": ["1."], "02": ["2.", "2.1", "2.2"], "03": ["3.", "3.1", "3.2", "3.3"]}
    headings["04"] = ["4.", "4.1", "4.2", "4.3"]
    for path in NOTEBOOKS:
        text = "\n".join(cell.source for cell in cells(path, "markdown"))
        assert re.findall(r"^#+ (\d[\d.]*)", text, re.M) == headings[path.stem[:2]]


def test_the_parameters_are_one_flat_typed_cell_before_all_other_code(path):
    first, *others = cells(path)
    assert "parameters" in tags(first) and not any("parameters" in tags(cell) for cell in others)
    lines = first.source.splitlines()
    for line, node in zip(lines, ast.parse(first.source).body, strict=True):
        assert isinstance(node, ast.AnnAssign) and "  # " in line
        ast.literal_eval(node.value)
    assert notebook_parameters(path) == [line.partition(":")[0] for line in lines]


def test_a_checked_cell_has_a_stored_output_or_it_would_pass_whatever_it_does(path):
    checked = [cell for cell in cells(path)[1:] if IGNORED not in tags(cell)]
    assert len(checked) >= 3 and [cell.source for cell in checked if not cell.outputs] == []


def test_stored_outputs_hold_no_error_no_machine_and_nothing_of_one_execution(path):
    for count, cell in enumerate(cells(path), 1):
        assert cell.execution_count == count
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
            data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
            assert "application/vnd.jupyter.widget-view+json" not in data
            assert not LOCAL_PATH.search(json.dumps([output.get("text"), data]))


def test_a_numbered_notebook_stays_a_first_reading(path):
    lines = [len([line for line in cell.source.splitlines() if line.strip()]) for cell in cells(path)[1:]]
    assert len(nbformat.read(path, as_version=4).cells) <= 40
    assert max(lines) <= 17 and sorted(lines)[len(lines) // 2] <= 6


CALLS = {  # of the document, by notebook: what a cell calls, and how it is told what to do
    "01": "AutoTokenizer.from_pretrained AutoModelForCausalLM.from_pretrained base_model.eval base_model.to "
    "pipeline(model,tokenizer,device) generator(max_new_tokens)",
    "02": "load_dataset dataset.filter AutoTokenizer.from_pretrained tokenizer(truncation,max_length,padding) "
    "DataCollatorForLanguageModeling(tokenizer,mlm) split.map",
    "03": "AutoModelForCausalLM.from_pretrained get_peft_model TrainingArguments(output_dir,num_train_epochs,fp16) "
    "LoraConfig(r,lora_alpha,target_modules,lora_dropout,bias,task_type) trainer.train model.save_pretrained "
    "DataCollatorForLanguageModeling(tokenizer,mlm) Trainer(model,args,train_dataset,data_collator) "
    "tokenizer.save_pretrained PeftModel.from_pretrained",
    "04": "AutoTokenizer.from_pretrained AutoModelForCausalLM.from_pretrained PeftModel.from_pretrained "
    "pipeline(model,tokenizer,device) pipe(max_new_tokens,temperature,top_p,top_k,eos_token_id) pipe_base ChatBox",
}


@pytest.mark.parametrize("name", NAMES)
def test_each_call_of_the_document_is_typed_in_a_cell(name):
    code = [re.sub(r"^( *)%.*$", r"\1pass", cell.source, flags=re.M) for cell in cells(NOTEBOOKS[NAMES.index(name)])]
    calls = [node for source in code for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    typed = [(ast.unparse(call.func), {word.arg for word in call.keywords}) for call in calls]
    for wanted in CALLS[name[:2]].split():
        called, _, words = wanted.rstrip(")").partition("(")
        assert any(called == how and set(filter(None, words.split(","))) <= given for how, given in typed), wanted


def test_the_french_edition_differs_in_its_prose_alone(path):
    french, english = (nbformat.read(each, as_version=4) for each in (in_french(path), path))
    assert [cell.id for cell in french.cells] == [cell.id for cell in english.cells]
    for cell, other in zip(french.cells, english.cells):
        if cell.cell_type == "code":
            assert cell == other, cell.id
        else:
            assert cell.source != other.source or cell.source.startswith("<"), f"{cell.id} is still in English"
            code, formulas = re.compile(r"```.*?```|</?\w+>", re.DOTALL), re.compile(r"\$[^$]+\$")
            assert code.findall(cell.source) == code.findall(other.source), cell.id
            assert sorted(formulas.findall(cell.source)) == sorted(formulas.findall(other.source)), cell.id


@pytest.mark.parametrize("edition", [lambda path: path, in_french], ids=["english", "french"])
def test_each_link_of_a_notebook_leads_to_a_file(path, edition):
    text = edition(path).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text)
    assert [link for link in links if not (edition(path).parent / link).is_file()] == []


def test_the_template_is_spelled_in_one_module():
    modules = (PROJECT / "alpaca_helpers").rglob("*.py")
    assert [path.name for path in modules if "\\nRéponse:" in path.read_text("utf-8")] == ["prompts.py"]


def test_the_stored_outputs_bear_out_what_the_prose_says_of_the_pocket():
    outputs = {cell.id: json.dumps(cell.outputs, ensure_ascii=False) for path in NOTEBOOKS for cell in cells(path)}
    claims = {
        "01-25": "as a statement: True | as an instruction: False",
        "02-09": "Tell me who wrote this",
        "02-15": "held out; in both: 0",
        "02-20": r"'<|endoftext|>'  before     0  after  -100",
        "02-31": "it adds up: True",
        "04-32": "tuned: ['ended by itself', 'ended by itself']",
    }
    assert [id for id, claim in claims.items() if claim not in outputs[id]] == []
    (table,) = (cell.outputs[0].data["text/plain"] for cell in cells(NOTEBOOKS[3]) if cell.id == "04-26")
    shares = {line.split("  ")[0]: re.findall(r"\d+\.\d+", line) for line in table.splitlines()[1:]}
    base, ours, document = (shares[name] for name in ("base", "tuned, recipe answers", "tuned, run document"))
    assert float(base[0]) < 0.1 and min(float(document[0]), float(ours[0])) > 0.9
    assert [float(stops) for _, stops, *_ in (base, document, ours)] == [0, 0, 1]


# Any rows, any model


@pytest.fixture
def run_notebooks(tmp_path, monkeypatch):
    """Executes notebooks in this process, on rows; returns the run's folder."""
    monkeypatch.chdir(PROJECT)
    matplotlib.use("agg")

    def run(notebooks, rows=None, **parameters):
        if rows is not None:
            (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
            parameters["dataset_name"] = str(tmp_path / "rows.json")
        given = SHORT | parameters | {"run": str(tmp_path / "run")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for notebook in notebooks:
                names: dict = {}
                for number, cell in enumerate(cells(notebook)):
                    source = TransformerManager().transform_cell(cell.source)
                    exec(compile(source, f"{notebook.name}, code cell {number}", "exec"), names)
                    if not number:  # as papermill sets them
                        names |= {name: given[name] for name in notebook_parameters(notebook) if name in given}
                plt.close("all")
        return tmp_path / "run"

    return run


IN_INPUT = [{"instruction": "", "input": question, "output": answer} for question, answer in ENGLISH * 2]
CHINESE = made_of([("中国的首都是哪里？", "北京是中国的首都。"), ("说出一种水果。", "苹果。")], input="请回答")
THROUGH_ALL = {  # the type of the model, the rows
    "two rows": ("pocket", made_of(ENGLISH, 1)[:2]),
    "llama": ("llama", made_of(ENGLISH, 4)),
    "qwen3, Chinese": ("qwen3", CHINESE),
    "opt, questions in input": ("opt", IN_INPUT),
}


@pytest.mark.integration
@pytest.mark.parametrize("kind, rows", THROUGH_ALL.values(), ids=THROUGH_ALL)
def test_all_notebooks_run_on_any_rows_and_any_model(kind, rows, run_notebooks, tmp_path, capsys):
    model = {} if kind == "pocket" else {"model_name": str(save(kind, tmp_path / "base"))}
    folder = run_notebooks([*NOTEBOOKS, *FURTHER], rows, merged=True, **model)
    said = capsys.readouterr().out
    for check in ("the same as by hand", "same output as the base", "the same loss as Trainer's", "it adds up"):
        assert f"{check}: True" in said and f"{check}: False" not in said
    assert "adapter off is the base model: True" in said
    assert "changed by training: True\nthe same after loading: True" in said and "in both: 0" in said
    metrics = Run(folder).metrics()
    assert metrics["n"] >= 1 and metrics["tuned"]["answer_loss"] > 0 and conclusion(metrics) in said
    assert (folder / "merged" / "model.safetensors").exists()

    run_notebooks(NOTEBOOKS[2:3])
    assert "This training is finished" in capsys.readouterr().out
    adapter = load_file(folder / "adapter" / WEIGHTS)
    training.finetune(folder, resume=False, num_train_epochs=2, batch_size=4)  # what torchrun calls
    again = load_file(folder / "adapter" / WEIGHTS)
    assert adapter.keys() == again.keys() and all(adapter[name].equal(again[name]) for name in adapter)


ODD_ROWS = {
    "no input": made_of(ENGLISH, 8),
    "empty input": made_of(ENGLISH, input=""),
    "five": made_of(ENGLISH, 2)[:5],
    "Arabic": made_of([("ما هي عاصمة مصر؟", "عاصمة مصر هي القاهرة."), ("اذكر فاكهة", "تفاح")]),
    "Vietnamese": made_of([("Thủ đô của Việt Nam là gì?", "Thủ đô là Hà Nội."), ("Kể tên một loại quả.", "Quả táo.")]),
    "Hindi": made_of([("भारत की राजधानी क्या है?", "भारत की राजधानी नई दिल्ली है।"), ("एक फल का नाम बताओ।", "सेब।")]),
    "one long": [*made_of(ENGLISH), {"instruction": "Go on.", "input": "", "output": "word " * 100}],
}


@pytest.mark.parametrize("rows", ODD_ROWS.values(), ids=ODD_ROWS)
def test_odd_rows_become_data(rows, run_notebooks, capsys):
    folder = run_notebooks(NOTEBOOKS[1:2], rows)
    data = load_from_disk(folder / "data")
    too_long = sum(len(row["output"].split()) > 80 for row in rows)
    assert len(data["train"]) + len(data["heldout"]) == len(rows) - too_long and len(data["heldout"])
    assert "it adds up: True" in capsys.readouterr().out and not list(folder.rglob("cache-*.arrow"))


NOTHING_LEFT = {
    "one question": [{"instruction": "Who?", "output": f"{n}."} for n in range(9)],
    "one row": made_of(ENGLISH, 1)[:1],
    "no room": [{"instruction": f"{n} " + "word " * 400, "output": "A."} for n in range(9)],
    "all too long": [{"instruction": f"{n}", "output": "word " * 100} for n in range(9)],
}


@pytest.mark.parametrize("rows", NOTHING_LEFT.values(), ids=NOTHING_LEFT)
def test_rows_that_leave_nothing_are_one_sentence_in_notebook_02(rows, run_notebooks, tmp_path):
    with pytest.raises(AlpacaError, match="are left to train on"):
        run_notebooks(NOTEBOOKS[1:2], rows)
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize("recipe", ["document", "document+eos"])
def test_every_recipe_goes_into_the_manifest(recipe, run_notebooks):
    folder = run_notebooks(NOTEBOOKS[1:2], made_of(ENGLISH), recipe=recipe)
    assert json.loads((folder / "manifest.json").read_text("utf-8"))["data"]["recipe"] == recipe


@pytest.mark.integration
def test_no_cell_of_any_notebook_prints_a_warning(tmp_path):
    """All of them as one, so that a kernel imports the libraries once."""
    values = {"profile": "pocket", "run": str(tmp_path / "run"), "max_train_rows": 32, "num_train_epochs": 1}
    values |= {"max_heldout_rows": 8, "max_new_tokens": 12}
    whole = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import warnings\nwarnings.warn('seen')")])
    for path in [*NOTEBOOKS, *FURTHER]:
        chosen = {name: value for name, value in values.items() if name in notebook_parameters(path)}
        first, *others = cells(path)
        setting = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in chosen.items()))
        whole.cells += [first, setting, *others]
    NotebookClient(whole, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(PROJECT)}}).execute()
    streams = [output.text for cell in whole.cells for output in cell.outputs if output.get("name") == "stderr"]
    assert len(streams) == 1 and "UserWarning: seen" in streams[0]  # the first cell's; progress is a widget here
