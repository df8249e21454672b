"""The plan of ``make gpu``: its steps, their commands, and which of them fit into the minutes of a call."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench import records

ROOT = Path(__file__).parents[1]
BUDGET = 8.7  # minutes
RESERVE_SECONDS = 10.0  # of the budget, to stop the last step and to write the archive
MIN_SHARE_LEFT = 0.5  # the share of a step's minutes that must be left to start it


class Step(NamedTuple):
    """One process."""

    name: str
    minutes: float  # expected, on an H200
    decides: str  # the decision that depends on its outcome
    command: str  # arguments of ``python -m``; GpuRun.command fills in the {names}
    with_previous: bool = False  # starts together with the step before
    every_call: bool = False  # runs in each call, since a new machine has an empty cache
    required: bool = False  # if it fails, nothing else runs


FIRST = "-m gpu_first tests/ops/test_on_gpu.py tests/ops/test_linear_cuda.py tests/ops/test_attention_cuda.py"
OTHERS = "-m 'not aot and not slow and not gpu_first and not gpu_large' {tests}"
TEST = "pytest -v -p no:cacheprovider -W default --max-worker-restart=200"
# What an engine launches. The kernel that may hang comes last.
FORMS = "activation,layer_norm.plain,linear,attention_pool,attention.batch"
OPS = f"--ops {FORMS} --modes forward"
MODEL = "bench.model {record} --implementations dinov2_fast,timm --precisions bf16"
SPEED = MODEL + ",fp8 --seconds 3 --modes eager,compile,engine,engine-best,engine-best-graphs --task throughput"
LATENCY = (
    MODEL + " --seconds 2 --modes graphs,engine-graphs,engine-best-graphs --task latency --batches 1 --outputs cls"
)
TRAIN = MODEL + " --seconds 3 --modes eager,triton --task training --sizes 224"
MIXED = MODEL + " --seconds 3 --modes eager,engine,engine-best --task mixed --sizes 224,518"
MEMORY = MODEL + " --modes eager,triton --task memory --sizes 224 --outputs training"

# The first call gets as far as `training`; a second one continues. Minutes are predictions: see bench/results/NOTES.md.
#
# All models of one size share a process. A process takes some 10 s to start, so a process for each model would cost
# 50 s of every call. A hang would cost some 300 s: HANG_FACTOR times the step, and the models after it. But by then
# each kernel has run 50 times in `tests`, and at these sizes in `ops`. One hang in 30 calls, a cautious guess, costs
# 10 s per call.
PLAN = [
    Step("smoke", 0.2, "do the extension and Triton run", "bench.gpu --smoke {smoke}", every_call=True, required=True),
    Step("warm", 0.4, "nothing: compiles the kernels of the steps below", "bench.warm kernels {warm}", every_call=True),
    Step("tests", 1.0, "which kernels are right: races, graphs, e4m3", f"{TEST} -n {{workers}} {FIRST}"),
    Step("peers", 1.0, "nothing: compiles timm", "bench.warm peers {warm}", with_previous=True, every_call=True),
    Step("ops", 1.25, "which backend of each op wins", f"bench.ops {{record}} --models B,g --sizes 224,518 {OPS}"),
    Step("model-224", 2.58, "the headline, class token", f"{SPEED} --models B,S,L,g --sizes 224 --outputs cls"),
    Step("model-518", 2.08, "the headline, dense features", f"{SPEED} --models B,L,S --sizes 518 --outputs all"),
    Step("latency", 0.58, "one image, graphs on both sides", f"{LATENCY} --models S,B --sizes 224"),
    Step("training", 0.42, "do our kernels train faster", f"{TRAIN} --models B"),
    Step("model-1036", 0.8, "attention of 5477 tokens", f"{SPEED} --models B --sizes 1036 --outputs all"),
    Step("mixed", 0.6, "does one sequence of many sizes win", f"{MIXED} --models B"),
    Step("training-L", 0.6, "the same for L", f"{TRAIN} --models L"),
    Step("memory", 1.2, "what training takes", f"{MEMORY} --models B,L"),
    Step("extraction", 1.8, "do images come fast enough", "bench.extraction {record} --models S"),
    Step("tests-large", 1.6, "more than 2^31 elements", f"{TEST} -m gpu_large {{tests}}"),
    Step("tests-others", 8.0, "all else that uses the GPU", f"{TEST} -n {{workers}} {OTHERS}"),
]

# What a call runs if it is asked to: `make gpu TASK=pretraining`. It is not in the plan above.
PRETRAIN = "bench.pretraining {record} {reference} --seconds 10 --crops 224+8x98 --recipes vitl16_short,vitl14"
PRETRAINING = [
    PLAN[0],
    Step("pretraining-B", 1.6, "is our step faster, does it take less memory", f"{PRETRAIN} --models B --batches 64"),
    Step("pretraining-L", 2.2, "the same for L", f"{PRETRAIN} --models L --batches 64 --measures steps"),
    Step("pretraining-S", 1.4, "the same for S", f"{PRETRAIN} --models S --batches 128 --measures steps"),
]
PLANS = {"all": PLAN, "pretraining": PRETRAINING}

# The values of options with --tiny, so that the same steps run on a CPU.
TINY_OPTIONS = {"models": "tiny", "precisions": "fp32", "batches": "2", "seconds": "0.1"}
TINY_OPTIONS |= {"crops": "42+2x28", "recipes": "test"}
TINY_SIZES = {"224": "28", "518": "56", "1036": "84"}  # pixels


@dataclass(frozen=True)
class GpuRun:
    """One call of ``make gpu``: what its steps share."""

    folder: Path  # of this device's results
    commit: str
    budget: float = BUDGET  # minutes
    tiny: bool = False
    extension: bool = True  # whether the CUDA extension is required
    reference: str | None = None  # a checkout of facebookresearch/dinov2

    @property
    def steps_file(self) -> Path:
        return self.folder / "steps.jsonl"

    def log(self, step: Step) -> Path:
        return self.folder / "logs" / f"{step.name}.log"

    def command(self, step: Step, coming: Sequence[Step] = ()) -> list[str]:
        """The arguments of ``python -m``. `coming` are the steps that this call will run."""
        device = f"--device {'cpu' if self.tiny else 'cuda'}"
        results = shlex.quote(str(self.folder.parent))
        arguments = shlex.split(
            step.command.format(
                record=f"{device} --write --resume --results {results} --commit {self.commit}",
                reference=f"--reference-path {shlex.quote(self.reference)}" if self.reference else "",
                smoke=device if self.extension else f"{device} --extension none",
                warm=f"{device} --steps {','.join(other.name for other in coming)}",
                workers=min(6, os.cpu_count() or 1),
                tests=" ".join(gpu_tests()),
            )
        )
        return tiny_command(arguments) if self.tiny else arguments

    def states(self) -> dict[tuple[str, str], str]:
        """How each step of this commit last ended, by name and command."""
        lines = [line for line in records.read(self.steps_file) if line["commit"] == self.commit]
        return {(line["step"], line["command"]): line["state"] for line in lines}

    def rows(self) -> list[records.Row]:
        """The rows of all benchmarks for this commit."""
        files = [path for path in sorted(self.folder.glob("*.jsonl")) if path != self.steps_file]
        return [row for path in files for row in records.read(path) if row["commit"] == self.commit]


def tiny_command(arguments: list[str]) -> list[str]:
    """A step's command for a CPU: tiny models and images in fp32, no CUDA graphs. Tests are collected but not run."""
    if arguments[0] == "pytest":
        return [*arguments, "--collect-only", "-qq", "-n", "0"]
    small = list(arguments)
    for i, (option, value) in enumerate(itertools.pairwise(arguments), 1):
        if option == "--sizes":
            small[i] = ",".join(TINY_SIZES[size] for size in value.split(","))
        elif option == "--modes" and arguments[0] == "bench.model":
            modes = (mode.removesuffix("-graphs").replace("graphs", "eager") for mode in value.split(","))
            small[i] = ",".join(dict.fromkeys(mode for mode in modes if mode != "triton"))
        elif option.startswith("--"):
            small[i] = TINY_OPTIONS.get(option[2:], value)
    return small


