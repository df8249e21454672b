"""The predicted time of each way to run a layer on an H200, and the gain over torch.compile.

``python -m bench.predictions`` prints the tables that bench/results/NOTES.md holds. Nothing in them was measured; rows
of bench.ops and bench.model can refute them.

A layer is a list of steps, and its time is the sum of their times. A step takes the time of its operations or of its
bytes, whichever is longer: a product hides the traffic of its operands and its result, unless memory is slower. Bytes
are counted in transfers: one transfer reads or writes the residual stream once in 16 bits. Weights and launches are not
counted, since they are small compared with a large batch.
"""

from __future__ import annotations

from typing import NamedTuple

from bench.harness import MODELS
from bench.report import format_number, markdown_table
from bench.roofline import CLASS_TOKEN_LAYERS, Rates, forward_work
from bench.workloads import Shape, attention_flops

# A copy and a large product in bf16 were once measured on an H200, but no rows were kept. e4m3 is assumed.
H200 = Rates(copy=4.3e12, product=790e12, e4m3=1400e12)
ELEMENTWISE = 0.92  # the share of a copy's rate that steps reach which only move bytes: assumed
OUTPUTS = {224: "cls", 518: "all"}  # of our engine, by pixels; a peer always computes all tokens
SHAPES = {f"{name} {pixels}": Shape(MODELS[name], pixels, 1) for pixels in OUTPUTS for name in "SBLg"}

# Speeds by the name of the row of bench.ops that measures them. For a linear with its epilogue: the share of the rate
# of a large product, by in_features. For attention: TFLOP/s, by tokens. Sources:
# - linear torch: published curves of cuBLAS; 588 and 3072 are interpolated;
# - linear.gelu cublas: a guess, 0.95 of that;
# - attention torch: that of cuDNN, a guess at 257 tokens, published at 1370;
# - attention cuda: published for FlashAttention-3;
# - all others: counted in compiled code. linear cuda is 0.90 to 0.96 of linear torch, linear triton 0.72 to 0.93.
SPEEDS: dict[str, dict[int, float]] = {
    "linear torch": {384: 0.62, 588: 0.70, 768: 0.76, 1024: 0.82, 1536: 0.87, 3072: 0.92, 4096: 0.94},
    "linear.gelu cublas": {384: 0.59, 768: 0.72, 1024: 0.78},
    "linear cuda": {384: 0.56, 768: 0.71, 1024: 0.77, 1536: 0.84, 3072: 0.88, 4096: 0.90},
    "linear triton": {384: 0.45, 768: 0.62, 1024: 0.70, 1536: 0.77, 3072: 0.85, 4096: 0.87},
    "attention torch": {257: 185, 1370: 385},
    "attention triton": {257: 240, 1370: 350},
    "attention cuda": {1370: 450},
}
KernelNames = tuple[str, ...]  # keys of SPEEDS; the fastest is used
LINEAR_TORCH, LINEAR_CUDA, LINEAR_TRITON = ("linear torch",), ("linear cuda",), ("linear triton",)
GELU_CUBLAS = ("linear.gelu cublas",)
FC1_FUSED = GELU_CUBLAS + LINEAR_CUDA
ATTENTION_TORCH, ATTENTION_TRITON = ("attention torch",), ("attention triton",)
ATTENTION_EITHER = ATTENTION_TORCH + ATTENTION_TRITON
ATTENTION_ANY = (*ATTENTION_EITHER, "attention cuda")


class LayerDesign(NamedTuple):
    """A way to run a layer: the transfers of the steps that only move bytes, and the kernels of the other steps."""

    norm: float  # of each of the two
    residual: float  # of each of the two
    gelu: float  # 0 if it is fused
    swiglu: float
    quantise: float = 0  # of attention's result to e4m3
    linear: KernelNames = LINEAR_TORCH  # qkv, proj, fc2
    fc1: KernelNames = LINEAR_TORCH
    attention: KernelNames = ATTENTION_TORCH
    e4m3: bool = False


# The MLP's hidden tensor h is 4 transfers with GELU, and 8/3 with SwiGLU, whose fc1 returns 2h. GELU in place moves 2h.
# SwiGLU moves 3h in one kernel, and 5h as silu and a product. A kernel of ours that converts from 16 bits to e4m3 moves
# 1.5 times the tensor.
PEERS = {"timm eager": LayerDesign(2, 2 + 3, 8, 40 / 3), "timm compile": LayerDesign(2, 2, 8, 8)}
DESIGNS = PEERS | {
    "engine": LayerDesign(2, 3, 8, 40 / 3),
    "engine-triton": LayerDesign(2, 1, 0, 0, 0, LINEAR_TRITON, LINEAR_TRITON, ATTENTION_TRITON),
    "A: residual, GELU, SwiGLU cublas": LayerDesign(2, 1, 0, 8, 0, LINEAR_TORCH, GELU_CUBLAS),
    "B: A, SwiGLU cuda, attention triton": LayerDesign(2, 1, 0, 0, 0, LINEAR_TORCH, FC1_FUSED, ATTENTION_EITHER),
    "C: B, attention cuda": LayerDesign(2, 1, 0, 0, 0, LINEAR_TORCH, FC1_FUSED, ATTENTION_ANY),
    "fp8, cublas, activation triton": LayerDesign(1.5, 3, 6, 20 / 3, 1.5, e4m3=True),
    "fp8, cuda": LayerDesign(1.5, 1, 0, 0, 1.5, LINEAR_CUDA, LINEAR_CUDA, e4m3=True),
    "fp8, cuda, attention as C": LayerDesign(1.5, 1, 0, 0, 1.5, LINEAR_CUDA, LINEAR_CUDA, ATTENTION_ANY, e4m3=True),
}


