"""A stand-in for the Hub on loopback: what `from_pretrained` and `load_dataset` ask, answered from folders.

Large files are redirected to another address with their size and hash in the headers, as the Hub does; small ones are
served where they are. `faults` makes it misbehave.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow
import pyarrow.parquet
import torch
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
    cut_at: int = -1  # close the connection after so many bytes of the body
    delay: float = 0  # seconds before the answer


@dataclass
class Repository:
    folder: Path
    commit: str

    def files(self) -> dict[str, Path]:
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in found}


@dataclass
class Hub:
    """The server: `with Hub() as hub`, then `hub.url`. Repositories are keyed by `models/owner/name` and so on."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    log: list[str] = field(default_factory=list)  # "METHOD path status bytes"

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.elsewhere = f"http://localhost:{self.server.server_address[1]}"  # another host, as the Hub's storage is
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def next_fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fnmatch(request, fault.pattern):
                fault.times -= 1
                return fault
        return None


@lru_cache
def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        address = urlsplit(self.path)
        path, query = unquote(address.path).strip("/"), parse_qs(address.query)
        self.fault = self.hub.next_fault(f"{self.command} {path}") or Fault("")
        threading.Event().wait(self.fault.delay)  # a test may have put an end to time.sleep
        if self.fault.status:
            reason = {"X-Error-Code": self.fault.reason} if self.fault.reason else {}
            return self._send(self.fault.status, b'{"error": "out of order"}', reason)
        try:
            if path.startswith("cdn/"):
                self._send_file(self._by_hash(path.removeprefix("cdn/")))
            elif path.startswith("api/"):
                content = self._api(path.removeprefix("api/"), query, body)
                self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
            else:
                self._resolve(path)
        except LookupError as missing:
            self._send(404, b"", {"X-Error-Code": missing.args[0], "X-Error-Message": "there is none"})

    do_HEAD = do_POST = do_GET

    def _resolve(self, path: str) -> None:
        """Send a file of a repository, or where the Hub's storage has it."""
        key, _, rest = path.partition("/resolve/")
        repository, name = self._find(key if key.startswith("datasets/") else f"models/{key}", rest)
        commit, file = {"X-Repo-Commit": repository.commit}, repository.files().get(name)
        if file is None:
            return self._send(404, b"", commit | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"})
        if file.suffix not in LARGE:
            return self._send_file(file, commit | {"ETag": f'"{_git_hash(file)}"'})
        linked = {"X-Linked-Size": str(file.stat().st_size), "X-Linked-ETag": f'"{_sha256(file)}"'}
        self._send(302, b"", commit | linked | {"Location": f"{self.hub.elsewhere}/cdn/{_sha256(file)}"})

    def _find(self, key: str, rest: str) -> tuple[Repository, str]:
        """Return a repository and what follows the revision in `rest`; LookupError with the Hub's code if need be."""
        revision, _, name = rest.partition("/")
        if key not in self.hub.repositories:
            raise LookupError("RepoNotFound")
        if revision not in ("", "main", self.hub.repositories[key].commit):
            raise LookupError("RevisionNotFound")
        return self.hub.repositories[key], name

    def _api(self, path: str, query: dict, body: str) -> object:
        kind, owner, name, action, *rest = (path + "/" * 4).split("/")
        repository, inner = self._find(f"{kind}/{owner}/{name}", "/".join(rest).strip("/"))
        entries = [self._entry(name, file) for name, file in repository.files().items()]
        if action in ("", "revision"):
            blobs = ("rfilename", "size", "blobId", "lfs") if "blobs" in query else ("rfilename",)
            siblings = [{key: e[key] for key in blobs if key in e} for e in entries]
            content = {"id": f"{owner}/{name}", "sha": repository.commit, "siblings": siblings, "private": False}
            return content | {"tags": [], "downloads": 0, "likes": 0}
        folders = sorted({str(parent) for e in entries for parent in Path(e["path"]).parents} - {"."})
        entries = [{"type": "directory", "oid": "0" * 40, "path": f, "size": 0} for f in folders] + entries
        if action == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            return [e for e in entries if e["path"] in asked]
        if action != "tree" or (inner and inner not in folders):
            raise LookupError("EntryNotFound")
        below = [e for e in entries if not inner or e["path"].startswith(inner + "/")]
        whole = query.get("recursive") in (["True"], ["true"], ["1"])
        return [e for e in below if whole or str(Path(e["path"]).parent) == (inner or ".")]

    def _entry(self, name: str, file: Path) -> dict:
        size, oid = file.stat().st_size, _git_hash(file) if file.suffix not in LARGE else "0" * 40
        entry = {"type": "file", "path": name, "rfilename": name, "size": size, "oid": oid, "blobId": oid}
        if file.suffix in LARGE:
            entry["lfs"] = {"oid": _sha256(file), "sha256": _sha256(file), "size": size, "pointerSize": 134}
        return entry

    def _by_hash(self, sha256: str) -> Path:
        files = (file for repository in self.hub.repositories.values() for file in repository.files().values())
        return next(file for file in files if file.suffix in LARGE and _sha256(file) == sha256)

    def _send_file(self, file: Path, headers: dict[str, str] | None = None) -> None:
        size = file.stat().st_size
        start, end, status = 0, size - 1, 200
        headers = dict(headers or {}) | {"Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range", "").removeprefix("bytes="):
            first, _, last = asked.partition("-")
            start, end, status = int(first), min(int(last or end), end), 206
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        with file.open("rb") as content:
            content.seek(start)
            self._send(status, content, headers, end - start + 1)

    def _send(self, status: int, body, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        length = len(body) if length is None else length
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        sent, cut = 0, self.fault.cut_at
        try:
            self.end_headers()
            while self.command != "HEAD" and sent < length and sent != cut:
                step = min(1 << 20, length - sent, cut - sent if cut >= 0 else length)
                self.wfile.write(body[sent : sent + step] if isinstance(body, bytes) else body.read(step))
                sent += step
            self.close_connection = sent == cut
        except (BrokenPipeError, ConnectionResetError):  # the caller hung up
            self.close_connection = True
        self.hub.log.append(f"{self.command} {unquote(self.path)} {status} {sent}")


# What the two repositories hold

MODEL, MODEL_COMMIT = "models/openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"
DATASET, DATASET_COMMIT = "datasets/tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017"
ALPACA_FILE, ALPACA_ROWS = "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", 52_002


def write_model(folder: Path, vocabulary: Path, layers: int = 2, width: int = 64, heads: int = 2) -> None:
    """Write a random GPT-2 as gpt2-medium lies on the Hub: tensors without a prefix, and the layers' masks.

    Args:
        vocabulary: folder with GPT-2's `vocab.json` and `merges.txt`.
    """
    tokenizer = GPT2Tokenizer(vocab=str(vocabulary / "vocab.json"), merges=str(vocabulary / "merges.txt"))
    tokenizer.save_pretrained(folder)  # tokenizer.json
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((vocabulary / name).read_bytes())
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": 1024, "n_ctx": 1024}
    sampling = {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": len(tokenizer)} | shape | ends
    (folder / "config.json").write_text(json.dumps(config | sampling))
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True} | ends))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**config))
    tensors = {name: value.contiguous() for name, value in model.transformer.state_dict().items()}
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
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / ALPACA_FILE)
    features = "".join(f"  - name: {name}\n    dtype: string\n" for name in columns)
    splits = f"  splits:\n  - name: train\n    num_examples: {count}\n"
    card = f"---\nlicense: cc-by-nc-4.0\npretty_name: Alpaca\ndataset_info:\n  features:\n{features}{splits}---\n"
    (folder / "README.md").write_text(card)


def stand_in(folder: Path, data: Path, rows: int = ALPACA_ROWS, **shape) -> Hub:
    """Return a Hub with both repositories under their real names and commits, written to `folder` from real `data`."""
    write_model(folder / "model", data / "gpt2-tokenizer", **shape)
    write_dataset(folder / "dataset", json.loads((data / "alpaca_en_demo.json").read_text(encoding="utf-8")), rows)
    model, dataset = Repository(folder / "model", MODEL_COMMIT), Repository(folder / "dataset", DATASET_COMMIT)
    return Hub({MODEL: model, DATASET: dataset})
