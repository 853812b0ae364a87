"""Loading from the Hub, through a stand-in on loopback: one download, none from a filled cache, a sentence a fault."""

import json
import re
import shutil
import subprocess
import sys
import threading

import datasets
import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import load_file
from support import PROJECT, free_port
from support.hub import DATASET, DATASET_COMMIT, MODEL, MODEL_COMMIT, Fault, Hub, Repository, point_to, stand_in
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca_helpers import AlpacaError, hub
from alpaca_helpers.cells import NOTEBOOKS
from alpaca_helpers.models import fetch_model, load_base, load_tokenizer
from alpaca_helpers.rows import load_rows

pytestmark = pytest.mark.integration

NAME, ALPACA = MODEL.removeprefix("models/"), DATASET.removeprefix("datasets/")
ROWS = 600  # instead of 52,002, to be quick
LOADERS = {NAME: lambda: fetch_model(NAME, MODEL_COMMIT), ALPACA: lambda: load_rows(ALPACA, DATASET_COMMIT)}


@pytest.fixture(scope="module")
def repositories(alpaca_like, tmp_path_factory) -> Hub:
    return stand_in(tmp_path_factory.mktemp("hub"), alpaca_like, ROWS)


@pytest.fixture
def server(repositories, tmp_path, monkeypatch):
    """The stand-in, running, with an empty cache, and no wait between the library's tries."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(hub, "PATIENCE", 120)
    with Hub(dict(repositories.repositories)) as running:
        point_to(running.url, tmp_path, monkeypatch)
        yield running


NOT_HERE = "is not wholly in the cache"


def sentence(load, *says: str) -> str:
    """The one line with which loading fails; what it says is checked."""
    with pytest.raises(AlpacaError) as raised:
        load()
    said = str(raised.value)
    assert "\n" not in said and all(part in said for part in says), said
    return said


def is_the_repositorys(model, tokenizer, server) -> bool:
    folder, question = server.repositories[MODEL].folder, "Instruction: What is it?\nRéponse:"
    saved = load_file(folder / "model.safetensors")
    assert tokenizer(question).input_ids == AutoTokenizer.from_pretrained(folder)(question).input_ids
    return all(torch.equal(value, saved[name]) for name, value in model.transformer.state_dict().items())


# What works


def test_one_announced_download_is_ready_for_from_pretrained_and_asked_for_once(server, capsys, monkeypatch):
    folder = fetch_model(NAME, MODEL_COMMIT)
    (said,) = capsys.readouterr().out.splitlines()
    names = sorted(path.name for path in folder.iterdir())
    size = tqdm.format_sizeof(sum(path.stat().st_size for path in folder.iterdir()), "B")
    assert said == f"Downloading {NAME} from the Hub, {size}, once: {', '.join(names)}"
    there = {path.name for path in server.repositories[MODEL].folder.iterdir()}
    assert set(names) == there - {"pytorch_model.bin", "README.md"} and not any(".bin" in line for line in server.log)
    assert len(load_rows(ALPACA, DATASET_COMMIT)) == ROWS
    asked = len(server.log)
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        model, tokenizer = load_base(NAME, MODEL_COMMIT), load_tokenizer(NAME, MODEL_COMMIT)
        assert model.name_or_path == model.config._name_or_path == tokenizer.name_or_path == NAME
        assert model.dtype == torch.float32 and not model.training and tokenizer.pad_token == tokenizer.eos_token
        plain = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert is_the_repositorys(model, tokenizer, server) and is_the_repositorys(*plain, server)
        assert len(load_rows(ALPACA, DATASET_COMMIT)) == ROWS
    assert len(server.log) == asked
    point_to(server.url, server.repositories[MODEL].folder, monkeypatch)
    sentence(LOADERS[NAME], NOT_HERE, f"{NAME} at {MODEL_COMMIT[:8]}", "HF_HUB_OFFLINE", "PROFILE=pocket")


def test_the_documents_own_lines_work_and_the_cache_that_they_fill_is_used_as_it_is(server):
    tokenizer = AutoTokenizer.from_pretrained(NAME)
    assert is_the_repositorys(AutoModelForCausalLM.from_pretrained(NAME, use_safetensors=True), tokenizer, server)
    assert datasets.load_dataset(ALPACA)["train"].num_rows == ROWS and any(".parquet" in line for line in server.log)
    asked = len(server.log)
    AutoModelForCausalLM.from_pretrained(fetch_model(NAME))
    assert len(server.log) == asked


def test_without_a_pin_what_the_cache_lacks_is_fetched_and_then_kept(server, capsys, tmp_path, monkeypatch):
    for file in ("config.json", "vocab.json", "merges.txt"):
        hf_hub_download(NAME, file)
    server.faults.append(Fault("GET api/*/tree/*", status=503))
    sentence(lambda: fetch_model(NAME), NOT_HERE, "could not be fetched", "PROFILE=pocket")
    server.faults.clear()
    capsys.readouterr()
    fetch_model(NAME), load_rows(ALPACA)
    missing = "generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json"
    assert f"once: {missing}\n" in capsys.readouterr().out
    point_to(f"http://127.0.0.1:{free_port()}", tmp_path, monkeypatch)
    fetch_model(NAME)
    assert len(load_rows(ALPACA)) == ROWS


# What is said, and that the next run works


@pytest.mark.parametrize("name", LOADERS)
def test_a_hub_that_refuses_or_breaks_off_is_one_sentence_and_the_next_run_works(name, server, tmp_path, monkeypatch):
    point_to(f"http://127.0.0.1:{free_port()}", tmp_path, monkeypatch)
    sentence(LOADERS[name], NOT_HERE, name, "refused", "PROFILE=pocket")
    point_to(server.url, tmp_path, monkeypatch)
    cut = Fault("GET cdn/*", cut_at=10_000)
    for fault in (Fault("GET api/*/revision/*", status=503), Fault("GET cdn/*", status=503), cut, cut):
        server.faults = [fault]  # the last begins with a cache that is not whole
        why = "503" if fault.status else "not be fetched"
        sentence(LOADERS[name], NOT_HERE, name, why, "try again later", "PROFILE=pocket")
    server.faults = []
    LOADERS[name]()


def test_a_hub_that_never_answers_is_given_up_after_patience(monkeypatch):
    """Where a name server or a proxy hangs, not even the library's own timeouts end."""
    assert hub.PATIENCE < 5
    hangs, ended = threading.Event(), []
    ask = type("Api", (), {"repo_info": lambda *_, **__: ended.append(hangs.wait(120))})
    monkeypatch.setattr(hub, "PATIENCE", 0.05)
    monkeypatch.setattr(hub, "HfApi", ask)
    monkeypatch.setattr("alpaca_helpers.models.cached_folder", lambda *_: None)
    sentence(LOADERS[NAME], NOT_HERE, "no answer within 0.05 s; HF_HUB_ETAG_TIMEOUT", "PROFILE=pocket")
    assert ended == []
    hangs.set()


