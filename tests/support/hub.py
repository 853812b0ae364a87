"""A stand-in for the Hub on loopback: what `from_pretrained` and `load_dataset` ask, answered from folders.

Large files are redirected to another address with their size and hash in the headers, as the Hub does; small ones are
served where they are. `faults` makes it misbehave.
"""

import hashlib
import json
import mmap
import shutil
import threading
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

LARGE = (".safetensors", ".parquet", ".bin")  # kept outside git on the Hub, hence redirected


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD path" matches `pattern`."""

    pattern: str
    times: int = 10**9
    status: int = 0  # answer this instead
    reason: str = ""  # with this error code of the Hub's
    cut_at: int | None = None  # close the connection after so many bytes of the body
    delay: float = 0  # seconds before the answer


@dataclass
class Repository:
    folder: Path
    commit: str

    def entries(self) -> dict[str, dict]:
        """What the Hub tells of each file and folder, by its path."""
        found = {path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*"))}
        return {name: _entry(name, path) for name, path in found.items()}


@lru_cache
def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(name: str, path: Path) -> dict:
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    size, oid = path.stat().st_size, _sha256(path)[:40]
    entry = {"type": "file", "path": name, "rfilename": name, "size": size, "oid": oid, "blobId": oid}
    if path.suffix in LARGE:
        entry["lfs"] = {"oid": _sha256(path), "sha256": _sha256(path), "size": size, "pointerSize": 134}
    return entry


class Hub(ThreadingHTTPServer):
    """The server: `with Hub(repositories) as hub`, then `hub.url`; these are keyed by `models/owner/name` and so on."""

    def __init__(self, repositories: dict[str, Repository]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.faults = repositories, []
        self.log: list[str] = []  # "METHOD path status bytes"
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.elsewhere = f"http://localhost:{self.server_port}"  # another host, as the Hub's storage is

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()

    def next_fault(self, request: str) -> Fault:
        for fault in self.faults:
            if fault.times > 0 and fnmatch(request, fault.pattern):
                fault.times -= 1
                return fault
        return Fault("")


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path, query = unquote(address.path).strip("/"), parse_qs(address.query)
        self.fault = self.server.next_fault(f"{self.command} {path}")
        threading.Event().wait(self.fault.delay)  # a test may have put an end to time.sleep
        if self.fault.status:
            reason = {"X-Error-Code": self.fault.reason} if self.fault.reason else {}
            return self._send(self.fault.status, reason)
        try:
            if path.startswith("cdn/"):
                self._send_file(self._by_hash(path.removeprefix("cdn/")))
            elif path.startswith("api/"):
                content = json.dumps(self._api(path.removeprefix("api/"), query))
                self._send(200, {"Content-Type": "application/json"}, content.encode())
            else:
                self._resolve(path)
        except LookupError as missing:
            self._send(404, {"X-Error-Code": missing.args[0], "X-Error-Message": "there is none"})

    do_HEAD = do_GET

    def _resolve(self, path: str) -> None:
        """Send a file of a repository, or where the Hub's storage has it."""
        key, _, rest = path.partition("/resolve/")
        repository, name = self._find(key if key.startswith("datasets/") else f"models/{key}", rest)
        commit, file = {"X-Repo-Commit": repository.commit}, repository.folder / name
        if not file.is_file():
            return self._send(404, commit | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"})
        if file.suffix not in LARGE:
            return self._send_file(file, commit | {"ETag": f'"{_sha256(file)[:40]}"'})
        linked = {"X-Linked-Size": str(file.stat().st_size), "X-Linked-ETag": f'"{_sha256(file)}"'}
        self._send(302, commit | linked | {"Location": f"{self.server.elsewhere}/cdn/{_sha256(file)}"})

    def _find(self, key: str, rest: str) -> tuple[Repository, str]:
        """Return a repository and what follows the revision in `rest`; LookupError with the Hub's code if need be."""
        revision, _, name = rest.partition("/")
        if key not in self.server.repositories:
            raise LookupError("RepoNotFound")
        if revision not in ("", "main", self.server.repositories[key].commit):
            raise LookupError("RevisionNotFound")
        return self.server.repositories[key], name

    def _api(self, path: str, query: dict) -> object:
        kind, owner, name, action, *rest = (path + "/" * 4).split("/")
        repository, inner = self._find(f"{kind}/{owner}/{name}", "/".join(rest).strip("/"))
        entries = repository.entries()
        if action in ("", "revision"):
            told = ("rfilename", "size", "blobId", "lfs") if "blobs" in query else ("rfilename",)
            files = [entry for entry in entries.values() if entry["type"] == "file"]
            siblings = [{key: file[key] for key in told if key in file} for file in files]
            content = {"id": f"{owner}/{name}", "sha": repository.commit, "siblings": siblings, "private": False}
            return content | {"tags": [], "downloads": 0, "likes": 0}
        if action != "tree" or (inner and inner not in entries):
            raise LookupError("EntryNotFound")
        whole = query.get("recursive") == ["true"]
        above = {name: Path(name).parents if whole else [Path(name).parent] for name in entries}
        return [entry for name, entry in entries.items() if Path(inner) in above[name]]

    def _by_hash(self, sha256: str) -> Path:
        files = (file for repository in self.server.repositories.values() for file in repository.folder.rglob("*"))
        return next(file for file in files if file.suffix in LARGE and _sha256(file) == sha256)

    def _send_file(self, file: Path, headers: dict[str, str] | None = None) -> None:
        """Send a file, or from where a client that has its beginning asks for the rest."""
        asked = self.headers.get("Range", "")
        start, size = int(asked.removeprefix("bytes=").rstrip("-") or 0), file.stat().st_size
        headers = {"Accept-Ranges": "bytes", "Content-Range": f"bytes {start}-{size - 1}/{size}"} | (headers or {})
        with file.open("rb") as content, mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            with memoryview(whole) as view:
                self._send(206 if asked else 200, headers, view[start:])

    def _send(self, status: int, headers: dict[str, str], body: bytes | memoryview = b"") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        sent = b"" if self.command == "HEAD" else body[: self.fault.cut_at]
        self.close_connection = self.fault.cut_at is not None
        try:
            self.wfile.write(sent)
        except (BrokenPipeError, ConnectionResetError):  # the caller hung up
            self.close_connection = True
        self.server.log.append(f"{self.command} {unquote(self.path)} {status} {len(sent)}")


def point_to(url: str, home: Path, monkeypatch) -> None:
    """Do what HF_ENDPOINT and HF_HOME do at start."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)


# What the two repositories hold

MODEL, MODEL_COMMIT = "models/openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"
DATASET, DATASET_COMMIT = "datasets/tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017"
ALPACA_FILE, ALPACA_ROWS = "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", 52_002


def write_model(folder: Path, vocabulary: Path, layers: int = 2, width: int = 64, heads: int = 2) -> None:
    """Write a random GPT-2 as gpt2-medium lies on the Hub: tensors without a prefix, and the layers' masks.

    `vocabulary` is the folder with GPT-2's `vocab.json` and `merges.txt`.
    """
    tokenizer = GPT2Tokenizer(vocab=str(vocabulary / "vocab.json"), merges=str(vocabulary / "merges.txt"))
    tokenizer.save_pretrained(folder)  # tokenizer.json
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(vocabulary / name, folder)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": len(tokenizer)} | ends
    config |= {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": 1024, "n_ctx": 1024}
    config["task_specific_params"] = {"text-generation": {"do_sample": True, "max_length": 50}}
    for name, content in (
        ("tokenizer_config", {"model_max_length": 1024}),
        ("config", config),
        ("generation_config", {"_from_model_config": True} | ends),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    tensors = GPT2LMHeadModel(GPT2Config(**config)).transformer.state_dict()
    mask = torch.tril(torch.ones(1024, 1024)).view(1, 1, 1024, 1024)
    tensors |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(layers)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "pytorch_model.bin").write_bytes(b"never to be downloaded")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")


def write_dataset(folder: Path, rows: list[dict], count: int) -> None:
    """Write `count` rows, resampled from `rows`, as Alpaca lies on the Hub; no two instructions are the same."""
    columns, table = ("instruction", "input", "output", "text"), []
    for number in range(count):
        copy, index = divmod(number, len(rows))
        row = rows[index] | {"text": f"### Instruction:\n{rows[index]['instruction']}\n\n### Response:"}
        row["instruction"] += f" (variant {copy})" if copy else ""
        table.append({column: row[column] for column in columns})
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_list(table).to_parquet(folder / ALPACA_FILE)
    features = [{"name": column, "dtype": "string"} for column in columns]
    info = {"features": features, "splits": [{"name": "train", "num_examples": count}]}
    card = yaml.safe_dump({"license": "cc-by-nc-4.0", "pretty_name": "Alpaca", "dataset_info": info})
    (folder / "README.md").write_text(f"---\n{card}---\n")


def stand_in(folder: Path, data: Path, rows: int = ALPACA_ROWS, **shape) -> Hub:
    """Return a Hub with both repositories under their real names and commits, written to `folder` from real `data`."""
    write_model(folder / "model", data / "gpt2-tokenizer", **shape)
    write_dataset(folder / "dataset", json.loads((data / "alpaca_en_demo.json").read_text(encoding="utf-8")), rows)
    model, dataset = Repository(folder / "model", MODEL_COMMIT), Repository(folder / "dataset", DATASET_COMMIT)
    return Hub({MODEL: model, DATASET: dataset})
