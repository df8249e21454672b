"""Checkpoint files that are damaged, hostile or something else: a `WeightsError`, and nothing of them is run."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from dinov2_fast import WeightsError, load
from dinov2_fast.weights.architecture import plan_weights
from dinov2_fast.weights.files import open_weights
from tests.helpers.checkpoints import assert_same
from tests.helpers.weight_folders import TINY, tiny_backbone, tiny_weights, write

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


class Settings:
    """A class of the user's own."""


def test_an_object_of_unknown_kind_is_refused_and_named(tmp_path: Path) -> None:
    weights = {**tiny_weights(0), "settings": Settings()}
    assert f"more than tensors ({__name__}.Settings)" in refusal(tmp_path / "s.pth", content(".pth", weights))


def allowed_stand_ins() -> list[Any]:
    """What torch would make another object of, outside of `load`."""
    return [entry for entry in torch.serialization.get_safe_globals() if isinstance(entry, tuple)]


HARMLESS: dict[str, Any] = {
    "args": argparse.Namespace(lr=1.0, data=Path("data")),
    "path": Path("a/b"),
    "best": np.float64(0.5),
    "dtype": np.dtype("float32"),
    "history": np.arange(3.0),
    "time": datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc),
    "counts": collections.defaultdict(int, a=1),
    "nested": collections.OrderedDict(losses=collections.deque([1.0], maxlen=3), step=Fraction(1, 3)),
    "kind": dict,
}


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_objects_beside_the_weights_are_left_out(name: str, archive: bool, tmp_path: Path) -> None:
    weights = tiny_weights(0)
    for order in ({name: HARMLESS[name], "model": weights}, {"model": weights, name: HARMLESS[name]}):
        path = tmp_path / "checkpoint.pth"
        path.write_bytes(content(".pth", order, _use_new_zipfile_serialization=archive))
        assert_same(load(TINY, weights=path).state_dict(), weights)
    assert allowed_stand_ins() == []


def test_a_payload_beside_harmless_objects_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    hostile = {"args": argparse.Namespace(payload=Payload(trace)), "model": tiny_weights(0)}
    assert "posix.mkdir" in refusal(tmp_path / "hostile.pth", content(".pth", hostile))
    assert not trace.exists()


def test_a_harmless_name_is_neither_imported_nor_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tiny_weights(0)
    data = content(".pth", {"args": argparse.Namespace(lr=1.0), "model": weights})
    calls: list[Any] = []
    monkeypatch.setattr(argparse.Namespace, "__init__", lambda *args, **kwargs: calls.append(args))
    monkeypatch.setattr(argparse.Namespace, "__setstate__", lambda *args: calls.append(args), raising=False)
    (tmp_path / "c.pth").write_bytes(data)
    assert_same(load(TINY, weights=tmp_path / "c.pth").state_dict(), weights)
    assert calls == []


