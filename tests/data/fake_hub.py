"""A hub of data sets on this machine: enough of the protocol for `datasets` and `huggingface_hub` to load from it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "c0ffee" + "0" * 34


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def log_message(self, format: str, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        self._asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_api = parts[:1] == ["api"]
        parts = parts[is_api:]
        if parts[:1] != ["datasets"] or len(parts) < 3:
            return self._fail("RepoNotFound", 404)
        repository, (verb, revision, *rest) = self.root.joinpath(*parts[1:3]), parts[3:] or ["revision", "main"]
        if (repository / ".gated").exists():
            return self._fail("GatedRepo", 403)
        if not repository.is_dir():
            return self._fail("RepoNotFound", 404)
        if revision not in ("main", COMMIT):
            return self._fail("RevisionNotFound", 404)
        if is_api and verb == "tree" and not repository.joinpath(*rest).is_dir():
            return self._fail("EntryNotFound", 404)
        if is_api:
            return self._send(json.dumps(self._about(repository, verb, "/".join(rest))).encode(), {}, with_body)
        file = repository.joinpath(*rest)
        if not file.is_file():
            return self._fail("EntryNotFound", 404)
        data = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        return self._send(data, headers, with_body)

    def _about(self, repository: Path, verb: str, path: str) -> object:
        files = [p for p in sorted(repository.rglob("*")) if p.is_file()]
        if verb == "revision":
            siblings = [{"rfilename": p.relative_to(repository).as_posix()} for p in files]
            return {
                "id": "/".join(repository.parts[-2:]),
                "sha": COMMIT,
                "siblings": siblings,
                "private": False,
                "tags": [],
            }
        if verb == "paths-info":
            asked = [repository / p for p in self._asked["paths"]]
            return [self._entry(repository, p) for p in asked if p.exists()]
        below = repository / path
        recursive = "recursive=true" in self.path.lower()
        return [self._entry(repository, p) for p in sorted(below.rglob("*") if recursive else below.iterdir())]

    def _entry(self, repository: Path, path: Path) -> dict[str, object]:
        name = path.relative_to(repository).as_posix()
        oid = hashlib.sha1(name.encode()).hexdigest()
        if path.is_dir():
            return {"type": "directory", "oid": oid, "size": 0, "path": name}
        return {"type": "file", "oid": oid, "size": path.stat().st_size, "path": name}

    def _send(self, data: bytes, headers: dict[str, str], with_body: bool) -> None:
        status, asked = 200, self.headers.get("Range")
        if asked and "ETag" in headers:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            stop = int(last) + 1 if last else len(data)
            headers = {**headers, "Content-Range": f"bytes {first}-{min(stop, len(data)) - 1}/{len(data)}"}
            data, status = data[int(first) : stop], 206
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def _fail(self, code: str, status: int) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serve_hub(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serves the folders `root/OWNER/NAME` as data sets, and points the libraries there."""
    import datasets
    from huggingface_hub import HfFileSystem, constants

    handler = type("Handler", (_Handler,), {"root": root})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    HfFileSystem.clear_instance_cache()
    try:
        yield endpoint
    finally:
        HfFileSystem.clear_instance_cache()
        server.shutdown()
        server.server_close()
        thread.join()
