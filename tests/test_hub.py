"""Loading from the Hub through a stand-in on loopback: what works, what is said, and each fault."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time

import datasets
import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import load_file
from support import PROJECT
from support.hub import ALPACA_FILE, DATASET, DATASET_COMMIT, MODEL, MODEL_COMMIT, Fault, Hub, stand_in, write_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca_helpers import AlpacaError, hub, rows
from alpaca_helpers.models import fetch_model, load_base, load_tokenizer
from alpaca_helpers.rows import load_rows
from alpaca_helpers.series import NOTEBOOKS

pytestmark = pytest.mark.integration

NAME, ALPACA = MODEL.removeprefix("models/"), DATASET.removeprefix("datasets/")
QUESTION = "Instruction: What is the capital of France?\nRéponse:"
FRANCE = [6310, 2762, 25, 1867, 318, 262, 3139, 286, 4881, 30, 198, 49, 2634, 79, 2591, 25]  # in GPT-2's vocabulary


ROWS = 600  # instead of 52,002, to be quick


@pytest.fixture(scope="module")
def repositories(alpaca_like, tmp_path_factory) -> Hub:
    return stand_in(tmp_path_factory.mktemp("hub"), alpaca_like, ROWS)


@pytest.fixture
def server(repositories, tmp_path, monkeypatch):
    """The stand-in, running, with an empty cache, fewer rows than are known of Alpaca, and hardly a wait."""
    monkeypatch.setattr(hub, "WAITS", [wait / 100 for wait in hub.WAITS])
    file, columns, _ = rows.KNOWN[DATASET_COMMIT]
    monkeypatch.setitem(rows.KNOWN, DATASET_COMMIT, (file, columns, ROWS))
    with Hub(repositories.repositories) as running:
        point_to(running.url, tmp_path, monkeypatch)
        yield running


def point_to(url: str, home, monkeypatch) -> None:
    """Do what HF_ENDPOINT and HF_HOME do at start."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)


def encodes(tokenizer) -> bool:
    """Tell whether the tokenizer gives GPT-2's ids of a prompt, or where it is the pocket's, ids that give it back."""
    ids = tokenizer(QUESTION).input_ids
    return ids == FRANCE if len(tokenizer) == 50257 else tokenizer.decode(ids) == QUESTION


