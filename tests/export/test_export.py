"""`export` writes files of standard operators that run at every size and compute what the model does, or no file."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dinov2_fast
from dinov2_fast.data.image_processor import Dinov2ImageProcessor
from dinov2_fast.export import METADATA, ExportError, export
from dinov2_fast.export.check import _run_all, compare, file_runner
from dinov2_fast.export.graph import GraphModule, copy_for_export
from tests.helpers.images import read_image
from tests.helpers.small_models import small

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

IMAGES = sorted((Path(__file__).parents[2] / "examples" / "images").glob("*.jpg"))
OUTPUTS = ("cls", "patch_mean", "patches", "registers")
ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def images(height: int, width: int, count: int = 5) -> torch.Tensor:
    """The photographs that ship with the project, in one batch."""
    return Dinov2ImageProcessor.for_size((height, width))([read_image(path) for path in IMAGES[:count]]).pixel_values


def outputs_of(model: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        features = model.forward_features(pixels)
    patches = features["x_norm_patchtokens"]
    return {
        "cls": features["x_norm_clstoken"],
        "patch_mean": patches.mean(dim=1),
        "patches": patches,
        "registers": features["x_norm_regtokens"],
    }


def as_exact_as_torch(ours: dict[str, torch.Tensor], model: Any, pixels: torch.Tensor, dtype: torch.dtype) -> None:
    """At most twice the error of the same model in torch, both against fp64."""
    exact = outputs_of(copy.deepcopy(model).double(), pixels.to(dtype).double())
    torchs = outputs_of(copy.deepcopy(model).to(dtype), pixels.to(dtype))
    for name, one in ours.items():
        assert one.dtype == dtype
        assert one.shape == exact[name].shape
        error, allowed = (one.double() - exact[name]).norm(), (torchs[name].double() - exact[name]).norm()
        assert error <= 2 * allowed + exact[name].norm() * ULP[dtype], (name, float(error), float(allowed))


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(session: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [output.name for output in session.get_outputs()]
    values = session.run(None, {"pixel_values": pixels.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def shape_of(value: Any) -> list[Any]:
    return [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return small(depth=1, num_register_tokens=2)


@pytest.fixture(scope="module")
def onnx_file(model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    path = tmp_path_factory.mktemp("onnx") / "new" / "model.onnx"
    batches = [images(70, 70), images(56, 98, count=1)]
    return export(model, path, outputs=OUTPUTS, images=batches, metadata={"model": "small"}), path


def test_the_onnx_file_holds_standard_operators_for_any_batch_and_size(onnx_file: tuple[Any, Path]) -> None:
    exported, path = onnx_file
    assert exported.files == (path,)
    assert list(path.parent.iterdir()) == [path]
    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert [(opset.domain, opset.version) for opset in file.opset_import] == [("", 20)]
    assert {node.domain for node in file.graph.node} == {""}
    assert not file.functions
    assert [value.name for value in file.graph.output] == list(OUTPUTS)
    (given,) = file.graph.input
    assert shape_of(given) == ["batch", 3, "height", "width"]
    assert [shape_of(value) for value in file.graph.output] == [
        ["batch", 32],
        ["batch", 32],
        ["batch", "patches", 32],
        ["batch", 2, 32],
    ]
    stored = {entry.key: entry.value for entry in file.metadata_props}
    assert json.loads(stored[METADATA]) == {
        "model": "small",
        "outputs": list(OUTPUTS),
        "dtype": "fp32",
        "position_interpolation": "offset",
        "version": dinov2_fast.__version__,
    }


@pytest.mark.parametrize("size", [(70, 70), (28, 28), (56, 98), (224, 154)])
@pytest.mark.parametrize("count", [1, 3])
def test_the_onnx_file_computes_what_the_model_does(
    model: Any, onnx_file: tuple[Any, Path], size: tuple[int, int], count: int
) -> None:
    pixels = images(*size, count=count)
    as_exact_as_torch(run(session_of(onnx_file[1]), pixels), model, pixels, torch.float32)


def test_the_differences_are_reported(onnx_file: tuple[Any, Path]) -> None:
    differences = onnx_file[0].differences
    assert [each.output for each in differences] == [*OUTPUTS, *OUTPUTS]
    assert [each.shape for each in differences][2::4] == [(5, 25, 32), (1, 28, 32)]
    assert all(0 < each.relative < 1e-5 and 0 < each.worst < 1e-4 for each in differences)


def test_a_fixed_fp16_graph_holds_no_float64_and_may_have_two_files(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2_fast.export.graph.ONE_FILE_BYTES", 0)
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "fixed.onnx"
    settings: dict[str, Any] = {"dtype": "fp16", "opset": 18, "batch_size": 2, "size": (56, 84)}
    exported = export(model, path, images=[images(56, 84, count=3)], **settings)
    assert exported.files == (path, tmp_path / "fixed.onnx.data")
    assert set(tmp_path.iterdir()) == set(exported.files)
    assert exported.differences[0].shape == (3, 32)

    file = onnx.load(path)
    assert [(opset.domain, opset.version) for opset in file.opset_import] == [("", 18)]
    assert shape_of(file.graph.input[0]) == [2, 3, 56, 84]
    casts = [entry.i for node in file.graph.node if node.op_type == "Cast" for entry in node.attribute]
    held = {value.type.tensor_type.elem_type for value in [*file.graph.value_info, *file.graph.output]}
    held |= {tensor.data_type for tensor in file.graph.initializer} | set(casts)
    assert onnx.TensorProto.DOUBLE not in held
    assert onnx.TensorProto.FLOAT16 in held

    pixels = images(56, 84, count=2).half()
    ours = run(session_of(path), pixels)
    as_exact_as_torch(ours, model, pixels, torch.float16)
    assert type(model) is dinov2_fast.DinoVisionTransformer
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_torch_program_holds_aten_operators_and_runs_every_size(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    exported = export(model, path, format="torch-export", dtype="bf16", outputs=("patches", "cls"))
    assert [each.output for each in exported.differences] == ["patches", "cls"] * 2
    stored = {METADATA: ""}
    program = torch.export.load(path, extra_files=stored)
    assert json.loads(stored[METADATA])["outputs"] == ["patches", "cls"]
    targets = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert {target.namespace for target in targets} == {"aten"}
    for count, size in ((1, (28, 42)), (4, (112, 70))):
        pixels = images(*size, count=count).bfloat16()
        patches, cls = program.module()(pixels)
        as_exact_as_torch({"patches": patches, "cls": cls}, model, pixels, torch.bfloat16)


def test_a_file_that_computes_something_else_is_not_kept(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = copy_for_export

    def faulty(*arguments: Any) -> Any:
        copied = prepared(*arguments)
        copied.blocks[0].mlp.fc2.bias.data.zero_()
        return copied

    monkeypatch.setattr("dinov2_fast.export.write.copy_for_export", faulty)
    path = tmp_path / "model.pt2"
    path.write_text("as before")
    with pytest.raises(ExportError, match=r"does not compute what the model does: cls \(1, 32\) differs by"):
        export(model, path, format="torch-export", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "as before"


def test_every_image_is_compared_where_the_batch_size_is_fixed() -> None:
    counts: list[int] = []

    def run(batch: torch.Tensor) -> list[torch.Tensor]:
        counts.append(len(batch))
        return [batch, 2 * batch]

    pixels = torch.arange(5.0)[:, None]
    for batch_size, expected in ((1, [1] * 5), (2, [2] * 3), (5, [5]), (8, [8])):
        counts.clear()
        ours, doubled = _run_all(run, pixels, batch_size)
        assert counts == expected
        torch.testing.assert_close((ours, doubled), (pixels, 2 * pixels), atol=0, rtol=0)


@pytest.mark.parametrize(("factor", "dtype"), [(1 + 2e-4, "fp32"), (1.03, "fp16"), (float("nan"), "bf16")])
def test_the_comparison_refuses(model: Any, factor: float, dtype: str) -> None:
    pixels, whole = images(28, 28, count=1), GraphModule(model, ("cls",), None)
    with torch.no_grad():
        right, wrong = (lambda x: whole(x.float())), (lambda x: [factor * whole(x.float())[0]])
        compare(right, whole, [pixels], dtype, None)
        with pytest.raises(ExportError, match=r"cls \(1, 32\) differs by .*Nothing was written"):
            compare(wrong, whole, [pixels], dtype, None)
        with pytest.raises(ExportError, match=r"gives cls \(32,\), the model \(1, 32\)"):
            compare(lambda x: [right(x)[0][0]], whole, [pixels], dtype, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "tensorrt"}, "no format 'tensorrt'; choose one of onnx, torch-export"),
        ({"dtype": "fp8"}, "no dtype 'fp8'; choose one of fp32, fp16, bf16"),
        ({"dtype": "bf16"}, "bf16 cannot be exported to ONNX"),
        (
            {"outputs": ("cls", "tokens")},
            "must be some of cls, patch_mean, patches, registers, logits, each once",
        ),
        ({"outputs": ("cls", "logits")}, "There is no classifier for the output logits"),
        ({"outputs": ("cls", "cls")}, "each once"),
        ({"outputs": ()}, "got none"),
        ({"opset": 17}, "opset 17 is too old"),
        ({"format": "torch-export", "opset": 18}, "Only ONNX has opsets"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"size": (224, 225)}, "multiples of the patch size 14, got 224 x 225"),
        ({"format": "torch-export"}, "ends in .pt2"),
        ({"images": []}, "There is no image to compare on"),
        ({"images": [torch.zeros(0, 3, 28, 28)]}, r"got \(0, 3, 28, 28\)"),
        ({"images": [torch.zeros(3, 28, 28)]}, r"got \(3, 28, 28\)"),
        ({"images": [torch.zeros(1, 1, 28, 28)]}, r"batches \(images, 3, .* got \(1, 1, 28, 28\)"),
        ({"images": [torch.zeros(1, 3, 28, 28), torch.zeros(1, 3, 28, 30)]}, r"of 14\), got \(1, 3, 28, 30\)"),
        ({"images": [torch.zeros(1, 3, 28, 28)], "size": (28, 42)}, r"\(images, 3, 28, 42\), got"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    model: Any, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "model.onnx", **settings)
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_exported_are_refused(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(TypeError, match=r"A Engine cannot be exported.*the model that it was made of"):
        export(dinov2_fast.optimize_for_inference(model), path)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        export(copy.deepcopy(model).train(), path)
    with pytest.raises(ValueError, match="has no registers"):
        export(small(depth=1), path, outputs=("registers",))
    unusual = copy.deepcopy(model)
    unusual.blocks[0].forward = lambda x: x * float(x.sum())  # depends on the data
    with pytest.raises(ExportError, match="torch cannot export this model: "):
        export(unusual, path)
    assert list(tmp_path.iterdir()) == []


def test_a_forced_kernel_refuses_export(model: Any, tmp_path: Path) -> None:
    with (
        dinov2_fast.use_backend("triton", strict=True),
        pytest.raises(ExportError, match="unset the backend"),
    ):
        export(model, tmp_path / "model.pt2", format="torch-export")


def test_a_file_is_replaced_only_when_asked(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("as before")
    with pytest.raises(FileExistsError, match="exists already"):
        export(model, path)
    assert path.read_text() == "as before"
    assert export(model, path, size=(28, 28), overwrite=True).files == (path,)
    onnx.checker.check_model(onnx.load(path))
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_refused_before_the_export(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2_fast.export.write.trace", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ExportError, match=r"model.onnx' cannot be written: .*file' is not a folder that you may write to"
    ):
        export(model, tmp_path / "file" / "new" / "model.onnx")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(ExportError, match=r"model.onnx' cannot be written: .* is not a folder that you may write to"):
        export(model, tmp_path / "new" / "model.onnx")
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(FileExistsError, match=r"model.onnx' exists already"):
        export(model, tmp_path / "model.onnx", overwrite=True)
    (tmp_path / "other.onnx.data").write_text("weights of another file")
    with pytest.raises(FileExistsError, match=r"other.onnx.data' exists already"):
        export(model, tmp_path / "other.onnx")


def test_a_newer_opset_than_the_exporters_is_refused_quietly(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ExportError, match="cannot write opset 99: leave it out for 20"):
        export(model, tmp_path / "model.onnx", opset=99, size=(28, 28))
    assert not [record for record in caplog.records if record.name.startswith("onnxscript")]
    assert list(tmp_path.iterdir()) == []


def test_a_graph_with_operators_beside_the_standard_is_refused(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = torch.onnx.export

    def with_a_foreign_node(*args: Any, **options: Any) -> Any:
        program = write(*args, **options)
        program.model.graph.node(0).domain = "com.example"
        return program

    monkeypatch.setattr(torch.onnx, "export", with_a_foreign_node)
    with pytest.raises(ExportError, match=r"not in the ONNX standard: com\.example::\w+\.$"):
        export(model, tmp_path / "model.onnx", size=(28, 28))
    assert list(tmp_path.iterdir()) == []


def test_a_half_precision_model_is_compared_in_fp32(model: Any, tmp_path: Path) -> None:
    """In half precision the model would differ by more than fp32 allows, and a correct file would be refused."""
    half = copy.deepcopy(model).half()
    exported = export(half, tmp_path / "model.pt2", format="torch-export")
    assert max(each.relative for each in exported.differences) < 1e-5
    assert half.pos_embed.dtype == torch.float16


def test_missing_packages_are_named(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    missing = ("onnxscript", "onnxruntime")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name in missing else find_spec(name, *a))
    with pytest.raises(ExportError, match=r"^Missing: onnxscript\. .*: pip install onnx onnxscript onnxruntime$"):
        export(model, tmp_path / "model.onnx")
    assert file_runner(tmp_path / "model.onnx", "onnx") is None
    missing = ("onnxruntime",)
    with pytest.raises(ExportError, match=r"^Missing: onnxruntime\. .*: pip install onnx onnxscript onnxruntime$"):
        export(model, tmp_path / "model.onnx", images=[images(28, 28, count=1)])
    assert export(model, tmp_path / "model.onnx", size=(28, 28)).differences == ()


def test_positions_of_a_fixed_size_are_those_of_the_position_interpolation() -> None:
    model = small(depth=1)
    tables = []
    for position_interpolation in ("offset", "size", "antialias"):
        model.position_interpolation = position_interpolation
        fixed = copy_for_export(model, torch.float32, (42, 28))
        pixels = torch.randn(1, 3, 42, 28)
        with torch.no_grad():
            np.testing.assert_array_equal(fixed(pixels).numpy(), model(pixels).numpy())
        tables.append(fixed.pos_embed)
    assert tables[0].shape == (1, 7, 32)
    assert not torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[1], tables[2])