def test_a_download_may_take_longer_than_patience(server, monkeypatch):
    real = hub.snapshot_download

    def download(*args, **kwargs):
        if not kwargs.get("local_files_only"):  # it does not only look into the cache
            monkeypatch.setattr(hub, "PATIENCE", 0.01)
        return real(*args, **kwargs)

    monkeypatch.setattr(hub, "snapshot_download", download)
    server.faults.append(Fault("* cdn/*", delay=0.3))
    LOADERS[ALPACA]()


def test_what_is_not_on_the_hub_is_named(server, tmp_path, monkeypatch):
    server.repositories["models/some/thing"] = server.repositories[DATASET]  # its files under a model's name
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    server.repositories["models/some/bert"] = Repository(tmp_path / "bert", MODEL_COMMIT)
    for load, name in ((fetch_model, "nobody/nothing"), (fetch_model, "two words"), (load_rows, "nobody/nothing")):
        sentence(lambda load=load, name=name: load(name), f" {name} is neither a path here nor")
    sentence(lambda: fetch_model(NAME, "0123456"), "neither a path here nor", NAME, "0123456")
    sentence(lambda: fetch_model("some/thing"), "neither a path here nor", "some/thing", "config.json")
    sentence(lambda: fetch_model("some/bert"), "cannot be used", "bert")
    server.faults.append(Fault("* openai-community/*", status=403, reason="GatedRepo"))
    sentence(LOADERS[NAME], "neither a path here nor", NAME, "accept its terms")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "test.jsonl").write_text('{"instruction": "a", "output": "b"}')
    server.repositories["datasets/some/test"] = Repository(tmp_path / "other", MODEL_COMMIT)
    sentence(lambda: load_rows("some/test"), "in", "some/test", "no train split")
    point_to(f"http://127.0.0.1:{free_port()}", tmp_path, monkeypatch)
    sentence(lambda: fetch_model("some/bert"), "cannot be used", "bert")  # from the cache too


