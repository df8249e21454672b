"""bench.pretraining: all implementations compute our step, wrong ones are refused, rows are saved and shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import extraction, harness, pretraining, pretraining_batch, pretraining_loader, pretraining_plain, records
from bench.pretraining import OURS, PLAIN, Entrants
from bench.pretraining_batch import RECIPES, Batch, Recipe, make_batch, pretraining_config
from bench.pretraining_reference import Packed, attention, index_select_cat, scaled_index_add
from bench.report import Device, device_readme, updated_readme
from bench.tasks import Scenario
from dinov2_fast.configs import BACKBONES
from dinov2_fast.pretraining.parallel import World, start_processes

BACKBONE = dataclasses.replace(BACKBONES["dinov2_vits14"], name="test", embed_dim=32, depth=2, num_heads=2)
SCENARIO = Scenario("pretraining", BACKBONE, "42+2x28", 4, "test", "fp32")
SHARED = Recipe(RECIPES["test"].dino_head, None, "centering", 0.3)
CPU = torch.device("cpu")
BOTH = ((OURS, "eager"), (PLAIN, "eager"))

pytestmark = pytest.mark.skipif(pretraining_plain.MISSING is not None, reason=str(pretraining_plain.MISSING))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "UNTIMED_SECONDS", 0.0)
    monkeypatch.setattr(harness, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(harness, "ROUNDS", 2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return extraction.make_images(tmp_path_factory.mktemp("images"), 4)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with start_processes("cpu") as world:
        yield world


@pytest.fixture(scope="module")
def batch(files: list[str]) -> Batch:
    return make_batch(pretraining_config(SCENARIO), files, CPU)


@pytest.fixture(scope="module")
def entrants(batch: Batch, world: World) -> Entrants:
    return Entrants(pretraining_config(SCENARIO), batch, world, None)


def rows_of_both() -> dict[pretraining.Variant, dict[str, Any]]:
    return {variant: dict(zip(("implementation", "mode"), variant, strict=True)) | {"versions": {}} for variant in BOTH}


def speeds(entrants: Entrants) -> dict[str, dict[str, Any]]:
    """The rows of ours and of plain-timm, by name."""
    rows = rows_of_both()
    pretraining.measure_speed(rows, entrants, 0.0)
    return {name: row for (name, _), row in rows.items()}


@pytest.mark.parametrize("recipe", ["sinkhorn-separate", "centering-shared"])
def test_plain_timm_computes_our_losses_and_gradients(
    recipe: str, batch: Batch, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "centering-shared", SHARED)
    monkeypatch.setitem(RECIPES, "sinkhorn-separate", RECIPES["test"])
    config = pretraining_config(dataclasses.replace(SCENARIO, output=recipe))
    entrants = Entrants(config, batch, world, None)
    step, errors = entrants.checked((PLAIN, "eager"))
    assert errors["outputs_max_error"] < 1e-5
    assert len(entrants.expected("antialias")) > 6
    before = [p.clone() for p in step.teacher.parameters()]
    step()
    moved = [not torch.equal(p, q) for p, q in zip(step.teacher.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 2, "the teacher follows"


def test_positions_are_compared_with_antialiasing(entrants: Entrants) -> None:
    right, other = entrants.expected("antialias"), entrants.expected("offset")
    assert right["dino_local"] != other["dino_local"]
    assert right["dino_global"] == pytest.approx(other["dino_global"], rel=1e-6), "global crops are not resampled"


WRONG: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "targets of one crop": ("sinkhorn_knopp", lambda right: lambda logits, t: right(logits, t).roll(1, dims=0)),
    "temperature": ("sinkhorn_knopp", lambda right: lambda logits, t: right(logits, 1.01 * t)),
    "koleo": ("koleo", lambda right: lambda cls: 1.001 * right(cls)),
    "a detached loss": ("cross_entropy", lambda right: lambda t, s: right(t, s.detach() + 0.5 * (s - s.detach()))),
    "nan": ("koleo", lambda right: lambda cls: right(cls) * float("nan")),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_step_is_found(name: str, entrants: Entrants, monkeypatch: pytest.MonkeyPatch) -> None:
    function, change = WRONG[name]
    monkeypatch.setattr(pretraining_plain, function, change(getattr(pretraining_plain, function)))
    with pytest.raises(AssertionError, match=r"they differ by (\d|nan)"):
        entrants.checked((PLAIN, "eager"))


def test_a_wrong_step_is_refused_and_the_others_are_timed(entrants: Entrants, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining_plain, "koleo", lambda cls: cls.sum())
    rows = speeds(entrants)
    assert (records.reason(rows[PLAIN]) or "").startswith("refused: koleo is ")
    assert rows[OURS]["value"] > 0
    assert rows[OURS]["versions"]["colours_ms"] > 0


def test_a_run_that_diverges_is_refused(entrants: Entrants, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = pretraining_plain.koleo, []

    def later(cls: Tensor) -> Tensor:
        calls.append(1)
        return right(cls) * (1.0 if len(calls) <= 2 else float("inf"))  # two crops in the step that is checked

    monkeypatch.setattr(pretraining_plain, "koleo", later)
    assert records.reason(speeds(entrants)[PLAIN]) == "refused: after the steps a loss is not finite"


def test_peak_memory_holds_weights_gradients_and_moments(batch: Batch, world: World) -> None:
    backbone = dataclasses.replace(SCENARIO.config, embed_dim=384, depth=4, num_heads=6)  # larger than its activations
    entrants = Entrants(pretraining_config(dataclasses.replace(SCENARIO, config=backbone)), batch, world, None)
    weights = sum(p.nbytes for p in entrants.build((OURS, "eager")).student.parameters()) / 2**20
    rows = rows_of_both()
    pretraining.measure_memory(rows, entrants)
    for row in rows.values():
        assert "value" not in row
        # student, teacher, gradients, two moments
        assert 5 * weights < row["versions"]["peak_mib"] < 6 * weights


def test_stochastic_depth_is_off_in_the_check_alone(entrants: Entrants) -> None:
    for variant in BOTH:
        step, _ = entrants.checked(variant)
        assert step.student.training
        found = [entrants.build(variant) for _ in range(2)]
        same = [pretraining.without_stochastic_depth(each)["ibot"] for each in found]
        assert same[0] == same[1], "the same weights and images in every step that is built"
    dropped = step()
    assert dropped["ibot"] != pytest.approx(same[0], rel=1e-4)


@pytest.mark.parametrize("batches", [[(3, 5)], [(2, 5), (4, 3)], [(1, 3), (2, 3)]], ids=str)
def test_packed_attention_is_that_of_each_sequence(batches: list[tuple[int, int]]) -> None:
    tensors = [torch.randn(count, length, 2, 8, dtype=torch.float64) for count, length in batches]
    packed, x = Packed.from_tensor_list(tensors)
    by_lengths = Packed.from_seqlens([length for count, length in batches for _ in range(count)])
    by_lengths._batch_sizes = [count for count, _ in batches]  # as the reference does
    for each in (packed, by_lengths):
        assert [part.tolist() for part in each.split(x)] == [tensor.tolist() for tensor in tensors]
        results = each.split(attention(x, 2 * x, 3 * x, attn_bias=each))
        for result, tensor in zip(results, tensors, strict=True):
            scores = torch.einsum("bqhd,bkhd->bhqk", tensor, 2 * tensor) / 8**0.5
            expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), 3 * tensor)
            torch.testing.assert_close(result, expected)


def test_rows_are_chosen_and_added_as_xformers_does() -> None:
    x, index = torch.arange(12.0).view(3, 2, 2), torch.tensor([2, 0])
    chosen = index_select_cat([x.flatten(1), x.flatten(1)], [index, index[:1]])
    assert chosen.tolist() == [8, 9, 10, 11, 0, 1, 2, 3, 8, 9, 10, 11]
    added = scaled_index_add(x, index, torch.ones(2, 2, 2), scaling=torch.tensor([1.0, 10.0]), alpha=1.5)
    assert (added - x).tolist() == [[[1.5, 15.0]] * 2, [[0.0, 0.0]] * 2, [[1.5, 15.0]] * 2]


def test_loaders_take_turns_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining_loader, "PASSES", 2)
    taken: list[tuple[str, int]] = []
    runs = {name: lambda name=name: taken.append((name, torch.get_num_threads())) for name in "ab"}
    times = pretraining_loader.cpu_times(runs)
    assert taken == [(name, 1) for name in "abbaab"]
    assert [len(each) for each in times.values()] == [2, 2]


def test_crops_are_parsed() -> None:
    crops = pretraining_batch.parse_crops("224+8x98")
    assert (crops.global_size, crops.n_local, crops.local_size) == (224, 8, 98)
    assert pretraining_batch.crops_text(crops) == "224+8x98"
    for text in ("224", "224+8", "224+8x", "a+8x98"):
        with pytest.raises(ValueError, match="does not name crops"):
            pretraining_batch.parse_crops(text)


def test_the_command_writes_rows_resumes_and_its_rows_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining_loader, "PASSES", 1)
    monkeypatch.setattr(pretraining, "LOADER_IMAGES", 2)
    monkeypatch.setattr(pretraining, "peak", lambda build, device: 7 << 20)
    monkeypatch.setitem(harness.MODELS, "test", BACKBONE)
    command = "--device cpu --models test --crops 56+2x28 --recipes test --batches 2 --seconds 0 --write --resume"
    arguments = [*command.split(), "--commit", "a", "--results", str(tmp_path)]
    assert pretraining.main(arguments) == 0
    rows = records.read(tmp_path / "cpu" / "pretraining.jsonl")
    names = [(row["model"], row["implementation"], row["output"]) for row in rows]
    assert names == [
        *(("test", name, "test") for name in (OURS, "reference", PLAIN)),
        *(("loader", *rest) for rest in ((OURS, "crops"), (OURS, "crops+colours"), ("reference", "crops+colours"))),
    ]
    assert [records.reason(row) for row in rows if row["implementation"] == "reference"] == [
        "missing: no --reference-path was given"
    ] * 2
    for row in (row for row in rows if row["implementation"] != "reference"):
        assert row["value"] > 0
    text = device_readme(Device(tmp_path / "cpu"))
    for unit in ("images per second", "peak MiB", "images per second of one core"):
        assert f"Unit: {unit} (" in text
    readme = updated_readme("<!-- speed: written by python -m bench.report --><!-- end of speed -->", tmp_path)
    assert "Unit: peak MiB (less is better)\n\n| model | pixels |" in readme
    assert "| test | 56+2x28 | fp32 | test | 2 | 7.00 | 7.00 | 1.00 | – |" in readme
    assert "loader" not in readme
    monkeypatch.setattr(pretraining, "measure_speed", lambda *arguments: pytest.fail("measured again"))
    monkeypatch.setattr(pretraining, "measure_loaders", lambda *arguments: pytest.fail("measured again"))
    assert pretraining.main(arguments) == 0


def test_another_configuration_of_the_scenario_is_what_runs() -> None:
    config = pretraining_config(dataclasses.replace(SCENARIO, output="vitl14", precision="bf16"))
    assert (config.dino_head.prototypes, config.dino_head.bottleneck_size) == (131072, 384)
    assert (config.run.precision, config.run.micro_batch, config.koleo_group) == ("bf16", 4, 4)
