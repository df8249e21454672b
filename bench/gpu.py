"""The tests and benchmarks that need a GPU, in calls of nine minutes: ``make gpu``.

A call runs this checkout with the Python that calls it. It installs nothing, downloads nothing, and changes no setting
of the device. The steps of the plan (bench/gpu_plan.py) run one after the other, each in a process of its own. Results
go to the folder bench/results/<device>/ (or another, by --results) and into the archive <device>.tar.gz beside it:

- <task>.jsonl: the rows of the benchmarks; best.json: the fastest backend of each op;
- steps.jsonl: a line for each step that ran; logs/<step>.log: what it printed.

After a step that crashes, the next one runs. A step that hangs is stopped. A step that lost the device starts again,
without the implementation that lost it. The next call for the same commit continues: it skips the steps that are done,
and runs those that failed after all others. --dry-run prints the plan on any machine, --tiny runs all of it on a CPU.
--task pretraining (`make gpu TASK=pretraining`) runs steps that are not in the usual plan.

Exit status: 0 if all steps are done; 1 if a step failed or a result was refused; 2 if there is no GPU; 3 if steps are
left for another call.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

import torch

from bench import records
from bench.gpu_plan import BUDGET, PLANS, ROOT, GpuRun, print_plan
from bench.gpu_steps import Outcome, run_steps
from bench.peers import OURS
from dinov2_fast import extension, ops

EPILOG = """\
The CUDA extension must be where `make build` leaves it. EXTENSION names one that was built elsewhere; EXTENSION=none
runs without it. On a machine that keeps only the files of one folder after a call:

    make gpu PYTHON=python3 COMMIT=<sha>; cp bench/results/*.tar.gz <folder>

The archive is written even if tests fail or time runs out, so the exit status must not prevent the copy. Allow the call
a minute more than the budget. Files that git ignores, such as the extension, may have to be sent explicitly. Before the
next call unpack the archive, `tar -xzf <device>.tar.gz -C bench/results`, and name the same commit.
"""


def smoke(device: str, with_extension: bool) -> int:
    """Prints what runs here. Raises without Triton or the CUDA extension: such a call would show little."""
    packages = ", ".join(f"{name} {records.version(name)}" for name in ("torch", "triton", "timm", "pytest-xdist"))
    print(f"{records.device_folder(torch.device(device))}, Python {sys.version.split()[0]}, {packages}")
    print(f"CUDA extension: {extension.availability()}")
    sizes = ((257, 384), (1536, 384), (1536,))
    for backend in ("triton", *["cuda"] * with_extension) if device == "cuda" else ():
        ops.linear(*(torch.randn(size, device=device).bfloat16() for size in sizes), epilogue="gelu", backend=backend)
        torch.cuda.synchronize()
        print(f"{backend} runs")
    return 0


def headlines(rows: list[records.Row]) -> Iterator[str]:
    """For each scenario of a model the ratio of our best row to the best of a peer; ours in fp8 to a peer's in bf16."""
    of_models = (row for row in rows if row["task"] != "ops")
    scenario = itemgetter("task", "model", "resolution", "output", "batch")
    for key, group in records.grouped(of_models, scenario).items():
        peer = records.best_row(row for row in group if row["implementation"] != OURS.name)
        own = [row for row in group if row["implementation"] == OURS.name]
        for precision in dict.fromkeys(row["precision"] for row in own):
            if (ours := records.best_row(row for row in own if row["precision"] == precision)) and peer:
                values = f"{ours['value']:.4g} {ours['unit']} {ours['mode']}; {peer['value']:.4g} {peer['mode']}"
                yield f"{' '.join(map(str, key))} {precision}: {records.row_ratio(ours, peer):.3f} ({values})"


def summary(outcomes: list[Outcome], gpu_run: GpuRun) -> int:
    """Prints the headlines and the states of steps. Returns the exit status."""
    rows = gpu_run.rows()
    refused = sum(map(records.is_failure, rows))
    print("", *headlines(rows), sep="\n")
    for state in ("done before", "failed", "cut off", "left out"):
        if names := [outcome.step.name for outcome in outcomes if outcome.state == state]:
            print(f"{state}: {', '.join(names)}")
    if refused:
        print(f"{refused} rows of this commit were refused or failed: see their {records.NOT_MEASURED}")
    states = {outcome.state for outcome in outcomes}
    return 1 if "failed" in states or refused else 3 if states & {"left out", "cut off"} else 0


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    with_extension = options.extension != "none"
    if options.smoke:
        return smoke(options.device, with_extension)
    if not (options.tiny or options.dry_run or torch.cuda.is_available()):
        print("torch finds no GPU here: DRY_RUN=1 shows the plan, TINY=1 runs it on the CPU.", file=sys.stderr)
        return 2
    name = "nvidia-h200" if options.dry_run else records.device_folder(torch.device("cpu" if options.tiny else "cuda"))
    folder, reference = options.results.resolve() / name, options.reference_path
    gpu_run = GpuRun(folder, options.commit, options.budget, options.tiny, with_extension, reference)
    plan = PLANS[options.task]
    if options.dry_run:
        print_plan(plan, gpu_run)
        return 0
    package_file = ROOT / "dinov2_fast" / extension.FILE.name
    is_elsewhere = options.extension and with_extension
    if is_elsewhere and not (package_file.is_file() and package_file.samefile(options.extension)):
        shutil.copy(options.extension, package_file)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the step is stopped and the archive written
    print(f"{name}, commit {gpu_run.commit}, {gpu_run.budget:g} minutes, {len(plan)} steps")
    gpu_run.folder.mkdir(parents=True, exist_ok=True)
    try:
        status = summary(run_steps(plan, gpu_run), gpu_run)
    finally:
        print(shutil.make_archive(str(gpu_run.folder), "gztar", gpu_run.folder.parent, name))
    return status


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    texts = {"description": __doc__, "epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", **texts)
    parser.add_argument("--results", type=Path, help="default: bench/results; with --tiny build/gpu-tiny")
    parser.add_argument("--commit", help="the commit that is measured (default: git's HEAD)")
    parser.add_argument("--budget", type=float, default=BUDGET, help="minutes in all (default: %(default)s)")
    parser.add_argument("--task", default="all", choices=PLANS, help="the plan to run (default: %(default)s)")
    parser.add_argument("--reference-path", help="a checkout of facebookresearch/dinov2, for --task pretraining")
    parser.add_argument("--extension", help="a built CUDA extension to copy into the package, or none to run without")
    parser.add_argument("--tiny", action="store_true", help="run all steps on the CPU, with tiny models")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, on any machine")
    parser.add_argument("--smoke", action="store_true", help="run only the first step: print what runs here")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="for --smoke")
    options = parser.parse_args(arguments)
    options.results = options.results or (ROOT / "build" / "gpu-tiny" if options.tiny else records.RESULTS)
    options.commit = options.commit or records.current_commit()
    if not options.commit and not options.smoke:
        parser.error("git names no commit here. Name the commit that is measured: COMMIT=<sha> (--commit)")
    if options.extension not in (None, "none") and not Path(options.extension).is_file():
        parser.error(f"EXTENSION (--extension): {options.extension} does not exist. Name a built extension.")
    return options


if __name__ == "__main__":
    sys.exit(main())
