"""Downloads from the official server: once, whole or not at all."""

from __future__ import annotations

import http.server
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2_fast import WeightsError, load
from dinov2_fast.weights import sources
from tests.helpers.checkpoints import assert_same
from tests.helpers.local_server import Answer, Server, answer, isolate_without_servers, point_to, unused_address
from tests.helpers.weight_folders import TINY, WeightFolders, tiny_weights


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> WeightFolders:
    return isolate_without_servers(monkeypatch, tmp_path / "folders")


def pth(weights: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(weights, file)
    return file.getvalue()


def leftovers(folders: WeightFolders) -> list[Path]:
    return [path for path in folders.cache.rglob("*") if path.is_file()]


def official(server: Server, monkeypatch: pytest.MonkeyPatch, reply: Answer) -> None:
    point_to(monkeypatch, official=server.address)
    server.answers["/dinov2_vitt14/dinov2_vitt14_pretrain.pth"] = reply


def test_the_official_server_is_asked_once(
    server: Server, folders: WeightFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tiny_weights(4)
    official(server, monkeypatch, answer(pth(weights)))
    assert_same(load(TINY).state_dict(), weights)
    assert leftovers(folders) == [folders.cache / "dinov2_vitt14_pretrain.pth"]
    point_to(monkeypatch, official=unused_address())
    assert_same(load(TINY).state_dict(), weights)
    assert server.requests == ["GET /dinov2_vitt14/dinov2_vitt14_pretrain.pth"]


def broken_chunk(request: http.server.BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    request.wfile.write(b"ff\r\nonly a part")


def no_http(request: http.server.BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n")


def flipped(request: http.server.BaseHTTPRequestHandler) -> None:
    data = bytearray(pth(tiny_weights(4)))
    data[len(data) // 2] ^= 0x01  # in a tensor, where loading would not notice
    answer(bytes(data))(request)


def wrong_header(name: str, value: str, status: int = 200) -> Answer:
    def send(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        request.send_header(name, value)
        request.end_headers()

    return send


WRONG_ANSWERS = {
    "length of letters": (wrong_header("Content-Length", "abc"), "could not be downloaded"),
    "redirect to no address": (wrong_header("Location", "http://[::bad", status=302), "could not be downloaded"),
    "missing": (answer(b"", status=404), "404"),
    "error": (answer(b"", status=503), "503"),
    "short": (answer(pth({"cls_token": torch.ones(9)})[:500], promised=100_000), "ended after 500 of 100000"),
    "broken chunk": (broken_chunk, "could not be downloaded"),
    "no http": (no_http, "could not be downloaded"),
    "page": (answer(b"<html>Sign in to the network</html>"), "is damaged or no PyTorch file; it was removed"),
    "empty": (answer(b""), "is damaged or no PyTorch file; it was removed"),
    "flipped": (flipped, "is damaged or no PyTorch file; it was removed"),
}


@pytest.mark.parametrize("case", WRONG_ANSWERS)
def test_a_wrong_answer_leaves_nothing(
    case: str, server: Server, folders: WeightFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply, message = WRONG_ANSWERS[case]
    official(server, monkeypatch, reply)
    with pytest.raises(WeightsError) as caught:
        load(TINY)
    assert message in str(caught.value)
    assert "Download http" in str(caught.value)
    assert leftovers(folders) == []


def test_two_downloads_of_one_file_at_once_both_succeed(server: Server, tmp_path: Path) -> None:
    data, both = pth(tiny_weights(4)), threading.Barrier(2)

    def reply(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        request.wfile.write(data[:100])
        both.wait(timeout=30)  # both have their temporary file open
        request.wfile.write(data[100:])

    server.answers["/shared.pth"] = reply
    with ThreadPoolExecutor(2) as pool:
        path = tmp_path / "shared.pth"
        found = list(pool.map(lambda _: sources.download(f"{server.address}/shared.pth", path), range(2)))
    assert found == [path, path]
    assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_a_server_that_does_not_answer_is_an_error(folders: WeightFolders) -> None:
    with pytest.raises(WeightsError, match=r"could not be downloaded \(.*[Cc]onnection refused"):
        load(TINY)
    assert leftovers(folders) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_download_leaves_nothing(
    error: Any, server: Server, folders: WeightFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    official(server, monkeypatch, answer(pth(tiny_weights(4))))
    seen = []

    def stop(source: Any, target: Any, length: int) -> None:
        target.write(source.read(1000))
        target.flush()
        seen.extend(leftovers(folders))
        raise error

    monkeypatch.setattr(sources.shutil, "copyfileobj", stop)
    with pytest.raises((KeyboardInterrupt, WeightsError)):
        load(TINY)
    assert [path.suffix for path in seen] == [".part"]
    assert leftovers(folders) == []


def test_a_folder_that_cannot_be_made_is_an_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    server.answers["/a.pth"] = answer(pth({}))
    with pytest.raises(WeightsError, match="could not be downloaded"):
        sources.download(f"{server.address}/a.pth", tmp_path / "file" / "a.pth")