def gpu_tests() -> list[str]:
    """The test files that run on the device of tests/helpers/devices.py."""
    files = sorted((ROOT / "tests").glob("**/test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "tests.helpers.devices import" in path.read_text()]


Group = list[Step]  # steps that start together


def order_steps(steps: list[Step], gpu_run: GpuRun) -> tuple[list[Group], list[Step]]:
    """The steps to run, with those that failed in an earlier call last, and the steps that are done."""
    before = gpu_run.states()
    state = {step.name: before.get((step.name, step.command)) for step in steps}
    done = [step for step in steps if state[step.name] == "done" and not step.every_call]
    failed = {step.name for step in steps if state[step.name] == "failed" and not step.every_call}
    groups: list[Group] = []
    for step in sorted((step for step in steps if step not in done), key=lambda step: step.name in failed):
        if step.with_previous and groups:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups, done


def group_minutes(group: Group) -> float:
    return max(step.minutes for step in group)


def steps_within(groups: list[Group], seconds: float) -> list[Step]:
    """The steps that run in this time if each takes as long as predicted."""
    steps: list[Step] = []
    for group in groups:
        if seconds >= MIN_SHARE_LEFT * 60 * group_minutes(group):
            steps += group
            seconds -= min(seconds, 60 * group_minutes(group))
    return steps


def print_plan(steps: list[Step], gpu_run: GpuRun) -> None:
    """Prints the steps that a call runs if each takes as long as predicted: minutes, sum, what it decides."""
    groups, done = order_steps(steps, gpu_run)
    coming, total = steps_within(groups, 60 * gpu_run.budget - RESERVE_SECONDS), 0.0
    print(f"The plan for commit {gpu_run.commit} and {gpu_run.budget:g} minutes. Nothing is run.\n")
    print(f"{'step':14} minutes    sum  decides")
    for group in (group for group in groups if group[0] in coming):
        total += group_minutes(group)
        for step in group:
            together = " (together with the step before)" * step.with_previous
            print(f"{step.name:14} {step.minutes:7.2f} {total:6.2f}  {step.decides}{together}")
            print(f"{'':16}python -m {shlex.join(gpu_run.command(step, coming))}")
    left_out = [step for group in groups for step in group if step not in coming]
    for title, listed in (("done before", done), ("left out", left_out)):
        print(f"\n{title}: {', '.join(f'{step.name} ({step.minutes:g})' for step in listed) or 'nothing'}")