@pytest.mark.parametrize("name, file", [(NAME, "*cdn/*"), (ALPACA, "*cdn/*"), (NAME, "*config.json")])
def test_busy_for_a_while_is_waited_for(name, file, server, capsys):
    faults = (("api/*/revision/*", 2, 503), ("api/*/revision/*", 1, 429), (file, 2, 503))
    server.faults += [Fault(f"GET {path}", times=times, status=status) for path, times, status in faults]
    LOADERS[name]()
    assert "The Hub is busy (503)" in capsys.readouterr().out
    assert [sum(f" {status} " in line for line in server.log) for status in (503, 429)] == [4, 1]


def test_cut_short_is_taken_up_where_it_broke_off(server, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 20)
    size = (server.repositories[MODEL].folder / "model.safetensors").stat().st_size
    server.faults.append(Fault("GET cdn/*", times=1, cut_at=size // 2))
    assert is_the_repositorys(load_base(NAME), load_tokenizer(NAME), server)
    first, second = (int(line.split()[-1]) for line in server.log if line.startswith("GET /cdn/"))
    assert first == size // 2 and second < size  # the second try asked for the rest only


def test_a_damaged_weight_file_is_never_loaded_and_after_the_advice_it_is_whole(server):
    weights = fetch_model(NAME, MODEL_COMMIT) / "model.safetensors"
    weights.resolve().write_bytes(weights.read_bytes()[:-100])
    said = sentence(LOADERS[NAME], "of the model in", "cannot be used")
    shutil.rmtree(re.search("delete (.*) and run again,", said)[1])
    load_base(NAME, MODEL_COMMIT)


@pytest.mark.nightly
def test_the_whole_series_from_the_stand_in(alpaca_like, tmp_path):
    """benchmarks/gpu.py at small size: four notebooks under `gpt2-medium` by papermill, killed in training, resumed."""
    figures = tmp_path / "figures.json"
    command = [sys.executable, "benchmarks/gpu.py", "--layers", "2", "--width", "64", "--heads", "2", "--out", figures]
    command += ["--data", alpaca_like, "--max-train-rows", "200"]
    command += ["-p", "lora_rank", "8", "-p", "micro_batch_size", "4", "-p", "heldout_rows", "20"]
    command += ["-p", "learning_rate", "0.01"]  # so few steps of a random model move the loss by chance otherwise
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = json.loads(figures.read_text(encoding="utf-8"))
    stems = [path.stem for path in NOTEBOOKS]
    assert [list(part) for part in made["parts"].values()] == [stems[:3], stems[2:]]
    assert made["trainable_parameters"] == 2 * 8 * (64 + 3 * 64)
    assert made["metrics"]["profile"] == "gpt2-medium" and made["metrics"]["questions"] == 20
