"""What leaves the project: other programs load it, ask in the same form, and get the same answers."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import gguf
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from support import PROJECT, free_port
from support.fresh import fresh_python, run
from support.models import tiny
from support.runs import finished_run, notebook_03, prepare_run
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from alpaca_export import __main__ as command
from alpaca_export import export, push
from alpaca_export.llama_cpp import save_gguf
from alpaca_export.merged import generation_settings
from alpaca_helpers import AlpacaError, card, pocket
from alpaca_helpers.cells import NOTEBOOKS
from alpaca_helpers.data import tokenize
from alpaca_helpers.files import content_hash, verify_checksums
from alpaca_helpers.generation import generate
from alpaca_helpers.lora import CONFIG, load_adapter
from alpaca_helpers.models import load_base, load_tokenizer
from alpaca_helpers.prompts import encode, format_prompt
from alpaca_helpers.run import Run
from alpaca_helpers.series import run_series

QUESTIONS = ["Hi", "What is the capital of France, and of Spain?", "Name it.", "Tell me who wrote this book of old."]


def messages(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def export_run(folder: Path, kind: str = "gpt2", std: float = 0.2, gguf: bool = False) -> None:
    """Write a finished run of the tiny model and export it."""
    finished_run(folder, kind, std)
    about = {"model": str(folder / "base"), "model_revision": None}
    export(folder, SimpleNamespace(**about, merged=True, gguf=gguf, push_to=""))


def answers(folder: Path, questions=QUESTIONS, new: int = 12):
    base = str(folder / "base")
    model = load_adapter(load_base(base), folder / "adapter")
    return generate(model, load_tokenizer(base), list(map(format_prompt, questions)), max_new_tokens=new)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_messages_are_answered_in_a_batch_and_from_any_folder(kind, tmp_path, monkeypatch):
    export_run(tmp_path / "run", kind)
    wanted = [answer.ids for answer in answers(tmp_path / "run")]
    monkeypatch.chdir(tmp_path)
    for name, load in (("adapter", AutoPeftModelForCausalLM), ("merged", AutoModelForCausalLM)):
        folder = tmp_path / "run" / name
        model, tokenizer = load.from_pretrained(folder, dtype="float32").eval(), AutoTokenizer.from_pretrained(folder)
        options = {"padding": True, "return_dict": True, "return_tensors": "pt"}
        batch = tokenizer.apply_chat_template(list(map(messages, QUESTIONS)), **options)
        made = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :]
        ends = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        assert [[id for id in row if id not in ends] for row in made.tolist()] == wanted
        missing = tokenizer.apply_chat_template([{"role": "user"}])["input_ids"]
        assert missing == tokenizer.apply_chat_template(messages(""))["input_ids"]


def test_an_answer_ends_with_the_context_and_a_question_over_it_is_a_sentence(tmp_path):
    export_run(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path / "merged"))
    assert pipe.model.generation_config.max_length == 256 == pipe.model.config.n_positions
    for times in (1, 40, 70):
        pipe(messages("word " * times), do_sample=False)
    with pytest.raises(ValueError, match="Input length of input_ids is"):
        pipe(messages("word " * 300), do_sample=False)


def test_a_push_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    finished_run(tmp_path / "run")
    adapter, pushed = tmp_path / "run" / "adapter", tmp_path / "pushed"
    (adapter / "README.md").write_text("the card")
    assert json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"] == str(tmp_path / "run" / "base")
    before = content_hash(adapter)
    monkeypatch.setattr(push, "create_repo", lambda name, **options: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(push, "upload_folder", lambda folder_path, **options: Path(folder_path).rename(pushed))
    push.push_adapter(adapter, "me/it")
    assert json.loads((pushed / CONFIG).read_text())["base_model_name_or_path"] == "base"
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in pushed.iterdir())
    assert verify_checksums(pushed) == "" and (pushed / "README.md").read_text() == "the card"
    assert content_hash(adapter) == before and verify_checksums(adapter) == ""
    assert card.published(str(pocket.MODEL)) == "alpaca_helpers/pocket/model" and card.published("a/b") == "a/b"


def test_a_push_that_the_hub_refuses_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(push, "create_repo", Mock(side_effect=OSError("401 Unauthorized\nmore")))
    with pytest.raises(AlpacaError, match=r"was not pushed to .*me/it \(401 Unauthorized\)[^\n]*$"):
        push.push_adapter(tmp_path, "me/it")


# GGUF


def test_a_gguf_is_replaced_only_where_it_is_recorded_and_a_cut_leaves_none_that_is_not(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    export_run(folder, gguf=True)
    path, modelfile = folder / "mine.gguf", folder / "Modelfile"
    assert Run(folder).manifest()["gguf"] == {place.name: content_hash(place) for place in (path, modelfile)}
    assert modelfile.read_text().splitlines() == [
        *("FROM ./mine.gguf", 'TEMPLATE """Instruction: {{ .Prompt }}', 'Réponse:"""'),
        *('PARAMETER stop "<|endoftext|>"', "PARAMETER num_ctx 256", "PARAMETER temperature 0"),
    ]
    whole = path.read_bytes()
    monkeypatch.setattr(Path, "rename", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_gguf(folder)  # cut before the new ones are in place
    monkeypatch.undo()
    assert not path.exists() and not list(folder.glob(".alpaca-*"))
    save_gguf(folder)
    assert path.read_bytes() == whole
    modelfile.write_text("mine")
    with pytest.raises(AlpacaError, match=r"Modelfile is in the way.*move it elsewhere"):
        save_gguf(folder)
    assert modelfile.read_text() == "mine" and path.read_bytes() == whole


def test_the_gguf_holds_the_merged_weights_under_llama_cpps_names(tmp_path):
    export_run(tmp_path, gguf=True)
    read = gguf.GGUFReader(tmp_path / f"{tmp_path.name}.gguf")
    found = {tensor.name: torch.tensor(tensor.data) for tensor in read.tensors}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert sum(value.numel() for value in found.values()) == sum(value.numel() for value in merged.parameters())
    block = merged.transformer.h[1]
    assert torch.equal(found["blk.1.attn_qkv.weight"], block.attn.c_attn.weight.T)
    assert torch.equal(found["blk.1.ffn_down.bias"], block.mlp.c_proj.bias)


def test_the_ends_of_a_text_are_tokens_of_the_tokenizer():
    """GPT-2's default for its end lies beyond a small vocabulary, and would be the word None to Ollama."""
    model, tokenizer = tiny("gpt2", eos_token_id=50256)
    assert model.generation_config.eos_token_id == 50256
    assert generation_settings(model, tokenizer).eos_token_id == tokenizer.eos_token_id