class LayerStep(NamedTuple):
    """Bytes to move, and operations at `rate` per second."""

    name: str
    moved: float
    flops: float = 0
    rate: float = 1

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / self.rate, self.moved / (ELEMENTWISE * rates.copy))


def layer_steps(design: LayerDesign, shape: Shape, rates: Rates = H200) -> list[LayerStep]:
    """The steps of one layer."""
    rows, itemsize = shape.batch * shape.tokens, 1 if design.e4m3 else 2  # of the operands of a product
    transfer, activation = 2 * rows * shape.hidden, design.swiglu if shape.swiglu else design.gelu
    large = (design.e4m3 and rates.e4m3) or rates.product

    def product(place: str, kernels: KernelNames, fused: bool = False) -> LayerStep:
        inputs, outputs = shape.features[place]
        moved = itemsize * inputs + (itemsize * shape.features["fc2"][0] if fused else 2 * outputs)
        return LayerStep(place, rows * moved, 2 * rows * inputs * outputs, large * fastest(kernels, inputs))

    norm, residual = LayerStep("norm", design.norm * transfer), LayerStep("residual", design.residual * transfer)
    attention = LayerStep(
        "attention", 4 * transfer, attention_flops(shape), 1e12 * fastest(design.attention, shape.tokens)
    )
    quantise, act = LayerStep("quantise", design.quantise * transfer), LayerStep("activation", activation * transfer)
    qkv, proj, fc2 = (product(place, design.linear) for place in ("qkv", "proj", "fc2"))
    fc1 = product("fc1", design.fc1, fused=not activation)
    return [norm, qkv, attention, quantise, proj, residual, norm, fc1, act, fc2, residual]


def fastest(kernels: KernelNames, size: int) -> float:
    """The speed at `size` in_features or tokens. Where no kernel has the size (GELU in ViT-g), it is that of torch."""
    speeds = [SPEEDS[name][size] for name in kernels if size in SPEEDS[name]]
    return max(speeds) if speeds else SPEEDS["linear torch"][size]


def model_steps(design: LayerDesign, shape: Shape, output: str, rates: Rates = H200) -> list[LayerStep]:
    """The steps of the patch embedding and all layers. For output "cls" the last layer is that of bench.roofline."""
    one_layer, class_token_layers = layer_steps(design, shape, rates), CLASS_TOKEN_LAYERS[output]
    full_layers = shape.config.depth - class_token_layers
    floor = forward_work(shape.config, shape.resolution, shape.batch, output, 2, design.e4m3)
    patches = LayerStep("patches", 0, floor.embedding, rates.product * fastest(LINEAR_TORCH, 588))
    pool = LayerStep("pool", 2 * shape.batch * shape.tokens * shape.hidden)
    rest = floor.products - full_layers * sum(step.flops for step in one_layer if step.name in shape.features)
    class_token = LayerStep("class token", 0, rest, rates.product)
    return [patches, *full_layers * one_layer, *class_token_layers * [pool, class_token]]


def seconds(steps: list[LayerStep], rates: Rates = H200) -> float:
    return sum(step.seconds(rates) for step in steps)


def counts(steps: list[LayerStep]) -> tuple[float, float, float]:
    """GFLOP of products and of attention, and MB that no product hides."""
    attention = sum(step.flops for step in steps if step.name == "attention")
    products = sum(step.flops for step in steps) - attention
    return products / 1e9, attention / 1e9, sum(step.moved for step in steps if not step.flops) / 1e6


def tables() -> str:
    """All tables, in Markdown."""

    def steps_of(name: str, shape: Shape) -> list[LayerStep]:
        return model_steps(DESIGNS[name], shape, "all" if name in PEERS else OUTPUTS[shape.resolution])

    def count_cells(name: str, column: int) -> list[str]:
        pairs = ((layer_steps(DESIGNS[name], shape), steps_of(name, shape)) for shape in SHAPES.values())
        return [" / ".join(format_number(counts(steps)[column]) for steps in pair) for pair in pairs]

    speeds = [[name, ", ".join(f"{size}: {speed:g}" for size, speed in by.items())] for name, by in SPEEDS.items()]
    amounts = [[f"GFLOP of products, {name}", *count_cells(name, 0)] for name in ("timm compile", "engine-triton")]
    amounts += [[f"GFLOP of attention, {name}", *count_cells(name, 1)] for name in ("timm compile", "engine-triton")]
    same_bytes: dict[tuple[str, ...], list[str]] = {}  # the designs that move as many bytes share a line
    for name in DESIGNS:
        same_bytes.setdefault(tuple(count_cells(name, 2)), []).append(name)
    amounts += [[f"MB, {'; '.join(names)}", *cells] for cells, names in same_bytes.items()]
    pass_seconds = {name: [seconds(steps_of(name, shape)) for shape in SHAPES.values()] for name in DESIGNS}
    compiled = pass_seconds.pop("timm compile")
    times = [["images/s of timm compile", *(format_number(1 / each) for each in compiled)]]
    for name, each in pass_seconds.items():
        times.append([f"times that, {name}", *(f"{peer / own:.2f}" for peer, own in zip(compiled, each, strict=True))])
    head = ("row of `bench.ops`", "by in_features: share of a large product; by tokens: TFLOP/s")
    every = (head, speeds), (("a layer / a model", *SHAPES), amounts), (("a model", *SHAPES), times)
    return "\n".join(markdown_table(*table) for table in every)


if __name__ == "__main__":
    print(tables(), end="")
