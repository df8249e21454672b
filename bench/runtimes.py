"""onnxruntime and OpenVINO as peers: what a user may run on a CPU instead of PyTorch.

Both run an ONNX file of our model, written by this project's export. Each batch and image size has a file of its own,
which is their best case: sizes are fixed, and positions are resampled beforehand. Here they run in fp32, only on a CPU,
with as many threads as PyTorch.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import Peer, reason_not_installed
from dinov2_fast.configs import BackboneConfig
from dinov2_fast.export import INPUT, export

Outputs = list[Any]  # numpy arrays
Session = Callable[[Any], Outputs]


class ExportedModel(nn.Module):
    """Our model in another runtime. The first call for an output and a shape exports it; later calls only run it.

    `open_session` reads an ONNX file, which is deleted afterwards, and returns a function that runs it on an array.
    """

    def __init__(self, model: nn.Module, open_session: Callable[[Path], Session]) -> None:
        super().__init__()
        with torch.inference_mode(False):  # no exporter takes tensors made in inference mode
            self.model = copy.deepcopy(model).eval()
        self._open_session, self._sessions = open_session, dict[tuple[Any, ...], Session]()

    def forward(self, x: Tensor, output: str) -> Outputs:
        key = (output, *x.shape)
        if key not in self._sessions:
            self._sessions[key] = self._export(x, output)
        return self._sessions[key](x.numpy())

    def _export(self, x: Tensor, output: str) -> Session:
        if x.device.type != "cpu" or x.dtype != torch.float32:
            raise NotImplementedError(f"here it runs only in fp32 on a CPU, not in {x.dtype} on {x.device.type}")
        registers = ["registers"] if self.model.num_register_tokens else []
        names = ["cls", *registers, "patches"] if output == "all" else ["cls"]
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
            path = Path(folder) / "model.onnx"
            export(self.model, path, outputs=names, batch_size=len(x), size=(x.shape[2], x.shape[3]))
            return self._open_session(path)


def _onnxruntime(path: Path) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    # By default its threads keep spinning after a run, which can double the time of the next one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {INPUT: pixels})


def _openvino(path: Path) -> Session:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",  # all threads work on one call; with THROUGHPUT each works on a call of its own
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda pixels: list(compiled([pixels]).values())  # without copying the array


def _tokens(outputs: Outputs) -> Tensor:
    cls_token, *others = map(torch.from_numpy, outputs)
    return torch.cat([cls_token[:, None], *others], dim=1)


def _runtime_peer(name: str, open_session: Callable[[Path], Session]) -> Peer:
    def build(config: BackboneConfig, model: nn.Module, drop_path: float) -> nn.Module:
        if drop_path:
            raise NotImplementedError(f"{name} does not train")
        return ExportedModel(model, open_session)

    return Peer(
        name,
        build,
        {"all": lambda model, x: model(x, "all"), "cls": lambda model, x: model(x, "cls")},
        {"all": _tokens, "cls": lambda outputs: torch.from_numpy(outputs[0])},
        lambda config: config.position_interpolation,
        missing=reason_not_installed(name) or reason_not_installed("onnx") or reason_not_installed("onnxscript"),
    )


ONNXRUNTIME = _runtime_peer("onnxruntime", _onnxruntime)
OPENVINO = _runtime_peer("openvino", _openvino)