def refused() -> str:
    """The address of a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_tokenizer_and_weights_come_in_one_announced_download(server, capsys):
    folder = fetch_model(NAME, MODEL_COMMIT)
    said = capsys.readouterr().out.splitlines()
    files = {path.name: path.stat().st_size for path in server.repositories[MODEL].folder.iterdir()}
    size = hub.readable_size(sum(files[path.name] for path in folder.iterdir()))
    assert len(said) == 1 and said[0].startswith(f"Downloading {NAME} from the Hub, {size}, once: config.json, ")
    assert sorted(path.name for path in folder.iterdir()) == sorted(files.keys() - {"pytorch_model.bin", "README.md"})
    assert not any(".bin" in line for line in server.log)


def test_the_folder_is_ready_for_plain_from_pretrained(server):
    folder, asked = fetch_model(NAME, MODEL_COMMIT), len(server.log)
    assert encodes(AutoTokenizer.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    saved = load_file(server.repositories[MODEL].folder / "model.safetensors")
    assert torch.equal(model.transformer.h[1].attn.c_attn.weight, saved["h.1.attn.c_attn.weight"])
    assert len(server.log) == asked


def test_loaded_for_scripts_they_go_by_their_name_on_the_hub(server):
    tokenizer, model = load_tokenizer(NAME, MODEL_COMMIT), load_base(NAME, MODEL_COMMIT)
    assert model.name_or_path == model.config._name_or_path == tokenizer.name_or_path == NAME
    assert model.dtype == torch.float32 and not model.training and tokenizer.pad_token == tokenizer.eos_token


def test_a_filled_cache_asks_nothing(server, capsys):
    fetch_model(NAME, MODEL_COMMIT), load_rows(ALPACA, DATASET_COMMIT)
    asked = len(server.log)
    fetch_model(NAME, MODEL_COMMIT), load_rows(ALPACA, DATASET_COMMIT)
    assert len(server.log) == asked


def test_a_cache_filled_file_by_file_is_used_as_it_is(server):
    AutoTokenizer.from_pretrained(NAME), AutoModelForCausalLM.from_pretrained(NAME, use_safetensors=True)
    asked = len(server.log)
    AutoModelForCausalLM.from_pretrained(fetch_model(NAME))
    assert len(server.log) == asked


def test_what_a_cache_lacks_is_fetched_and_nothing_else(server, capsys):
    for file in ("config.json", "vocab.json", "merges.txt"):
        hf_hub_download(NAME, file)
    fetch_model(NAME)
    missing = "generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json"
    assert f"once: {missing}\n" in capsys.readouterr().out


def test_without_a_pin_the_newest_is_fetched_and_then_kept(server, monkeypatch):
    fetch_model(NAME), load_rows(ALPACA)
    point_to(refused(), hub.Path(constants.HF_HUB_CACHE).parent, monkeypatch)
    fetch_model(NAME)
    assert len(load_rows(ALPACA)) == ROWS


def test_offline_works_from_the_cache_and_says_what_is_missing_without_it(server, monkeypatch, tmp_path):
    fetch_model(NAME, MODEL_COMMIT), load_rows(ALPACA, DATASET_COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetch_model(NAME, MODEL_COMMIT), load_rows(ALPACA, DATASET_COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(AlpacaError, match=f"{NAME} at 6dcaa7a9 .*HF_HUB_OFFLINE.*PROFILE=pocket") as raised:
        fetch_model(NAME, MODEL_COMMIT)
    assert raised.value.code == "hub-offline"


@pytest.mark.parametrize("count", [52_002, 51_000])
def test_alpaca_has_its_known_columns_and_rows(count, tmp_path, monkeypatch):
    write_dataset(tmp_path / "alpaca", [{"instruction": "a", "input": "", "output": "b"}], count)
    with Hub() as server:
        server.add(DATASET, tmp_path / "alpaca", DATASET_COMMIT)
        point_to(server.url, tmp_path, monkeypatch)
        if count == 52_002:
            assert len(load_rows(ALPACA, DATASET_COMMIT)) == count
        else:
            with pytest.raises(AlpacaError, match=r"has 51,000 rows .* 52,002 of instruction, input, output, text"):
                load_rows(ALPACA, DATASET_COMMIT)


LOADERS = {
    "model": lambda: fetch_model(NAME, MODEL_COMMIT),
    "dataset": lambda: load_rows(ALPACA, DATASET_COMMIT),
}


@pytest.mark.parametrize("part", LOADERS)
def test_refused_is_one_sentence_at_once_and_the_next_run_works(part, server, tmp_path, monkeypatch):
    point_to(refused(), tmp_path, monkeypatch)
    start = time.perf_counter()
    with pytest.raises(AlpacaError, match="refused.*PROFILE=pocket") as raised:
        LOADERS[part]()
    assert time.perf_counter() - start < 2 and raised.value.code == "hub-unreachable"
    assert "\n" not in str(raised.value) and (ALPACA if part == "dataset" else NAME) in str(raised.value)
    point_to(server.url, tmp_path, monkeypatch)
    LOADERS[part]()


def test_a_hub_that_never_answers_is_one_sentence_within_five_seconds(server):
    server.faults.append(Fault("* api/*", delay=20))
    start = time.perf_counter()
    with pytest.raises(AlpacaError, match="PROFILE=pocket") as raised:
        fetch_model(NAME, MODEL_COMMIT)
    assert time.perf_counter() - start < 5 and raised.value.code == "hub-unreachable"
    server.faults.clear()
    fetch_model(NAME, MODEL_COMMIT)


UNKNOWN = {
    "There is no model nobody/nothing, neither a path here nor on the Hub": lambda: fetch_model("nobody/nothing"),
    "There is no model two words, neither": lambda: fetch_model("two words"),
    "There is no dataset nobody/nothing": lambda: load_rows("nobody/nothing"),
    "has no revision 0123456": lambda: fetch_model(NAME, "0123456"),
    "some/thing on the Hub has no config.json": lambda: fetch_model("some/thing"),
}


@pytest.mark.parametrize("said", UNKNOWN)
def test_what_is_not_on_the_hub_is_named(said, server):
    server.repositories["models/some/thing"] = server.repositories[DATASET]  # its files under a model's name
    with pytest.raises(AlpacaError, match=said) as raised:
        UNKNOWN[said]()
    assert raised.value.code == "hub-unknown"


def test_a_gated_model_says_to_accept_its_terms(server):
    server.faults.append(Fault("* openai-community/*", status=403, reason="GatedRepo"))
    with pytest.raises(AlpacaError, match=f"{NAME} wants its terms accepted.*hf auth login") as raised:
        fetch_model(NAME, MODEL_COMMIT)
    assert raised.value.code == "hub-gated"


def test_a_model_that_does_not_fit_is_refused_from_the_cache_too(server, tmp_path, monkeypatch):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    server.add("models/some/bert", tmp_path / "bert", MODEL_COMMIT)
    for _ in range(2):
        with pytest.raises(AlpacaError) as raised:
            fetch_model("some/bert")
        assert raised.value.code == "model-unsuited"
        point_to(refused(), hub.Path(constants.HF_HUB_CACHE).parent, monkeypatch)


@pytest.mark.parametrize("part, file", [("model", "*cdn/*"), ("dataset", "*cdn/*"), ("model", "*config.json")])
def test_busy_for_a_while_is_waited_for(part, file, server, capsys):
    server.faults += [Fault("GET api/*/revision/*", times=3, status=503), Fault(f"GET {file}", times=2, status=503)]
    LOADERS[part]()
    assert "The Hub is busy (503): again in" in capsys.readouterr().out
    assert sum(" 503 " in line for line in server.log) == 5


def test_busy_for_good_is_one_sentence_and_the_next_run_works(server):
    server.faults.append(Fault("GET cdn/*", status=503))
    with pytest.raises(AlpacaError, match="503.*try again later") as raised:
        fetch_model(NAME, MODEL_COMMIT)
    assert "\n" not in str(raised.value) and raised.value.code == "hub-unreachable"
    server.faults.clear()
    fetch_model(NAME, MODEL_COMMIT)


def test_cut_short_is_taken_up_where_it_broke_off(server):
    server.faults.append(Fault("GET cdn/*", times=1, cut_at=15 << 20))
    model = AutoModelForCausalLM.from_pretrained(fetch_model(NAME, MODEL_COMMIT))
    saved = load_file(server.repositories[MODEL].folder / "model.safetensors")
    assert torch.equal(model.transformer.wte.weight, saved["wte.weight"])
    sent = [int(line.split()[-1]) for line in server.log if line.startswith("GET /cdn/")]
    assert sent[0] == 15 << 20 and sent[1] < 21_000_000  # the second try asked for the rest only


def test_cut_short_for_good_leaves_nothing_half_and_the_next_run_works(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    server.faults.append(Fault("GET cdn/*", cut_at=10_000))
    with pytest.raises(AlpacaError, match="could not be fetched.*PROFILE=pocket"):
        load_rows(ALPACA, DATASET_COMMIT)
    for _ in range(2):  # the second begins with a cache that is not whole
        with pytest.raises(AlpacaError, match="could not be fetched.*PROFILE=pocket"):
            fetch_model(NAME, MODEL_COMMIT)
    server.faults.clear()
    assert len(load_rows(ALPACA, DATASET_COMMIT)) == ROWS
    fetch_model(NAME, MODEL_COMMIT)


def test_a_hub_that_goes_away_halfway_is_one_sentence(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hf_hub_download(NAME, "config.json")  # a part of it is in the cache
    server.faults.append(Fault("GET api/*/tree/*", status=503))
    with pytest.raises(AlpacaError, match="could not be fetched.*PROFILE=pocket") as raised:
        fetch_model(NAME)
    assert raised.value.code == "hub-unreachable"


def test_slow_is_waited_for(server):
    server.faults += [Fault("* api/*", delay=1.5), Fault("* cdn/*", rate=2e5)]
    assert len(load_rows(ALPACA, DATASET_COMMIT)) == ROWS


def test_a_damaged_weight_file_is_never_loaded_and_after_the_advice_it_is_whole(server, tmp_path):
    weights = fetch_model(NAME, MODEL_COMMIT) / "model.safetensors"
    weights.resolve().write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(AlpacaError, match="cannot be loaded .*delete .* and run again") as raised:
        fetch_model(NAME, MODEL_COMMIT)
    assert raised.value.code == "model-broken"
    shutil.rmtree(re.search("delete (.*) and run again", str(raised.value))[1])
    load_base(NAME, MODEL_COMMIT)


def test_the_documents_own_lines_work_against_the_stand_in(server):
    assert encodes(AutoTokenizer.from_pretrained(NAME))
    assert AutoModelForCausalLM.from_pretrained(NAME, use_safetensors=True).config.n_layer == 2
    assert datasets.load_dataset(ALPACA)["train"].num_rows == ROWS
    assert any(ALPACA_FILE in line for line in server.log)


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
