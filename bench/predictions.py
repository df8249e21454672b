"""What each way to run a layer should take on an H200, and gain over torch.compile: ``python -m bench.predictions``.

Nothing here was measured. bench/results/NOTES.md has the tables, for rows of bench.ops and bench.model to refute.

A layer is a list of steps, and its time is the sum of theirs. A step takes the time of its operations or of its bytes,
whichever is longer: a product hides the traffic of its operands and its result, unless memory is slower. The unit of
bytes is the transfer: the residual stream, read or written once in 16 bits. Weights and launches cost nothing: they are
small beside a large batch.
"""

from __future__ import annotations

from typing import NamedTuple

from bench.harness import MODELS
from bench.report import markdown, number
from bench.roofline import SKINNY_LAYERS, Rates, work
from bench.workloads import Shape, attention_flops

# A copy and a large product in bf16 were measured on an H200 before, but no rows were kept. e4m3 is assumed.
H200 = Rates(copy=4.3e12, product=790e12, e4m3=1400e12)
ELEMENTWISE = 0.92  # of the rate of a copy, for steps that only move bytes: assumed
OUTPUTS = {224: "cls", 518: "all"}  # of our engine, by pixels; a peer computes all tokens in any case
SHAPES = {f"{name} {pixels}": Shape(MODELS[name], pixels, 1) for pixels in OUTPUTS for name in "SBLg"}

# Named after the rows of bench.ops that show them. A linear, with its epilogue, has its share of the rate of a large
# product, by in_features. Attention has TFLOP/s, by tokens. Where they come from:
# - linear torch: published curves of cuBLAS, with 588 and 3072 put between their neighbours;
# - linear.gelu cublas: a guess, 0.95 of that;
# - attention torch: cuDNN's, a guess at 257 tokens, published at 1370; attention cuda: published for FlashAttention-3;
# - all others: counted in compiled code. linear cuda is 0.90 to 0.96 of torch's, linear triton 0.72 to 0.93.
SPEEDS: dict[str, dict[int, float]] = {
    "linear torch": {384: 0.62, 588: 0.70, 768: 0.76, 1024: 0.82, 1536: 0.87, 3072: 0.92, 4096: 0.94},
    "linear.gelu cublas": {384: 0.59, 768: 0.72, 1024: 0.78},
    "linear cuda": {384: 0.56, 768: 0.71, 1024: 0.77, 1536: 0.84, 3072: 0.88, 4096: 0.90},
    "linear triton": {384: 0.45, 768: 0.62, 1024: 0.70, 1536: 0.77, 3072: 0.85, 4096: 0.87},
    "attention torch": {257: 185, 1370: 385},
    "attention triton": {257: 240, 1370: 350},
    "attention cuda": {1370: 450},
}
Kernels = tuple[str, ...]  # names in SPEEDS, of which the fastest counts
TORCH, CUBLAS, CUDA, TRITON, CUDNN, OURS, FMHA = ((name,) for name in SPEEDS)


class Programme(NamedTuple):
    """A way to run a layer: the transfers of the steps that only move bytes, and the kernels of the others."""

    norm: float  # each of two
    residual: float  # each of two
    gelu: float  # 0 if it is fused
    swiglu: float
    quantise: float = 0  # attention's result into e4m3
    linear: Kernels = TORCH  # qkv, proj, fc2
    fc1: Kernels = TORCH
    attention: Kernels = CUDNN
    e4m3: bool = False


# The hidden tensor h is 4 transfers with GELU, and 8/3 with SwiGLU, whose fc1 gives 2h. GELU moves 2h in place. SwiGLU
# moves 3h in one kernel and 5h as silu and a product. From 16 bits to e4m3 a kernel of ours moves 1.5 times the tensor.
PEERS = {"timm eager": Programme(2, 2 + 3, 8, 40 / 3), "timm compile": Programme(2, 2, 8, 8)}
PROGRAMMES = PEERS | {
    "engine": Programme(2, 3, 8, 40 / 3),
    "engine-triton": Programme(2, 1, 0, 0, 0, TRITON, TRITON, OURS),
    "A: residual, GELU, SwiGLU cublas": Programme(2, 1, 0, 8, 0, TORCH, CUBLAS),
    "B: A, SwiGLU cuda, attention triton": Programme(2, 1, 0, 0, 0, TORCH, CUBLAS + CUDA, CUDNN + OURS),
    "C: B, attention cuda": Programme(2, 1, 0, 0, 0, TORCH, CUBLAS + CUDA, CUDNN + OURS + FMHA),
    "fp8, cublas, activation triton": Programme(1.5, 3, 6, 20 / 3, 1.5, e4m3=True),
    "fp8, cuda": Programme(1.5, 1, 0, 0, 1.5, CUDA, CUDA, e4m3=True),
    "fp8, cuda, attention as C": Programme(1.5, 1, 0, 0, 1.5, CUDA, CUDA, CUDNN + OURS + FMHA, e4m3=True),
}


