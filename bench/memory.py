"""Task memory: the peak of a forward pass, or with output "training" of a training step, in MiB.

The peak is the most that torch has allocated on the device at any moment of a run: weights, images, outputs and all in
between; in training also gradients, both moments of AdamW and the gradient of the tokens. It is that of a second run,
with no other model on the device. On a GPU it is torch's own count with cuBLAS' workspace, without the CUDA context and
the allocator's reserve. On a CPU it is the sum of all allocations and releases that torch's profiler sees; what
libraries allocate themselves is not seen.

Results are not checked here: tasks throughput and training check the same runs.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.autograd.profiler import profile

from bench import records
from bench.harness import Run
from bench.modes import compiling, is_engine, prepare
from bench.peers import Peer
from bench.tasks import Entrant, Row, Task
from bench.training import Step, build, incoming

MIB = 2**20


class Meter:
    """Counts what torch allocates on a device after the meter was made, on a CPU only within :meth:`peak`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._allocated = 0
        gc.collect()
        if device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()  # so that each implementation pays for its own
            torch.cuda.empty_cache()
            self._before = torch.cuda.memory_allocated(device)

    def peak(self, work: Callable[[], Any]) -> int:
        """Runs `work`; gives the bytes at its worst moment. Collects garbage afterwards."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            work()
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device) - self._before
            gc.collect()
            return peak
        with profile(profile_memory=True) as profiler:
            work()
            gc.collect()
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        peak = self._allocated + max(itertools.accumulate(changes, initial=0))
        self._allocated += sum(changes)
        return peak


class Memory(Task):
    """Measures one implementation after the other, alone on the device; `models` are on the CPU."""

    def __init__(self, *args: Any, device: torch.device, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.device = device

    def measure(self, entrants: Iterable[Entrant], seconds: float) -> list[Row]:
        rows = self.rows(entrants)
        training = self.setting.output == "training"
        for (peer, mode), row in rows.items():
            if records.reason(row):
                continue
            try:
                with torch.inference_mode(not training), compiling():
                    row |= {"value": self._peak(peer, mode, training) / MIB, "unit": "MiB"}
            except Exception as exception:  # what stops one must not stop the others
                records.stop([row], exception, self.device)
        return list(rows.values())

    def _peak(self, peer: Peer, mode: str, training: bool) -> int:
        """Bytes of a second run."""
        meter, built = Meter(self.device), list[Run]()
        make = self._step if training else self._forward
        meter.peak(lambda: built.append(make(peer, mode)))
        meter.peak(built[0])
        return meter.peak(built[0])

    def _step(self, peer: Peer, mode: str) -> Run:
        setting = self.setting
        step = Step(peer, build(peer, setting, self.models.ours, self.device), mode)
        return partial(step, setting.images(self.device), incoming(setting, self.device))

    def _forward(self, peer: Peer, mode: str) -> Run:
        setting = self.setting
        model = peer.build(setting.config, self.models.ours, 0.0).to(self.device).eval()
        if not is_engine(mode):
            model = model.to(setting.dtype)
        x = setting.images(self.device)
        return prepare(peer, model, x, setting.output, setting.precision, mode, self.best)