def test_what_cannot_be_written_as_gguf_is_one_sentence(tmp_path, monkeypatch):
    refusals = {"gpt_neox": "architecture, gpt_neox,", "llama": "rotary positions, linear,", "qwen3": "tokenizer"}
    for kind, reason in refusals.items():
        folder = tmp_path / kind
        export_run(folder, kind)
        config, tokenizer = folder / "merged" / "config.json", folder / "merged" / "tokenizer.json"
        if kind == "llama":
            scaling = {"rope_type": "linear", "factor": 2.0}
            config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_scaling": scaling}))
        if kind == "qwen3":
            tokenizer.write_text(tokenizer.read_text().replace(r"\\p{N}|", r"\\p{N}{2}|"))
        with pytest.raises(AlpacaError, match=rf"^[^\n]*merged cannot be written as GGUF: its {reason}.*known here.*$"):
            save_gguf(folder)
        assert not list(folder.glob("*.gguf")) and not list(folder.glob(".alpaca-*"))
    folder = tmp_path / "gpt2"
    export_run(folder)
    for file, part, other, reason in (
        ("config", '"gelu_new"', '"relu"', "configuration, activation_function relu,"),
        ("config", '"scale_attn_weights": true', '"scale_attn_weights": false', "configuration, scale_attn_weights"),
        ("tokenizer", '"add_prefix_space": false', '"add_prefix_space": true', "tokenizer"),
    ):
        path = folder / "merged" / f"{file}.json"
        whole = path.read_text()
        path.write_text(whole.replace(part, other))
        with pytest.raises(AlpacaError, match=f"merged cannot be written as GGUF: its {reason}"):
            save_gguf(folder)
        path.write_text(whole)
    save_gguf(folder)
    monkeypatch.setitem(sys.modules, "alpaca_export.gguf", None)
    with pytest.raises(AlpacaError, match="gguf is not installed: `pip install"):
        save_gguf(folder)


def test_the_command_line_writes_the_gguf_of_a_finished_run_under_its_lock(tmp_path, monkeypatch, capsys):
    finished_run(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / "run")])
    command.main()
    assert "run.gguf is written" in capsys.readouterr().out and (tmp_path / "run" / "merged").is_dir()


# Losses shown elsewhere


