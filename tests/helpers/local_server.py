"""A hub and an official server on this machine's loopback address, for tests of downloads."""

from __future__ import annotations

import hashlib
import http.server
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from dinov2_fast import configs
from tests.helpers.weight_folders import COMMIT, WeightFolders, isolate, tiny_backbone

REPOSITORY = "facebook/dinov2-tiny"
Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


def point_to(monkeypatch: pytest.MonkeyPatch, **addresses: str) -> None:
    if "hub" in addresses:
        monkeypatch.setattr(constants, "ENDPOINT", addresses["hub"])
        template = addresses["hub"] + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    if "official" in addresses:
        monkeypatch.setattr(configs, "OFFICIAL_URL", addresses["official"])


def unused_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def isolate_without_servers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> WeightFolders:
    """Empty caches in `folder`, the tiny backbone, no proxy, and addresses at which nobody answers."""
    tiny_backbone(monkeypatch)
    monkeypatch.setenv("NO_PROXY", "*")
    point_to(monkeypatch, hub=unused_address(), official=unused_address())
    return isolate(monkeypatch, folder)


class Server:
    """Answers by path from `answers`, other paths with 404; keeps the method and path of each in `requests`."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            do_GET = do_HEAD = lambda request: self._answer(request)

            def log_message(self, *args: Any) -> None:
                """Keeps the output of the tests clean."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def _answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        self.requests.append(f"{request.command} {request.path}")
        self.answers.get(request.path, not_found)(request)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def answer(data: bytes, *, status: int = 200, promised: int | None = None, **headers: str) -> Answer:
    """An answer of `data`, with a Content-Length of `promised` bytes if that is given."""

    def send(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(data) if promised is None else promised))
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data)

    return send


def not_found(request: http.server.BaseHTTPRequestHandler) -> None:
    repository_known = request.path.startswith(f"/{REPOSITORY}/")
    answer(b"", status=404, X_Error_Code="EntryNotFound" if repository_known else "RepoNotFound")(request)


def put_on_hub(server: Server, files: dict[str, bytes], revision: str = "main") -> None:
    server.answers["/"] = answer(b"a hub")
    for name, data in files.items():
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": COMMIT}
        for commit in (revision, COMMIT):
            server.answers[f"/{REPOSITORY}/resolve/{commit}/{name}"] = answer(data, **headers)
