"""onnxruntime and OpenVINO as peers: they compute the same as our model, which is exported once for each shape."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import records, runtimes
from bench.harness import TINY
from bench.peers import OURS, Peer
from bench.runtimes import ONNXRUNTIME, OPENVINO, ExportedModel
from dinov2_fast.model import DinoVisionTransformer
from tests.reference import assert_obeys_rule

REGISTERS = dataclasses.replace(TINY, name="tiny_reg", num_register_tokens=4)


def _model(config: object = TINY) -> nn.Module:
    torch.manual_seed(0)
    with torch.inference_mode(False):
        return DinoVisionTransformer(**config.constructor_arguments()).eval()


def _images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("peer", [ONNXRUNTIME, OPENVINO], ids=lambda peer: peer.name)
@pytest.mark.parametrize("config", [TINY, REGISTERS], ids=lambda config: config.name)
@pytest.mark.parametrize("size", [(28, 42), (518, 518)], ids=str)  # the second is the size of the position embeddings
@torch.inference_mode()
def test_runtimes_compute_the_same_as_our_model(peer: Peer, config: object, size: tuple[int, int]) -> None:
    pytest.importorskip(peer.name)
    model, x = _model(config), _images(1, 3, *size)
    built = peer.build(config, model, 0.0).to(x.device, x.dtype).eval()
    for output in ("all", "cls"):
        usual = OURS.result(model, x, output)
        exact = OURS.result(_model(config).double(), x.double(), output)
        assert_obeys_rule(peer.result(built, x, output), exact, usual)


def test_each_output_and_shape_is_exported_once_and_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started: list[Path] = []
    monkeypatch.setattr(runtimes, "export", lambda model, path, **settings: path.touch())
    exported = ExportedModel(_model(), lambda path: started.append(path) or (lambda pixels: [pixels]))
    for output, batch in (("all", 1), ("cls", 1), ("cls", 2), ("cls", 1), ("all", 1)):
        exported(_images(batch, 3, 28, 28), output)
    assert len(started) == 3
    assert not list(tmp_path.iterdir())


def test_runtimes_refuse_bf16_and_training() -> None:
    with pytest.raises(NotImplementedError, match="only in fp32 on a CPU"):
        ONNXRUNTIME.call["cls"](ONNXRUNTIME.build(TINY, _model(), 0.0), _images(1, 3, 28, 28).bfloat16())
    with pytest.raises(NotImplementedError, match="does not train"):
        ONNXRUNTIME.build(TINY, _model(), 0.3)


def test_a_runtime_that_is_not_installed_is_missing_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "version", lambda package: None if package == "openvino" else "1")
    assert runtimes._runtime_peer("openvino", lambda path: lambda pixels: []).missing == "openvino is not installed"