def test_report_to_shows_the_losses_in_the_run(tmp_path, monkeypatch):
    tensorboard, settings = Mock(), prepare_run(tmp_path)
    assert notebook_03(tmp_path, "trainer", **settings).args.report_to == []
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    trainer = notebook_03(tmp_path, "trainer", report_to="tensorboard", **settings)
    trainer.train(resume_from_checkpoint=False)
    assert Path(tensorboard.SummaryWriter.call_args.kwargs["log_dir"]).is_relative_to(tmp_path)
    shown = [call.args for call in tensorboard.SummaryWriter.return_value.add_scalar.call_args_list]
    for name in ("loss", "eval_loss"):
        told = [(entry[name], entry["step"]) for entry in trainer.state.log_history if name in entry]
        where = name.replace("eval_", "eval/") if "eval" in name else "train/loss"
        assert told and [(value, step) for key, value, step in shown if key == where] == told


# Other programs, each in an environment of its own


@pytest.fixture(scope="module")
def pocket_run(tmp_path_factory) -> Path:
    """A folder with the run `pocket` in `runs`, as the pages have it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run_series({"run": str(folder / "runs" / "pocket"), "profile": "pocket", "gguf": True}, NOTEBOOKS[1:3])
    return folder


def environment(folder: Path, *packages: str) -> Path:
    """Return a Python that has these packages, and this one's where they are not others of the same name."""
    python, _ = fresh_python(folder)
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return python


def examples(part: str) -> str:
    """Return the Python of the page's part on other programs."""
    page = (PROJECT / "docs" / "outside.md").read_text(encoding="utf-8")
    return re.search(rf"\n## {part}\n.*?```python\n(.*?)```", page, re.DOTALL).group(1)


def said(python: Path, code: str, folder: Path, *given: str) -> str:
    """Return the last line that the code prints in the folder; `given` are its arguments."""
    done = run([python, "-c", code, *given], folder, OMP_NUM_THREADS="1")
    assert not done.returncode, done.stderr
    return done.stdout.strip().splitlines()[-1]


TOKYO = "The capital of Japan is Tokyo."
VERSION = "\nimport transformers; assert transformers.__version__.startswith('{}'), transformers.__version__"
LONG = "It is. " * 30
LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ids = AutoTokenizer.from_pretrained("merged")(sys.argv[1])["input_ids"]
with torch.inference_mode():
    logits = AutoModelForCausalLM.from_pretrained("merged")(torch.tensor([ids])).logits[0, -1]
print(json.dumps([ids, logits.tolist()]))
"""


@pytest.mark.nightly
@pytest.mark.parametrize("packages", [(), ("transformers==4.57.*", "peft==0.17.*")], ids=["5", "4"])
def test_adapter_merged_model_and_pocket_answer_in_both_versions_of_transformers(packages, pocket_run, tmp_path):
    python = environment(tmp_path, *packages) if packages else sys.executable
    version = VERSION.format(4 if packages else 5)
    for part in ("peft", "pipeline"):
        assert said(python, version + "\n" + examples(part), pocket_run) == TOKYO
    adapter = 'pipeline("text-generation", model="runs/pocket/adapter", tokenizer="runs/pocket/adapter")'
    code = examples("pipeline").replace('pipeline("text-generation", model="runs/pocket/merged")', adapter)
    assert said(python, code, pocket_run) == TOKYO
    base = f"""
from transformers import pipeline
pipe = pipeline("text-generation", model={str(pocket.MODEL)!r})
print(pipe("The capital of Japan is", max_new_tokens=6, do_sample=False)[0]["generated_text"].splitlines()[0])"""
    assert said(python, base, tmp_path) == TOKYO

    for name, changes in LLAMAS.items():  # of other positions and tokenizers
        folder = tmp_path / name
        rope = changes or {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}
        model, tokenizer = tiny(name.split()[0], **rope)
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        export_run(folder)
        ids = AutoTokenizer.from_pretrained(folder / "merged")(LONG)["input_ids"]
        with torch.inference_mode():
            wanted = AutoModelForCausalLM.from_pretrained(folder / "merged")(torch.tensor([ids])).logits[0, -1]
        found = json.loads(said(python, LOGITS, folder, LONG))
        assert found[0] == ids
        torch.testing.assert_close(torch.tensor(found[1]), wanted, atol=1e-4, rtol=0)


@pytest.mark.nightly
def test_the_server_of_transformers_answers_and_refuses_a_second_turn(pocket_run, tmp_path):
    python = environment(tmp_path, "transformers[serving]")
    command = [python, "-m", "transformers.cli.transformers", "serve", "runs/pocket/merged", "--device", "cpu"]
    port = free_port()
    command, address = [*command, "--port", str(port)], f"http://127.0.0.1:{port}/v1/chat/completions"
    with subprocess.Popen(command, cwd=pocket_run, env=OFFLINE, stderr=subprocess.PIPE) as server:
        try:
            while b"Uvicorn running" not in server.stderr.readline():
                assert server.poll() is None
            request = {"model": "runs/pocket/merged", "temperature": 0, "max_tokens": 80}
            question = messages("Name the capital of Japan.")
            answer = post(address, request | {"messages": question})["choices"][0]
            assert answer["message"]["content"].strip() == TOKYO and answer["finish_reason"] == "stop"
            turns = [*question, {"role": "assistant", "content": TOKYO}, *question]
            with pytest.raises(urllib.error.HTTPError):
                post(address, request | {"messages": turns})
        finally:
            server.kill()


OFFLINE = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}


def post(address: str, content: dict) -> dict:
    """Return what a server on this machine answers."""
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, json.dumps(content).encode(), headers)) as answer:
        return json.load(answer)


# Prints for each question the ids of its prompt and llama.cpp's answer
ASK = """
import json, sys, urllib.request
import xllamacpp

