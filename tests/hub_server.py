"""A server on this machine that speaks as much of the hub's protocol as its client asks for.

It misbehaves on demand: cut connections, busy answers, closed doors. It serves one folder for each
commit of one repository.
"""

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPO = "somebody/tiny-v3"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HEADER_RANGE = "bytes=0-262143"


class Hub(ThreadingHTTPServer):
    """Serves one folder as a repository; `push` makes another one its newest commit.

    `faults` maps a file name to what goes wrong with downloads of it, one after the other:
    ("cut", bytes) or ("status", code).
    """

    daemon_threads = True

    def __init__(self, folder: Path, repo: str = REPO):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.repo = folder, repo
        self.commits, self.main = {COMMIT: folder}, COMMIT
        self.closed = None  # status for every request
        self.about: bytes | dict = {}  # instead of what it says of the repository, or beside
        self.ignores_ranges = False
        self.faults: dict[str, list[tuple[str, int]]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.bytes_sent: dict[str, int] = {}

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that has read enough
            super().handle_error(request, client_address)

    def push(self, commit: str, folder: Path) -> None:
        self.commits[commit], self.main = folder, commit

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool):
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers["Range"]))
        if self.server.closed in (301, 302):
            return self.send(b"", with_body, self.server.closed, Location=self.path)
        if self.server.closed:
            return self.refuse(self.server.closed)
        commits, repo = self.server.commits, self.server.repo
        if match := re.fullmatch(f"/api/models/{repo}(?:/revision/(.+))?", path):
            commit = self.server.main if match[1] in (None, "main") else match[1]
            if commit not in commits:
                return self.refuse(404, "RevisionNotFound")
            if isinstance(self.server.about, bytes):
                return self.send(self.server.about, with_body)
            names = {"id": repo, "modelId": repo, "sha": commit}
            about = describe(commits[commit]) | names | self.server.about
            return self.send(json.dumps(about).encode(), with_body)
        if match := re.fullmatch(f"/api/models/{repo}/tree/([0-9a-f]+)", path):
            return self.send(json.dumps(tree(commits[match[1]])).encode(), with_body)
        match = re.fullmatch(f"/{repo}/resolve/([0-9a-f]+)/(.+)", path)
        if not match or not (commits.get(match[1], Path()) / match[2]).is_file():
            return self.refuse(404)
        self.send_file(*match.groups(), with_body)

    def refuse(self, status: int, code: str | None = None):
        codes = {401: "RepoNotFound", 404: "RepoNotFound", 403: "GatedRepo"}
        self.send_response(status)
        if status in codes:
            self.send_header("X-Error-Code", code or codes[status])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, body: bytes, with_body: bool, status: int = 200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def send_file(self, commit: str, name: str, with_body: bool):
        data = (self.server.commits[commit] / name).read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X_Repo_Commit": commit,
            "Accept_Ranges": "bytes",
        }
        status, body = 200, data
        asked = "" if self.server.ignores_ranges else self.headers["Range"] or ""
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", asked):
            begin, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            body, status = data[begin : end + 1], 206
            headers["Content_Range"] = f"bytes {begin}-{end}/{len(data)}"
        fault, is_part = None, bool(found and found[2])  # headers and small tensors
        if with_body and not is_part and self.server.faults.get(name):
            fault = self.server.faults[name].pop(0)
        if fault and fault[0] == "status":
            return self.refuse(fault[1])
        if with_body and not is_part:
            sent = fault[1] if fault else len(body)
            self.server.bytes_sent[name] = self.server.bytes_sent.get(name, 0) + sent
        if not fault:
            return self.send(body, with_body, status, **headers)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: fault[1]])
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()


def describe(folder: Path) -> dict:
    """Return what the hub's API says about a repository."""
    siblings = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        entry = {"rfilename": name, "size": path.stat().st_size, "blobId": "0" * 40}
        if path.suffix == ".safetensors":
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            entry["lfs"] = {"size": entry["size"], "sha256": sha256, "pointerSize": 134}
        siblings.append(entry)
    return {"siblings": siblings, "tags": []}


def tree(folder: Path) -> list[dict]:
    """Return what the hub's API says about the files of a repository."""
    return [
        {"type": "file", "path": each["rfilename"], "size": each["size"], "oid": each["blobId"]}
        for each in describe(folder)["siblings"]
    ]


@contextmanager
def serve(folder: Path, repo: str = REPO) -> Iterator[Hub]:
    server = Hub(folder, repo)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def environment(server: Hub, home: Path) -> dict[str, str]:
    """Return the environment of a program that shall know only this server."""
    return os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def know_only(server: Hub, home: Path, monkeypatch) -> None:
    """Make this process know only this server, as `environment` does for another."""
    from huggingface_hub import constants

    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("mlx_dsv3.checkpoint.hub.WAITS_S", ())


def shard_requests(server: Hub) -> list:
    return [r for r in server.requests if r[1].endswith(".safetensors") and r[0] == "GET"]
