"""``dinov2-fast pretrain``: a model from images without labels, by DINOv2's own method."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from dinov2_fast import environment
from dinov2_fast.cli.options import add_device, add_workers, at_least, given
from dinov2_fast.cli.process import OK, SOME_FAILED, STOPPED, ignored_output_errors, noted_stop
from dinov2_fast.cli.progress import ProgressLine, duration

if TYPE_CHECKING:
    from dinov2_fast.pretraining.log import StepReport
    from dinov2_fast.pretraining.run import End

HELP = "train a model on images without labels"
DESCRIPTION = """\
Trains a model on images without labels, by DINOv2's own method: DINO, iBOT and
KoLeo. It runs on one GPU, on several, or on a CPU. The folder DIR gets
checkpoints and metrics.jsonl, and dinov2_fast.load(DIR) loads the model.

PATH is an image, a folder, a glob in quotes, a list, an archive or a URL, as
for `dinov2-fast extract`. An image that cannot be read is skipped and counted.

Configurations for --config:
  tiny        a small ViT that two cores of a CPU train within an hour
  small       ViT-S/14 by Meta's short recipe, for one to eight GPUs
  base        ViT-B/14 by the same recipe
  vitl14      ViT-L/14 by Meta's vitl14.yaml, for many GPUs
  vitl14-518  its last phase, at 518 pixels, which begins with --start-from
Or a file: .toml, or a .yaml of Meta's training code.

The same command goes on from the newest checkpoint. With another configuration
it says which field differs and stops."""

EPILOG = """\
examples:
  dinov2-fast pretrain photos/ --config small --out runs/a
  dinov2-fast pretrain photos/ --config small --set run.batch_size=256 \\
      --set optimizer.learning_rate=1e-3 --out runs/b
  dinov2-fast pretrain 'shards/*.tar' --config base --out runs/c \\
      --evaluate labelled/train labelled/val

Several GPUs, one process each:
  torchrun --nproc-per-node 8 -m dinov2_fast pretrain photos/ \\
      --config vitl14 --out runs/d

Exit codes: 0 all good, 1 aborted, 2 wrong usage, 3 finished but some images
were skipped (0 with several processes, since torchrun takes 3 for a failure),
130 interrupted (Ctrl-C: at once, and the last checkpoint is kept), 143 stopped
(SIGTERM or SIGUSR1: after the step, when a checkpoint is saved)."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("images", nargs="+", metavar="PATH", help="images, or where they are (see above)")
    parser.add_argument("--out", required=True, metavar="DIR", help="output folder; made if it does not exist")
    what = parser.add_argument_group("what is trained")
    what.add_argument("--config", default="small", metavar="NAME|FILE", help="see above (default: small)")
    what.add_argument(
        "--set",
        dest="overrides",
        type=_assignment,
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the configuration, such as model.depth=8; may be repeated",
    )
    what.add_argument("--steps", type=at_least(1), metavar="N", help="the same as --set run.steps=N")
    what.add_argument(
        "--start-from",
        metavar="DIR",
        help="begin with the networks of another run, as for a phase at a higher resolution",
    )
    what.add_argument(
        "--evaluate",
        nargs=2,
        metavar=("TRAIN", "VAL"),
        help="measure the k-NN accuracy on these images in class folders, every run.evaluate_every steps",
    )
    how = parser.add_argument_group("how it runs")
    add_device(how)
    add_workers(how, "processes that decode images, for each that trains; 0 for none")
    how.add_argument("--max-pixels", type=at_least(1), metavar="N", help="skip larger images (default: 50000000)")
    how.add_argument(
        "--max-seconds",
        type=at_least(1),
        metavar="N",
        help="skip an image that took longer than N seconds to read and decode; not with --workers 0 (default: 60)",
    )


def run(args: argparse.Namespace) -> int:
    """Trains; OK, SOME_FAILED if images were skipped, or STOPPED if a signal asked for it."""
    if args.workers:
        environment.use_passive_openmp_threads()
    overrides = [*args.overrides, *([f"run.steps={args.steps}"] if args.steps else [])]
    # Each other option has the name of an argument of `pretrain`.
    settings = given(args, without=("steps", "overrides"))
    report = ProgressReport()
    with noted_stop() as stop:
        from dinov2_fast.pretraining.run import pretrain

        try:
            end = pretrain(**settings, overrides=overrides, stop=stop, progress=report)
        finally:
            report.end()
    if end.failures:
        print(f"Skipped:\n{end.failures}", file=sys.stderr)
    if end.is_main:
        with ignored_output_errors():
            print(summary_text(end))
    if end.step < end.steps:
        return STOPPED
    return SOME_FAILED if end.skipped and end.processes == 1 else OK


def summary_text(end: End) -> str:
    """What was done, where the checkpoint is and how to load it, in three lines."""
    done = end.step - end.first_step
    resumed = f", {end.first_step} were there already" if end.first_step else ""
    speed = f"{done * end.batch_size / end.seconds:.1f} images/s" if done else "nothing to do"
    return (
        f"{end.step}/{end.steps} steps of {end.batch_size} images{resumed}, {end.images} images, "
        f"{end.skipped} skipped, {duration(end.seconds)}, {speed}\n"
        f"Checkpoint: {end.checkpoint}\n"
        f"Load it:    import dinov2_fast; model = dinov2_fast.load({str(end.folder)!r})"
    )


class ProgressReport(ProgressLine):
    """Prints the progress at each report, with the last k-NN accuracy. What matters most comes first: lines are cut."""

    _speed = _accuracy = _parts = ""

    def __call__(self, report: StepReport) -> None:
        found, steps = report.metrics, f"{report.step}/{report.steps} steps, {duration(report.seconds_left)} left"
        if "loss" not in found:
            best = max(found, key=lambda name: found[name])
            self._accuracy = f", k-NN {found[best]:.1%} (k = {best[4:]}, step {report.step})"
        else:
            self._parts = (
                f", DINO {found['dino_global']:.4f} + {found['dino_local']:.4f}, iBOT {found['ibot']:.4f}, "
                f"KoLeo {found['koleo']:.4f}, entropies {found['dino_entropy']:.2f} and {found['ibot_entropy']:.2f}"
            )
            self._speed = (
                f", {found['images_per_second']:.1f} images/s, data wait {found['data_wait']:.0%}, "
                f"loss {found['loss']:.4f}"
            )
        self.show(steps + self._speed + self._accuracy + self._parts, last=report.step == report.steps)


def _assignment(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE, such as model.depth=8")
    return text