def post(path, content):
    request = urllib.request.Request(server.listening_address + path, json.dumps(content).encode())
    return json.load(urllib.request.urlopen(request))

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server, found = xllamacpp.Server(params), []
for question in json.loads(sys.argv[2]):
    messages = [{"role": "user", "content": question}]
    prompt = post("/apply-template", {"messages": messages})["prompt"]
    ids = post("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]
    answer = post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 80})
    found.append([ids, answer["choices"][0]["message"]["content"].strip()])
print(json.dumps(found))
"""
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_theta": 5e5, "original_max_position_embeddings": 64}
LLAMAS = {"llama": {}, "llama 3": {"rope_parameters": LLAMA3}, "qwen2": {}, "qwen3": {}}


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory) -> Path:
    """A Python with llama.cpp."""
    return environment(tmp_path_factory.mktemp("llama.cpp"), "xllamacpp")


def asked_llama_cpp(python: Path, path: Path, questions: list[str]) -> list:
    return json.loads(said(python, ASK, path.parent, str(path), json.dumps(questions)))


def rows_of_the_pocket() -> list[dict]:
    lines = pocket.HELDOUT.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[::9][:30]]


@pytest.mark.nightly
def test_llama_cpp_asks_with_the_same_ids_and_answers_as_the_pocket_does(pocket_run, llama_cpp):
    folder = pocket_run / "runs" / "pocket"
    assert said(llama_cpp, examples("llama.cpp and Ollama"), pocket_run) == TOKYO
    questions = [f"{row['instruction']}\n{row['input']}".strip() for row in rows_of_the_pocket()]
    questions += ["Don't say 12345.", "What\n\n is  é 東京? 😀"]
    prompts = list(map(format_prompt, questions))
    model, tokenizer = load_base(str(folder / "merged")), load_tokenizer(str(folder / "merged"))
    ours = [answer.text for answer in generate(model, tokenizer, prompts)]
    wanted = [list(pair) for pair in zip(encode(prompts, tokenizer), ours)]
    assert asked_llama_cpp(llama_cpp, folder / "pocket.gguf", questions) == wanted


@pytest.mark.nightly
@pytest.mark.parametrize("name", LLAMAS)
def test_llama_cpp_asks_and_answers_as_models_of_llamas_type_do(name, llama_cpp, tmp_path):
    """After it has learned some rows by heart, so that it is sure of each token."""
    rows = [row for row in rows_of_the_pocket() if not row["input"]]
    model, tokenizer = tiny(name.split()[0], hidden_size=64, initializer_range=0.05, **LLAMAS[name])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    made = tokenize({name: [row[name] for row in rows] for name in rows[0]}, tokenizer, "document+eos", 96)
    batch = {name: torch.tensor(values) for name, values in made.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    export_run(tmp_path, std=0.002, gguf=True)
    questions = [row["instruction"] for row in rows]
    ours = [answer.text for answer in answers(tmp_path, questions, 80)]
    assert sum(answer == row["output"] for answer, row in zip(ours, rows)) > 0.9 * len(rows)
    prompts = encode(list(map(format_prompt, questions)), tokenizer)
    wanted = [list(pair) for pair in zip(prompts, ours)]
    assert asked_llama_cpp(llama_cpp, tmp_path / f"{tmp_path.name}.gguf", questions) == wanted
