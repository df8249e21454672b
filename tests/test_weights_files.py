"""Checkpoint files that are damaged, hostile or something else: a `WeightsError`, and nothing of them is run."""

from __future__ import annotations

import argparse
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from dinov2_fast import WeightsError, load
from tests.checkpoints import assert_same
from tests.places import TINY, tiny_backbone, tiny_weights, write

ENDINGS = (".safetensors", ".pth")


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_backbone(monkeypatch)


def content(ending: str, weights: dict[str, Any] | None = None, **options: Any) -> bytes:
    """The bytes of a whole checkpoint."""
    weights = tiny_weights(0) if weights is None else weights
    if ending == ".safetensors":
        return save(weights)
    file = io.BytesIO()
    torch.save(weights, file, **options)
    return file.getvalue()


def refusal(path: Path, data: bytes) -> str:
    """The message for a file of these bytes."""
    path.write_bytes(data)
    with pytest.raises(WeightsError) as caught:
        load(TINY, weights=path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_payload_is_refused_and_not_run(nested: bool, archive: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    hostile = {**tiny_weights(0), "payload": Payload(trace)}
    hostile = {"teacher": hostile} if nested else hostile
    data = content(".pth", hostile, _use_new_zipfile_serialization=archive)
    message = refusal(tmp_path / "hostile.pth", data)
    assert not trace.exists()
    assert "holds more than tensors (posix.mkdir), and loading it could run code, so it was refused" in message
    assert "weights_only" not in message  # torch's own advice is to switch the protection off
    run, arguments = Payload(trace).__reduce__()
    run(*arguments)
    assert trace.exists()  # the payload is a real one


def test_a_harmless_object_is_refused_and_named(tmp_path: Path) -> None:
    weights = {**tiny_weights(0), "args": argparse.Namespace(lr=1.0)}
    assert "more than tensors (argparse.Namespace)" in refusal(tmp_path / "args.pth", content(".pth", weights))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_program_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), file)
    assert "holds a TorchScript program" in refusal(tmp_path / "program.pth", file.getvalue())


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("ending", [*ENDINGS, "old.pth"])
def test_a_truncated_file(ending: str, part: float, tmp_path: Path) -> None:
    whole = content(Path(ending).suffix or ending, _use_new_zipfile_serialization=not ending.startswith("old"))
    message = refusal(tmp_path / f"part{ending}", whole[: int(len(whole) * part)])
    assert "is damaged or no" in message
    assert "Delete it and fetch it again" in message


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><p>Sign in to the network</p>", b"version https://git-lfs\n", b"\0"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_something_else_under_the_name(ending: str, data: bytes, tmp_path: Path) -> None:
    message = refusal(tmp_path / f"page{ending}", data)
    assert "is damaged or no" in message
    assert "could run code" not in message


@pytest.mark.parametrize("ending", ENDINGS)
def test_flipped_bits_outside_the_tensors(ending: str, tmp_path: Path) -> None:
    """Each is an error or changes nothing; no other exception comes out."""
    weights = tiny_weights(0)
    whole = content(ending)
    start = 0 if ending == ".safetensors" else whole.index(b"PK\x01\x02")
    end = 8 + int.from_bytes(whole[:8], "little") if ending == ".safetensors" else len(whole)
    path = tmp_path / f"flipped{ending}"
    errors = 0
    positions = [*range(start, start + 8), *range(start + 8, end, 61)]
    for position in positions:
        data = bytearray(whole)
        data[position] ^= 0x04
        path.write_bytes(data)
        try:
            model = load(TINY, weights=path)
        except WeightsError:
            errors += 1
        else:
            assert_same(model.state_dict(), weights)
    assert errors > 0.3 * len(positions)


@pytest.mark.parametrize("loaded", [[torch.ones(2)], torch.ones(2), "text", 3, None])
def test_a_pth_that_holds_no_dictionary(loaded: Any, tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save(loaded, file)
    assert f"holds a {type(loaded).__name__}, not a state dict" in refusal(tmp_path / "odd.pth", file.getvalue())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"norm.weight": [1.0, 2.0]}, "norm.weight must be a tensor of floating-point numbers, .* have list"),
        (
            {"norm.weight": torch.ones(64, dtype=torch.int8)},
            "norm.weight must be .*, but these weights have torch.int8",
        ),
        ({3: torch.ones(1)}, r"keys of a state dict are names, but these are \['cls_token'"),
        ({"module.norm.weight": torch.ones(64)}, "'norm.weight' and 'module.norm.weight' both name"),
        ({"cls_token": torch.ones(())}, r"Wrong shape \(1\): cls_token \(\) where the model has \(1, 1, 64\)"),
    ],
)
def test_a_dictionary_with_wrong_things_in_it(spoil: dict[Any, Any], message: str, tmp_path: Path) -> None:
    path = write({**tiny_weights(0), **spoil}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=message):
        load(TINY, weights=path)
    with pytest.raises(WeightsError):
        load(path)


@pytest.mark.parametrize("spoil", [{"patch_embed.proj.weight": torch.ones(2, 3)}, {"pos_embed": torch.ones(5)}])
def test_sizes_cannot_be_read_from_tensors_of_another_rank(spoil: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="patch_embed or pos_embed has another rank"):
        load(write({**tiny_weights(0), **spoil}, tmp_path / "odd.pth"))


def test_parts_that_cannot_be_joined(tmp_path: Path) -> None:
    attention = "encoder.layer.0.attention.attention."
    weights = {f"{attention}{part}.weight": torch.ones(4, 4) for part in ("query", "key")}
    weights[f"{attention}value.weight"] = torch.ones(4, 5)
    weights["embeddings.cls_token"] = torch.ones(1, 1, 4)
    complete = {key: tensor for key, tensor in tiny_weights(0).items() if key not in ("cls_token", "mask_token")}
    complete.pop("blocks.0.attn.qkv.weight")
    path = write({**complete, **weights, "embeddings.mask_token": torch.ones(1, 4)}, tmp_path / "ragged.pth")
    with pytest.raises(WeightsError, match=r"value\.weight do not make up a blocks\.0\.attn\.qkv\.weight"):
        load(TINY, weights=path)


def test_an_ending_that_is_unknown(tmp_path: Path) -> None:
    for name in ("weights.onnx", "weights"):
        path = tmp_path / name
        path.write_bytes(b"x")
        with pytest.raises(WeightsError, match=r"no checkpoint known here; the endings are \.safetensors, \.pth"):
            load(path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "a/b.pth", "..\\outside.pth"])
def test_an_index_may_not_leave_its_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(tiny_weights(0), tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"cls_token": name.replace("/outside", f"{tmp_path}/outside", 1)}}))
    with pytest.raises(WeightsError, match="outside its folder; refused"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "..", "notes.txt", "", 5])
def test_an_index_names_only_checkpoints(name: Any, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"cls_token": name}}))
    with pytest.raises(WeightsError, match="refused"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "\x00"])
def test_an_index_that_is_none(text: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(WeightsError, match="is no index of a sharded checkpoint"):
        load(index)


def test_an_index_whose_files_are_missing(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"cls_token": "model-1.safetensors"}}))
    with pytest.raises(WeightsError, match=r"names files that are not beside it: model-1\.safetensors"):
        load(tmp_path)
