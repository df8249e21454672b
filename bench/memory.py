"""Task memory: the peak of a forward pass, or with output "training" of a training step, in MiB.

The peak is the most memory that torch has allocated on the device at any moment of a run: weights, images, outputs and
all intermediate results; in training also gradients, both moments of AdamW and the gradient of the tokens. It is
measured in a second run, with no other model on the device. On a GPU it is torch's own count. That includes cuBLAS'
workspace, but not the CUDA context or memory that the allocator holds in reserve. On a CPU it is the sum of all
allocations and releases that torch's profiler records; it does not see what libraries allocate themselves.

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
from bench.modes import compile_scope, forward_run, is_engine
from bench.peers import Peer
from bench.records import Row
from bench.tasks import Task, Variant
from bench.training import Trainer, build_model, token_gradient

MIB = 2**20


class AllocationMeter:
    """Counts what torch allocates on a device after the meter was created, on a CPU only within :meth:`peak`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._allocated = 0
        gc.collect()
        if device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()  # so that each implementation pays for its own
            torch.cuda.empty_cache()
            self._before = torch.cuda.memory_allocated(device)

    def peak(self, work: Callable[[], Any]) -> int:
        """Runs `work` and collects garbage. Returns the most bytes that were allocated at any moment."""
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


class MemoryTask(Task):
    """Measures one implementation after the other, each alone on the device; `models` are on the CPU."""

    def __init__(self, *args: Any, device: torch.device, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.device = device

    def measure_variants(self, variants: Iterable[Variant], seconds: float) -> list[Row]:
        rows = self.rows(variants)
        training = self.scenario.output == "training"
        for (peer, mode), row in rows.items():
            if records.reason(row):
                continue
            try:
                with torch.inference_mode(not training), compile_scope():
                    row |= {"value": self._peak(peer, mode, training) / MIB, "unit": "MiB"}
            except Exception as exception:  # the failure of one must not stop the others
                records.record_failure(row, exception, self.device)
        return list(rows.values())

    def _peak(self, peer: Peer, mode: str, training: bool) -> int:
        """The peak of a second run, in bytes."""
        meter, runs = AllocationMeter(self.device), list[Run]()
        meter.peak(lambda: runs.append(self._make_run(peer, mode, training)))
        meter.peak(runs[0])
        return meter.peak(runs[0])

    def _make_run(self, peer: Peer, mode: str, training: bool) -> Run:
        scenario, x = self.scenario, self.scenario.images(self.device)
        if training:
            trainer = Trainer(peer, build_model(peer, scenario, self.models.ours, self.device), mode)
            return partial(trainer, x, token_gradient(scenario, self.device))
        model = peer.build(scenario.config, self.models.ours, 0.0).to(self.device).eval()
        if not is_engine(mode):
            model = model.to(scenario.dtype)
        return forward_run(peer, model, x, scenario.output, scenario.precision, mode, self.best_backends)