class Step(NamedTuple):
    """Bytes to move, and operations at `rate` a second."""

    name: str
    moved: float
    flops: float = 0
    rate: float = 1

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / self.rate, self.moved / (ELEMENTWISE * rates.copy))


def layer(programme: Programme, shape: Shape, rates: Rates = H200) -> list[Step]:
    """The steps of one layer."""
    rows, itemsize = shape.batch * shape.tokens, 1 if programme.e4m3 else 2  # of what a product reads
    transfer, activation = 2 * rows * shape.hidden, programme.swiglu if shape.swiglu else programme.gelu
    large = (programme.e4m3 and rates.e4m3) or rates.product

    def product(place: str, kernels: Kernels, fused: bool = False) -> Step:
        inputs, outputs = shape.features[place]
        moved = itemsize * inputs + (itemsize * shape.features["fc2"][0] if fused else 2 * outputs)
        return Step(place, rows * moved, 2 * rows * inputs * outputs, large * fastest(kernels, inputs))

    norm, residual = Step("norm", programme.norm * transfer), Step("residual", programme.residual * transfer)
    attention = Step(
        "attention", 4 * transfer, attention_flops(shape), 1e12 * fastest(programme.attention, shape.tokens)
    )
    quantise, act = Step("quantise", programme.quantise * transfer), Step("activation", activation * transfer)
    qkv, proj, fc2 = (product(place, programme.linear) for place in ("qkv", "proj", "fc2"))
    fc1 = product("fc1", programme.fc1, fused=not activation)
    return [norm, qkv, attention, quantise, proj, residual, norm, fc1, act, fc2, residual]


def fastest(kernels: Kernels, size: int) -> float:
    """The speed at in_features or tokens. If no kernel has the size, as with GELU in ViT-g, it is torch's."""
    speeds = [SPEEDS[name][size] for name in kernels if size in SPEEDS[name]]
    return max(speeds) if speeds else SPEEDS["linear torch"][size]


def model(programme: Programme, shape: Shape, output: str, rates: Rates = H200) -> list[Step]:
    """The steps of all layers and of the patch embedding. For output "cls" the last layer is that of bench.roofline."""
    one, skinny = layer(programme, shape, rates), SKINNY_LAYERS[output]
    full = shape.config.depth - skinny
    least = work(shape.config, shape.resolution, shape.batch, output, 2, programme.e4m3)
    patches = Step("patches", 0, least.embedding, rates.product * fastest(TORCH, 588))
    pool = Step("pool", 2 * shape.batch * shape.tokens * shape.hidden)
    alone = least.products - full * sum(step.flops for step in one if step.name in shape.features)
    class_token = Step("class token", 0, alone, rates.product)
    return [patches, *full * one, *skinny * [pool, class_token]]


def seconds(steps: list[Step], rates: Rates = H200) -> float:
    return sum(step.seconds(rates) for step in steps)


def counts(steps: list[Step]) -> tuple[float, float, float]:
    """GFLOP of products and of attention, and MB that no product hides."""
    attention = sum(step.flops for step in steps if step.name == "attention")
    products = sum(step.flops for step in steps) - attention
    return products / 1e9, attention / 1e9, sum(step.moved for step in steps if not step.flops) / 1e6


def text() -> str:
    """The tables, in Markdown."""
    models = {
        name: [model(one, shape, "all" if name in PEERS else OUTPUTS[shape.resolution]) for shape in SHAPES.values()]
        for name, one in PROGRAMMES.items()
    }

    def count(name: str, what: int) -> list[str]:
        pairs = [(layer(PROGRAMMES[name], shape), of) for shape, of in zip(SHAPES.values(), models[name], strict=True)]
        return [" / ".join(number(counts(steps)[what]) for steps in pair) for pair in pairs]

    speeds = [[name, ", ".join(f"{size}: {speed:g}" for size, speed in some.items())] for name, some in SPEEDS.items()]
    amounts = [[f"GFLOP of products, {name}", *count(name, 0)] for name in ("timm compile", "engine-triton")]
    amounts += [[f"GFLOP of attention, {name}", *count(name, 1)] for name in ("timm compile", "engine-triton")]
    moved: dict[tuple[str, ...], list[str]] = {}  # the programmes that move as much
    for name in PROGRAMMES:
        moved.setdefault(tuple(count(name, 2)), []).append(name)
    amounts += [[f"MB, {'; '.join(names)}", *cells] for cells, names in moved.items()]
    compiled = [seconds(steps) for steps in models.pop("timm compile")]
    times = [["images/s of timm compile", *(number(1 / each) for each in compiled)]]
    for name, some in models.items():
        ratios = [peer / seconds(steps) for peer, steps in zip(compiled, some, strict=True)]
        times.append([f"times that, {name}", *map("{:.2f}".format, ratios)])
    heads = ("row of `bench.ops`", "by in_features: share of a large product; by tokens: TFLOP/s")
    tables = (heads, speeds), (("a layer / a model", *SHAPES), amounts), (("a model", *SHAPES), times)
    return "\n".join(markdown(*one) for one in tables)


if __name__ == "__main__":
    print(text(), end="")
