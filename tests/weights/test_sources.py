"""Where weights are found without a download: the hub's cache, offline; and a hub that is asked for what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import dinov2_fast
from dinov2_fast import WeightsError, configs, load
from dinov2_fast.weights import sources
from tests.helpers.checkpoints import assert_same, huggingface
from tests.helpers.local_server import REPOSITORY, Server, isolate_without_servers, point_to, put_on_hub
from tests.helpers.weight_folders import COMMIT, TINY, WeightFolders, put_in_hub_cache, refuse_network, tiny_weights
from tests.helpers.weight_folders import write as write_weights


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> WeightFolders:
    return isolate_without_servers(monkeypatch, tmp_path / "folders")


def hub_files(folder: Path, weights: dict[str, torch.Tensor], heads: int = 1) -> dict[str, bytes]:
    """What a hub repository of a transformers model holds, also written into `folder`."""
    files = {
        "model.safetensors": save(huggingface(weights), metadata={"format": "pt"}),
        "config.json": json.dumps({"model_type": "dinov2", "num_attention_heads": heads}).encode(),
    }
    return put(folder, files)


def sharded_hub_files(folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, bytes]:
    content = huggingface(weights)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {key: names[i % 2] for i, key in enumerate(content)}
    shards = [{key: content[key] for key, its in weight_map.items() if its == name} for name in names]
    index = {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}
    return put(folder, index | {name: save(shard) for name, shard in zip(names, shards, strict=True)})


def put(folder: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files


# The hub's cache, without network


@pytest.mark.parametrize("name", [TINY, REPOSITORY])
@pytest.mark.parametrize("make", [hub_files, sharded_hub_files])
@pytest.mark.parametrize("local_files_only", [True, False])
def test_weights_in_the_hubs_cache_are_loaded_without_a_network(
    name: str,
    make: Any,
    local_files_only: bool,
    folders: WeightFolders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = tiny_weights(1)
    make(tmp_path / "files", weights)
    put_in_hub_cache(folders, REPOSITORY, tmp_path / "files")
    attempts = refuse_network(monkeypatch)
    assert_same(load(name, local_files_only=local_files_only).state_dict(), weights)
    assert attempts == []


def test_a_revision_in_the_hubs_cache_is_loaded(
    folders: WeightFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tiny_weights(1)
    hub_files(tmp_path / "files", weights, heads=2)
    put_in_hub_cache(folders, REPOSITORY, tmp_path / "files", revision="v2")
    attempts = refuse_network(monkeypatch)
    model = load(REPOSITORY, revision="v2", local_files_only=True)
    assert_same(model.state_dict(), weights)
    assert model.num_heads == 2
    assert load(REPOSITORY, revision=COMMIT, local_files_only=True).num_heads == 2
    with pytest.raises(WeightsError, match="facebook/dinov2-tiny is not in the Hugging Face cache"):
        load(REPOSITORY, local_files_only=True)
    assert attempts == []


def test_local_files_only_sends_no_request(folders: WeightFolders, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = refuse_network(monkeypatch)
    for name in (TINY, REPOSITORY):
        with pytest.raises(WeightsError, match="is not in the Hugging Face cache"):
            load(name, local_files_only=True)
    assert attempts == []


def test_offline_the_message_says_which_file_to_put_where(
    folders: WeightFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_network(monkeypatch)
    with pytest.raises(WeightsError) as caught:
        load(TINY)
    message = str(caught.value)
    assert f"The weights of {TINY} are not on this machine and could not be downloaded" in message
    assert "the hub does not answer: there is no network, or HF_HUB_OFFLINE is set" in message
    url = f"{configs.OFFICIAL_URL}/dinov2_vitt14/dinov2_vitt14_pretrain.pth"
    assert f"Download {url} on a machine with a network" in message
    path = folders.cache / "dinov2_vitt14_pretrain.pth"
    assert f"put it at {path} (DINOV2_FAST_CACHE sets the folder)" in message
    write_weights(tiny_weights(5), path)
    assert_same(load(TINY).state_dict(), tiny_weights(5))


def test_a_fresh_process_sends_no_request_for_imports_and_cached_weights(
    folders: WeightFolders, tmp_path: Path
) -> None:
    hub_files(tmp_path / "files", tiny_weights(1))
    put_in_hub_cache(folders, REPOSITORY, tmp_path / "files")
    script = """
import importlib, pkgutil, socket, sys
asked = []
def refuse(*args, **kwargs):
    asked.append(args)
    raise OSError("no network")
for name in ("getaddrinfo", "create_connection", "gethostbyname"):
    setattr(socket, name, refuse)
socket.socket.connect = refuse
import dinov2_fast
for module in pkgutil.walk_packages(dinov2_fast.__path__[:1], "dinov2_fast."):
    if not module.name.endswith(("__main__", "._cuda")):  # the extension is no module
        importlib.import_module(module.name)
import hubconf
[getattr(dinov2_fast, name) for name in dinov2_fast.__all__]
dinov2_fast.load("facebook/dinov2-tiny")
print("dinov2_fast.weights.sources" in sys.modules, len(asked))
"""
    root = Path(dinov2_fast.__file__).parents[1]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(folders.huggingface)}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (result.stdout.split(), result.returncode) == (["True", "0"], 0), result.stderr


# A hub that answers


@pytest.mark.parametrize("name", [TINY, REPOSITORY])
@pytest.mark.parametrize("make", [hub_files, sharded_hub_files])
def test_weights_from_the_hub_are_downloaded_once(
    name: str, make: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tiny_weights(2)
    put_on_hub(server, make(tmp_path / "files", weights))
    point_to(monkeypatch, hub=server.address)
    assert_same(load(name).state_dict(), weights)
    asked = len(server.requests)
    assert asked > 0
    assert_same(load(name).state_dict(), weights)
    assert len(server.requests) == asked


def test_a_shard_missing_from_the_hubs_cache_is_downloaded(
    server: Server, folders: WeightFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tiny_weights(2)
    put_on_hub(server, sharded_hub_files(tmp_path / "files", weights))
    (tmp_path / "files" / "model-00002-of-00002.safetensors").unlink()
    put_in_hub_cache(folders, REPOSITORY, tmp_path / "files")
    with pytest.raises(WeightsError, match="is not in the Hugging Face cache"):
        load(REPOSITORY, local_files_only=True)
    point_to(monkeypatch, hub=server.address)
    assert_same(load(REPOSITORY).state_dict(), weights)


def test_a_config_is_downloaded_without_the_weights(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_hub(server, hub_files(tmp_path / "files", tiny_weights(0), heads=3))
    point_to(monkeypatch, hub=server.address)
    assert json.loads(sources.find_config(REPOSITORY).read_text())["num_attention_heads"] == 3
    assert not any("model.safetensors" in request for request in server.requests)


@pytest.mark.parametrize("repository", [REPOSITORY, "facebook/nobody"])
def test_a_hub_without_the_weights_is_an_error(
    repository: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on_hub(server, {"README.md": b"no weights here"})
    point_to(monkeypatch, hub=server.address)
    with pytest.raises(WeightsError, match=r"is not in the Hugging Face cache and could not be downloaded \(.+\)"):
        load(repository)


@pytest.mark.parametrize("name", ["a/b/c", "no such file.xyz", "https://example.org/x"])
def test_names_that_are_no_hub_id_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = refuse_network(monkeypatch)
    with pytest.raises(WeightsError, match="is no file or folder here, and no hub id"):
        load(name)
    assert attempts == []
