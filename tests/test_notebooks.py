"""The committed notebooks: hygiene, and that what nbval checks means something."""

import ast
import inspect
import json
import re

import nbformat
import pytest
from support import PROJECT

from alpaca_helpers import training
from alpaca_helpers.series import NOTEBOOKS

IGNORED = "nbval-ignore-output"
LOCAL_PATH = re.compile(r"(?<![\w.:/])/(home|root|tmp|Users|content|work|mnt)/|(?<![A-Za-z])[A-Z]:\\")
HEADINGS = {
    "01": ["# 1. "],
    "02": ["# 2. ", "## 2.1 ", "## 2.2 "],
    "03": ["# 3. ", "## 3.1 ", "## 3.2 ", "## 3.3 "],
    "04": ["# 4. ", "## 4.1 ", "## 4.2 ", "## 4.3 "],
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    content = nbformat.read(request.param, as_version=4)
    nbformat.validate(content)
    content.name = request.param.stem
    return content


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def test_there_are_four():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]


def test_headings_are_the_documents(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    numbered = [line for line in text.splitlines() if re.match(r"#+ \d", line)]
    wanted = HEADINGS[notebook.name[:2]]
    assert len(numbered) == len(wanted)
    assert all(line.startswith(start) for line, start in zip(numbered, wanted))
    assert "## What we saw" in text


def test_one_flat_cell_of_typed_parameters_comes_first(notebook):
    tagged = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    assert tagged == code_cells(notebook)[:1]
    for line, node in zip(tagged[0].source.splitlines(), ast.parse(tagged[0].source).body, strict=True):
        assert isinstance(node, ast.AnnAssign) and "  # " in line
        ast.literal_eval(node.value)


def test_checked_cells_have_stored_outputs(notebook):
    checked = [cell for cell in code_cells(notebook) if IGNORED not in tags(cell) and "parameters" not in tags(cell)]
    comparable = [cell for cell in checked if cell.outputs]
    silent = [cell.source for cell in checked if not cell.outputs]
    assert len(comparable) >= 5
    assert not silent, "a checked cell without a stored output passes whatever it does"


def test_outputs_are_clean(notebook):
    assert not set(notebook.metadata) - {"kernelspec", "language_info", "accelerator", "colab"}
    for count, cell in enumerate(code_cells(notebook), 1):
        assert cell.execution_count == count
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            text = json.dumps(
                [output.get("text"), {k: v for k, v in output.get("data", {}).items() if k[:5] != "image"}]
            )
            assert not LOCAL_PATH.search(text), text


def test_cells_are_short(notebook):
    def lines(cell):
        return sum(1 for line in cell.source.splitlines() if line.strip() and not line.lstrip().startswith("#"))

    sizes = sorted(map(lines, code_cells(notebook)[1:]))
    assert sizes[-1] <= 15 and sizes[len(sizes) // 2] <= 5


# What a reader of the document types, by the section that it stands in: the part of a call that a cell has to hold.
CALLS = {
    "01": {
        "# 1.": [
            "AutoTokenizer.from_pretrained(model_path)",
            "tokenizer.pad_token = tokenizer.eos_token",
            "AutoModelForCausalLM.from_pretrained(model_path)",
            "base_model.eval()",
            "base_model.to(device)",
            'pipeline("text-generation", model=base_model, tokenizer=tokenizer, device=device)',
            "generator(format_prompt(instruction), max_new_tokens=max_new_tokens",
        ]
    },
    "02": {
        "## 2.1": ["load_dataset(", ".column_names", "def is_simple(example):", "rows.filter(is_simple"],
        "## 2.2": ["AutoTokenizer.from_pretrained(", "tokenizer.pad_token =", "split.map(tokenize", "save_to_disk("],
    },
    "03": {
        "## 3.2": [
            "AutoModelForCausalLM.from_pretrained(model_path",
            "LoraConfig(\n    r=lora_rank,\n    lora_alpha=lora_alpha,\n    target_modules=target_modules,",
            'lora_dropout=lora_dropout,\n    bias="none",\n    task_type=TaskType.CAUSAL_LM,',
            "get_peft_model(base_model, config)",
        ],
        "## 3.3": [
            "TrainingArguments(\n    output_dir=",
            "DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)",
            "trainer = AnswerTrainer(",
            "trainer.train(",
            "model.save_pretrained(",
            "tokenizer.save_pretrained(",
            "PeftModel.from_pretrained(",
        ],
    },
    "04": {
        "## 4.1": [
            "AutoTokenizer.from_pretrained(model_path)",
            "AutoModelForCausalLM.from_pretrained(model_path)",
            "PeftModel.from_pretrained(base_model, adapter_path)",
            'pipeline("text-generation", model=model, tokenizer=tokenizer, device=device)',
            "temperature=0.7,\n    top_p=0.9,\n    top_k=50,\n    eos_token_id=tokenizer.eos_token_id,",
        ],
        "## 4.2": [
            "pipe_base(prompt, **sampling)",
            "pipe(prompt, **sampling)",
            '"do_sample": True, "temperature": 0.7',
        ],
        "## 4.3": ["while True:", 'in ["exit", "quit"]', "break", "pipe(prompt, max_new_tokens=100", "ChatBox("],
    },
}


def sections(notebook) -> dict[str, str]:
    """The code of each numbered section, cell after cell."""
    code, heading = {}, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                if numbered := re.match(r"#+ \d[\d.]*", line):
                    heading = numbered[0]
        else:
            code[heading] = code.get(heading, "") + cell.source + "\n\n"
    return code


def test_each_call_of_the_document_stands_in_its_section(notebook):
    code = sections(notebook)
    for heading, calls in CALLS[notebook.name[:2]].items():
        missing = [call for call in calls if call not in code[heading]]
        assert not missing, f"{heading}: {missing}"


def test_what_stands_in_the_cells_is_what_trains(notebook):
    """The arguments that notebook 03 types are those that `torchrun` trains with, and so are its parameters."""
    if notebook.name[:2] != "03":
        return
    tree = ast.parse(re.sub(r"^( *)%.*$", r"\1pass", sections(notebook)["## 3.3"], flags=re.MULTILINE))
    helper = ast.parse(inspect.getsource(training.make_trainer))

    def arguments(tree, name):
        call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name)
        return {word.arg: ast.unparse(word.value) for word in call.keywords}

    typed, made = arguments(tree, "TrainingArguments"), arguments(helper, "TrainingArguments")
    names = {"rows_at_once": "rows", "num_train_epochs": "epochs", "base_model.dtype": "dtype"}
    names |= {"learning_rate": "prepared['learning_rate'] if learning_rate is None else learning_rate"}
    names |= {
        "4 * rows_at_once": "4 * rows",
        "device == 'cuda' and base_model.dtype == torch.float32": (
            "torch.cuda.is_available() and dtype == torch.float32"
        ),
    }
    assert {key: names.get(value, value) for key, value in typed.items()} == made
    typed, made = arguments(tree, "AnswerTrainer"), arguments(helper, "AnswerTrainer")
    assert typed.keys() == made.keys() and typed["train_dataset"] == made["train_dataset"]
    parameters = {
        node.target.id: ast.literal_eval(node.value) for node in ast.parse(code_cells(notebook)[0].source).body
    }
    signature = inspect.signature(training.make_trainer).parameters
    for name in signature.keys() - {"folder"}:
        default = signature[name].default
        assert parameters[name] == (list(default) if isinstance(default, tuple) else default), name


def test_no_long_source_is_shown_and_nothing_is_looked_up_by_name(notebook):
    code = "\n".join(cell.source for cell in code_cells(notebook))
    assert "getsource" not in code and "globals()" not in code and "importlib.import_module" not in code


def test_the_opening_has_at_most_four_lines_of_python(notebook):
    opening = code_cells(notebook)[1].source
    python = [line for line in opening.splitlines() if line.strip() and not line.strip().startswith("%")]
    assert "%pip install" in opening and len(python) <= 4


def test_the_template_is_spelled_in_one_module():
    spelled = [
        path.name for path in (PROJECT / "alpaca_helpers").rglob("*.py") if "ponse:" in path.read_text(encoding="utf-8")
    ]
    assert spelled == ["prompts.py"]


# The French edition

FRENCH_PAGE = (
    "](../../docs/glossaire.md)",
    "](../docs/glossary.md)",
)  # a page of its own: the link, and the English one


def test_the_french_edition_differs_in_its_prose_alone(notebook):
    french = nbformat.read(PROJECT / "notebooks" / "fr" / f"{notebook.name}.ipynb", as_version=4)
    assert french.metadata == notebook.metadata
    assert [cell.id for cell in french.cells] == [cell.id for cell in notebook.cells]
    for cell, english in zip(french.cells, notebook.cells):
        if cell.cell_type == "code":
            assert cell == english, cell.id
        else:
            assert cell.source != english.source, f"{cell.id} is still in English"
            source = cell.source.replace(*FRENCH_PAGE)
            code = re.compile(r"```.*?```|`[^`]+`|\$[^$]+\$|\]\([^)]+\)", re.DOTALL)  # code, formulas, links
            assert sorted(code.findall(source)) == sorted(code.findall(english.source)), cell.id


@pytest.mark.parametrize("edition", ["", "fr"])
def test_each_link_of_a_notebook_leads_to_a_file(notebook, edition):
    folder = PROJECT / "notebooks" / edition
    text = (folder / f"{notebook.name}.ipynb").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert [link for link in links if not (folder / link).is_file()] == []
