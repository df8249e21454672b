"""k-NN and linear probes against scikit-learn and torch's own modules, on the digits that scikit-learn ships."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from dinov2_fast.evaluation.knn import knn
from dinov2_fast.evaluation.labelled import ModelOptions, read_labelled
from dinov2_fast.evaluation.linear import ProbeInputs, linear_probes
from dinov2_fast.evaluation.metrics import Accuracy, accuracy_of, class_ranks

datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")


class Digits:
    """8 x 8 grey values, centred so that their cosines differ; 1000 for training, 797 for validation."""

    pixels, labels = datasets.load_digits(return_X_y=True)
    pixels = (pixels - pixels.mean()).astype(np.float32)
    train, val = pixels[:1000], pixels[1000:]
    train_labels, val_labels = labels[:1000], labels[1000:]


def sorted_accuracy(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Top 1 and top 5 of scores (images, classes), by sorting: of equal scores the image's own comes last."""
    right = []
    for row, label in zip(scores, labels, strict=True):
        order = sorted(range(len(row)), key=lambda one: (-row[one], one == label))
        right.append([label in order[:k] for k in (1, 5)])
    return tuple(np.mean(right, axis=0).tolist())


def sklearns(k: int, temperature: float, rows: Any = slice(None)) -> np.ndarray:
    """Scores of the classes for the validation images, by the training images `rows`."""
    votes = neighbors.KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    votes.fit(Digits.train[rows].astype(np.float64), Digits.train_labels[rows])
    return votes.predict_proba(Digits.val.astype(np.float64))


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("held", [2**27, 1000 * 100])
def test_knn_agrees_with_scikit_learn(temperature: float, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the similarities are computed in chunks."""
    monkeypatch.setattr("dinov2_fast.evaluation.knn._SIMILARITIES", held)
    ks = (1, 10, 20, 100, 200)
    found = knn(
        Digits.train, Digits.train_labels, Digits.val, Digits.val_labels, neighbours=ks, temperature=temperature
    )
    assert list(found) == list(ks)
    for k, accuracy in found.items():
        assert accuracy == pytest.approx(sorted_accuracy(sklearns(k, temperature), Digits.val_labels), abs=1e-12), k
    assert found[10].top1 > 0.93
    assert found[200].top1 < found[10].top1
    assert found[10].top1 < found[10].top5 < 1


@pytest.mark.parametrize("held", [2**27, 300 * 70])
def test_without_validation_each_image_is_left_out(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_fast.evaluation.knn._SIMILARITIES", held)
    features, labels = Digits.train[:300].astype(np.float64), Digits.train_labels[:300]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = unit @ unit.T
    scores = np.zeros((300, 10))
    for row in range(300):
        others = [column for column in np.argsort(-cosine[row], kind="stable") if column != row]
        for column in others[:5]:
            scores[row, labels[column]] += np.exp(cosine[row, column] / 0.07)
    found = knn(features, labels, neighbours=(5,))
    assert found == {5: pytest.approx(sorted_accuracy(scores, labels), abs=1e-12)}
    assert (
        knn(features, labels, features, labels, neighbours=(1,))[1].top1
        == 1
        > knn(features, labels, neighbours=(1,))[1].top1
    )


def test_few_of_each_class_are_chosen_as_the_reference_does() -> None:
    """The tries have the seeds 0, 1, ... and draw from class after class; smaller classes vote as a whole."""
    labels = Digits.train_labels.copy()
    labels[np.flatnonzero(labels == 7)[3:]] = 8
    found = knn(Digits.train, labels, Digits.val, Digits.val_labels, neighbours=(2, 10, 100), n_per_class=4, n_tries=2)
    assert list(found) == [2, 4]
    tries = []
    for seed in range(2):
        torch.manual_seed(seed)
        places = [np.flatnonzero(labels == number) for number in range(10)]
        rows = np.concatenate([place[torch.randperm(len(place))[:4].numpy()] for place in places])
        assert len(rows) == 39
        tries.append(knn(Digits.train[rows], labels[rows], Digits.val, Digits.val_labels, neighbours=(2, 4)))
    for k, accuracy in found.items():
        assert accuracy == pytest.approx(np.mean([each[k] for each in tries], axis=0), abs=1e-12), k
        assert tries[0][k] != tries[1][k]


def test_few_of_each_class_vote_as_in_scikit_learn() -> None:
    found = knn(Digits.train, Digits.train_labels, Digits.val, Digits.val_labels, neighbours=(1, 3), n_per_class=3)
    torch.manual_seed(0)
    rows = []
    for number in range(10):
        place = np.flatnonzero(Digits.train_labels == number)
        rows += place[torch.randperm(len(place))[:3].numpy()].tolist()
    for k in (1, 3):
        assert found[k] == pytest.approx(sorted_accuracy(sklearns(k, 0.07, rows), Digits.val_labels), abs=1e-12)
    assert found[1].top1 < 0.9 < knn(Digits.train, Digits.train_labels, Digits.val, Digits.val_labels)[10].top1


def test_ties_and_missing_scores_count_against() -> None:
    scores = torch.tensor([[3.0, 1, 0, 0, 0, 0, 0], [2, 2, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 5], [torch.nan] * 7])
    ranks = class_ranks(scores, torch.tensor([0, 0, 0, 0]))
    assert ranks[:3].tolist() == [0, 1, 6]
    assert accuracy_of(ranks) == Accuracy(0.25, 0.5)
    two = class_ranks(torch.full((1, 2), torch.nan), torch.tensor([0]))
    assert accuracy_of(two).top5 == 0


def tokens_of(pixels: np.ndarray) -> ProbeInputs:
    """Three "blocks" of 20 numbers, and a "mean of the patches" of 4."""
    x = torch.from_numpy(pixels)
    return ProbeInputs(x[:, :60].unflatten(1, (3, 20)), x[:, 60:])


def torchs(x: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, rate: float, order: Any, steps: int) -> Any:
    """One classifier, trained as the reference trains it."""
    linear = torch.nn.Linear(x.shape[1], 10)
    with torch.no_grad():
        linear.weight.copy_(weight.T)
        linear.bias.zero_()
    optimizer = torch.optim.SGD(linear.parameters(), lr=rate, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
    for batch in order:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(linear(x[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return linear


def test_linear_probes_are_trained_as_torch_would() -> None:
    tokens, labels = tokens_of(Digits.train[:100]), torch.from_numpy(Digits.train_labels[:100])
    settings: dict[str, Any] = {"blocks": (1, 2), "learning_rates": (0.001, 0.02), "steps": 7, "batch_size": 32}
    probes = linear_probes(tokens, labels, seed=3, **settings)
    expected = [(n, mean, rate) for n in (1, 2) for mean in (False, True) for rate in (0.001, 0.02)]
    assert [(probe.blocks, probe.avgpool, probe.learning_rate) for probe in probes] == expected

    generator = torch.Generator().manual_seed(3)
    sizes = [20, 24, 40, 44]
    weights = [0.01 * torch.randn(2, size, 10, generator=generator) for size in sizes]
    orders = [torch.randperm(100, generator=generator) for _ in range(3)]
    batches = [order[first : first + 32] for order in orders for first in (0, 32, 64)][:7]
    pixels = torch.from_numpy(Digits.train[:100])
    inputs = [pixels[:, 40:60], pixels[:, 40:], pixels[:, 20:60], pixels[:, 20:]]
    for number, probe in enumerate(probes):
        x, initial = inputs[number // 2], weights[number // 2][number % 2]
        linear = torchs(x, labels, initial, probe.learning_rate * 32 / 256, batches, 7)
        torch.testing.assert_close(probe.weight, linear.weight.T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(probe.bias, linear.bias, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(probe.weight, initial, atol=1e-3)
        scores = linear(x).detach().numpy()
        assert probe.accuracy(tokens, labels) == pytest.approx(sorted_accuracy(scores, labels.numpy()), abs=1e-12)


def test_linear_probes_learn_the_digits() -> None:
    probes = linear_probes(tokens_of(Digits.train), Digits.train_labels, blocks=(1, 3), steps=400)
    assert len(probes) == 2 * 2 * 13
    val = tokens_of(Digits.val)
    found = {(p.blocks, p.avgpool, p.learning_rate): p.accuracy(val, Digits.val_labels).top1 for p in probes}
    assert max(found.values()) == max(top1 for kind, top1 in found.items() if kind[:2] == (3, True)) > 0.92
    assert max(top1 for kind, top1 in found.items() if kind[0] == 1) < 0.9
    steps: list[int] = []
    again = linear_probes(
        tokens_of(Digits.train), Digits.train_labels, blocks=(1,), steps=3, seed=1, progress=steps.append
    )
    assert steps == [1, 2, 3]
    same = linear_probes(tokens_of(Digits.train), Digits.train_labels, blocks=(1,), steps=3, seed=1)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(again, same, strict=True))


def test_linear_probes_without_patches_and_with_few_images() -> None:
    tokens = ProbeInputs(torch.randn(10, 1, 4))
    labels = torch.arange(10) % 2
    probes = linear_probes(tokens, labels, blocks=(1,), learning_rates=(0.1,), steps=2, batch_size=128)
    (same,) = linear_probes(tokens, labels, blocks=(1,), learning_rates=(0.1,), steps=2, batch_size=10)
    assert [(probe.blocks, probe.avgpool) for probe in probes] == [(1, False)]
    assert torch.equal(probes[0].weight, same.weight)


def test_images_outside_of_class_folders_are_named_without_secrets() -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    fsspec.filesystem("memory").pipe_file("/loose.tar?token=SECRET", content.getvalue())
    with pytest.raises(ValueError, match=r"^'memory://loose\.tar' lies in no class folder: 'memory://loose\.tar' must"):
        read_labelled(["memory://loose.tar?token=SECRET"], 1, ModelOptions("dinov2_vits14"))


X, Y = np.eye(6, 4, dtype=np.float32), np.array([0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((X, Y), {"neighbours": (6,)}, "between 1 and the 5 training images, got 6"),
        ((X, Y, X, Y), {"neighbours": (2, 7)}, "between 1 and the 6 training images, got 2, 7"),
        ((X, Y), {"neighbours": (0,)}, "between 1 and"),
        ((X, Y), {"neighbours": ()}, "between 1 and"),
        ((X, Y), {"neighbours": (1,), "temperature": 0.0}, "temperature must be positive, got 0.0"),
        ((X, Y), {"neighbours": (1,), "temperature": np.inf}, "temperature must be positive, got inf"),
        ((X, Y), {"n_per_class": 1}, "n_per_class needs val"),
        ((X, Y, X, Y), {"n_per_class": 0}, "between 1 and 3, the size of the largest training class, got 0"),
        ((X, Y, X, Y), {"n_per_class": 4}, "between 1 and 3, the size of the largest training class, got 4"),
        ((X, Y, X, Y), {"n_per_class": 1, "n_tries": 0}, "n_tries must be at least 1, got 0"),
        ((X, Y, X, Y), {"n_per_class": 1, "neighbours": (0,)}, "between 1 and the 6 training images, got 0"),
        ((X, Y[:5]), {}, r"train must be features \(images, dim\) and labels \(images,\), got \(6, 4\) and \(5,\)"),
        ((X, Y, X[0], Y), {}, r"val must be features .* got \(4,\)"),
        ((X, Y, X[:, :3], Y), {"neighbours": (1,)}, "train has features of 4 dimensions, val of 3"),
        ((X, Y - 1), {}, "labels of train must be whole numbers from 0 on"),
        ((X, Y / 2), {}, "labels of train must be whole numbers"),
        ((X * np.nan, Y), {}, "features of train contain NaN or infinity"),
    ],
)
def test_knn_says_what_does_not_fit(arguments: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knn(*arguments, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": (1, 4)}, "of the last 3 blocks; asked for 1, 4"),
        ({"blocks": (0,)}, "asked for 0"),
        ({"blocks": (1,), "steps": 0}, "steps and batch_size must be at least 1"),
        ({"blocks": (1,), "learning_rates": (0.1, -0.1)}, "learning rates above 0"),
        ({"blocks": (1,), "labels": Digits.labels[:7]}, "got .* and"),
    ],
)
def test_linear_probes_say_what_does_not_fit(settings: dict[str, Any], message: str) -> None:
    labels = settings.pop("labels", Digits.labels[:10])
    with pytest.raises(ValueError, match=message):
        linear_probes(tokens_of(Digits.pixels[:10]), labels, **settings)


def test_linear_probes_refuse_tokens_that_are_not_finite_in_any_block() -> None:
    tokens = ProbeInputs(torch.randn(4, 3, 2), torch.randn(4, 2))
    tokens.cls[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="features of train contain NaN"):
        linear_probes(tokens, [0, 1, 0, 1], blocks=(3, 1), steps=1)