def test_harmless_objects_are_left_out_by_several_threads_at_once(tmp_path: Path) -> None:
    path = write({"args": argparse.Namespace(lr=1.0), "model": tiny_weights(0)}, tmp_path / "c.pth")
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: load(TINY, weights=path), range(12)))
    assert len(models) == 12
    assert allowed_stand_ins() == []


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
        ({3: torch.ones(1)}, "keys of a state dict are names, but these are cls_token, "),
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


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"patch_embed.proj.weight": torch.ones(2, 3)}, r"patch_embed\.proj\.weight has the shape \(2, 3\)"),
        ({"pos_embed": torch.ones(5)}, r"pos_embed has the shape \(5,\), where 3 dimensions are needed"),
        ({"pos_embed": torch.ones(1, 0, 64)}, r"pos_embed has the shape \(1, 0, 64\)"),
        ({"pos_embed": torch.ones(1, 1, 64)}, "pos_embed has no position of a patch"),
        ({"blocks.0.mlp.fc2.weight": torch.ones(())}, r"blocks\.0\.mlp\.fc2\.weight has the shape \(\)"),
        ({"register_tokens": torch.ones(())}, r"register_tokens has the shape \(\)"),
        ({"register_tokens": torch.ones(4)}, r"register_tokens has the shape \(4,\)"),
        ({"norm.weight": torch.ones(64).to_sparse()}, r"norm\.weight \(64,\) is sparse"),
        ({"norm.weight": torch.ones(64, device="meta")}, r"norm\.weight has no values in these weights"),
        ({"norm.weight": torch.ones(1).expand(64)}, r"norm\.weight \(64,\) is expanded from fewer values"),
        ({"pos_embed": torch.zeros(1).expand(1, 10**12 + 1, 64)}, r"pos_embed .* is expanded"),
        ({"blocks.1000000000.ls1.gamma": torch.ones(64)}, r"Unexpected \(1\): blocks\.1000000000\.ls1"),
        ({f"blocks.{'9' * 5000}.ls1.gamma": torch.ones(64)}, r"Unexpected \(1\): blocks\.9999"),
        ({"blocks.100000000.ls1.gamma": torch.ones(64)}, "have a block 100000000 and no block 2"),
        ({f"blocks.{i}.x": torch.ones(1) for i in range(2, 1001)}, "have 1001 blocks; at most 1000"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value))[:30],
)
def test_sizes_that_no_backbone_has_are_refused_at_once(spoil: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write({**tiny_weights(0), **spoil}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=message):
        load(path)
    with pytest.raises(WeightsError):
        load(TINY, weights=path)


def test_a_file_that_unpacks_to_much_more_is_refused(tmp_path: Path) -> None:
    plain = io.BytesIO(content(".pth", {**tiny_weights(0), "zeros": torch.zeros(1 << 22)}))
    path = tmp_path / "deflated.pth"
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(WeightsError, match="times as large in memory, which no checkpoint that PyTorch writes is"):
        load(path)


def test_very_many_tensors_are_refused_before_they_are_looked_at() -> None:
    with pytest.raises(WeightsError, match="A state dict of 20001 keys is none of a DINOv2"):
        plan_weights({f"x{i}": torch.ones(0) for i in range(20_001)})


def test_a_deep_nesting_is_refused() -> None:
    nested: dict[str, Any] = {}
    for _ in range(100_000):
        nested = {"model": nested}
    with pytest.raises(WeightsError, match="not the weights of one DINOv2 backbone"):
        plan_weights(nested)
    while nested:
        nested = nested["model"]


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


@pytest.mark.parametrize("name", ["last.pth.tar", "weights", "model.onnx", "a.safetensors", "a.pth"])
@pytest.mark.parametrize("kind", [*ENDINGS, "old.pth"])
def test_the_content_of_a_file_counts_and_not_its_name(kind: str, name: str, tmp_path: Path) -> None:
    options = {} if kind == ".safetensors" else {"_use_new_zipfile_serialization": kind == ".pth"}
    (tmp_path / name).write_bytes(content(Path(kind).suffix or kind, **options))
    assert_same(load(TINY, weights=tmp_path / name).state_dict(), tiny_weights(0))
    assert_same(load(tmp_path / name).state_dict(), tiny_weights(0))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    path = write(tiny_weights(0), tmp_path / "secret.pth")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(WeightsError, match=r"secret\.pth cannot be read \(Permission denied\)"):
        load(path)


def test_something_that_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("weights.onnx", "weights"):
        path = tmp_path / name
        path.write_bytes(b"x")
        with pytest.raises(WeightsError, match="begins neither as a safetensors nor as a PyTorch file does"):
            load(path)


def test_a_file_replaced_while_it_loads_is_one_file_or_an_error(tmp_path: Path) -> None:
    """Each replacement comes at another tensor; the weights of both files are constant."""
    path, constant = tmp_path / "w.safetensors", {key: torch.zeros_like(x) for key, x in tiny_weights(0).items()}
    messages = []
    for position in range(0, 2 * len(constant), 3):
        write(constant, path)
        write({key: torch.ones_like(x) for key, x in constant.items()}, tmp_path / "new.safetensors")
        source, read = open_weights(path), []
        get = type(source).__getitem__

        def replacing(self: Any, key: str, at: int = position, get: Any = get, read: list[str] = read) -> Any:
            read.append(key)
            if len(read) == at:
                os.replace(tmp_path / "new.safetensors", path)
            return get(self, key)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(source), "__getitem__", replacing)
            try:
                model = load(TINY, weights=path)
            except WeightsError as error:
                messages.append(str(error))
            else:
                assert len({float(x.flatten()[0]) for x in model.state_dict().values()}) == 1
    assert len(messages) > 5
    assert all("was replaced or written to while it was read. Load it again" in message for message in messages)


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
