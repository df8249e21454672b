"""onnxruntime and OpenVINO as peers: what a user may run on a CPU in place of PyTorch.

Both run an ONNX file of our model, written by this project's export. Each batch and image size gets its own file, which
is their best case: sizes are fixed and positions are resampled beforehand. Here they run in fp32, on a CPU only, with
as many threads as PyTorch.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import Peer, not_installed
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.export import INPUT, export

Outputs = list[Any]  # numpy arrays
Session = Callable[[Any], Outputs]


class Exported(nn.Module):
    """Our model in another runtime. The first call for an output and a shape exports it, the next ones only run it.

    Args:
        start: reads an ONNX file, which is deleted afterwards, and gives a function that runs it on a numpy array.
    """

    def __init__(self, model: nn.Module, start: Callable[[Path], Session]) -> None:
        super().__init__()
        with torch.inference_mode(False):  # no exporter takes tensors made in inference mode
            self.model = copy.deepcopy(model).eval()
        self._start, self._sessions = start, dict[tuple[Any, ...], Session]()

    def forward(self, x: Tensor, output: str) -> Outputs:
        key = (output, *x.shape)
        if key not in self._sessions:
            self._sessions[key] = self._export(x, output)
        return self._sessions[key](x.numpy())

    def _export(self, x: Tensor, output: str) -> Session:
        if x.device.type != "cpu" or x.dtype != torch.float32:
            raise NotImplementedError(f"it runs here in fp32 on a CPU only, not in {x.dtype} on {x.device.type}")
        registers = ["registers"] if self.model.num_register_tokens else []
        names = ["cls", *registers, "patches"] if output == "all" else ["cls"]
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
            path = Path(folder) / "model.onnx"
            export(self.model, path, outputs=names, batch_size=len(x), size=(x.shape[2], x.shape[3]))
            return self._start(path)


def _onnxruntime(path: Path) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise its threads keep spinning after a run, which can double the time of the next one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {INPUT: pixels})


def _openvino(path: Path) -> Session:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",  # all threads work on one call; with THROUGHPUT each works on its own
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda pixels: list(compiled([pixels]).values())  # without copying the array


def _tokens(outputs: Outputs) -> Tensor:
    cls_token, *others = map(torch.from_numpy, outputs)
    return torch.cat([cls_token[:, None], *others], dim=1)


def _peer(name: str, start: Callable[[Path], Session]) -> Peer:
    def build(config: BackboneConfig, model: nn.Module, drop_path: float) -> nn.Module:
        if drop_path:
            raise NotImplementedError(f"{name} does not train")
        return Exported(model, start)

    return Peer(
        name,
        build,
        {"all": lambda model, x: model(x, "all"), "cls": lambda model, x: model(x, "cls")},
        {"all": _tokens, "cls": lambda outputs: torch.from_numpy(outputs[0])},
        lambda config: config.position_interpolation,
        missing=not_installed(name) or not_installed("onnx") or not_installed("onnxscript"),
    )


ONNXRUNTIME = _peer("onnxruntime", _onnxruntime)
OPENVINO = _peer("openvino", _openvino)
