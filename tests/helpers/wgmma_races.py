"""Finds in a kernel's PTX writes into shared memory that a wgmma of another warp group may still be reading.

A wgmma reads its operands from shared memory while its warp group runs on, and `wgmma.wait_group` waits for the group's
own only. In a kernel of several warp groups, what comes between such a wait and the next write over the operands must
be a barrier of the whole block. Triton 3.6 puts none there for this purpose (triton-lang/triton#11047); those that
stand there serve another.

All paths are followed, through branches and around loops. The address of a write or an operand is the range of all
values that it may have, over threads and iterations. So the buffers of a ring count as one, and a copy by TMA, whose
size the instruction does not tell, reaches to the end of shared memory: what is found may be harmless, and the buffers
need to be looked at. What this cannot show: a write over operands that nobody has waited for yet, which the order of
the ring excludes; reads by anything else than wgmma; barriers that some of the threads branch around.
"""

from __future__ import annotations

import math
import re
from collections import ChainMap, Counter, defaultdict
from collections.abc import Callable, Mapping
from itertools import count
from typing import NamedTuple

Extent = tuple[float, float]  # bytes of shared memory: the first, and the first after them

MAX_GROUPS = 8  # no kernel has as many groups of wgmma in flight
MAX_ROUNDS = 8  # after which a register that still grows is unbounded
WRITE_BYTES = 16  # of one thread, at most, and never across a multiple of it

_LINE = re.compile(
    r"^(?:(?P<label>\$L__BB\w+):|[ \t]*(?:(?P<guard>@!?%\w+)[ \t]+)?(?P<opcode>[a-z][\w.:]*)(?P<rest>[^;\n]*);)",
    re.MULTILINE,
)
_WRITES = re.compile(
    r"(st|red|atom)\.(\w+\.)*shared|stmatrix|mbarrier\.init|cp\.async\.(c[ag]|bulk\.[\w.]+)\.shared(::\w+)?\.global"
)


class Range(NamedTuple):
    """The values that a register may have: the least, the greatest, and all bits that are set in any."""

    low: float
    high: float
    bits: int = -1

    @classmethod
    def of(cls, low: float, high: float, bits: int = -1) -> Range:
        """With what each of the three says about the others."""
        if low >= 0:
            bits = bits if high == math.inf else bits & (1 << int(high).bit_length()) - 1
            high = min(high, bits) if bits >= 0 else high
        return cls(low, high, bits)

    def join(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high), self.bits | other.bits)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


EVERYTHING = Range(-math.inf, math.inf)


class Statement(NamedTuple):
    guard: str  # "@%p1" if a predicate decides whether it is executed
    opcode: str
    operands: list[str]


class Read(NamedTuple):
    """A wgmma that another warp group may still execute."""

    position: int
    groups: int | None  # that its own warp group has committed from it on, itself included; None after the wait for it


def unordered_writes(ptx: str) -> list[str]:
    """A sentence for each write that is not ordered after reads of a wgmma, in a kernel of several warp groups."""
    statements, labels = _parse(ptx)
    if not any(map(_is_wgmma, statements)):
        return []
    memory = _memory(statements, labels, int(re.search(r"\.reqntid (\d+)", ptx)[1]))
    pending = _pending(statements, labels)
    found = []
    for at in (i for i in memory if not _is_wgmma(statements[i])):
        reads = {read.position for read in pending[at] if read.groups is None}
        if any(_overlap(memory[at][0], operand) for read in reads for operand in memory[read]):
            write = f"{statements[at].opcode} {statements[at].operands[0]}"
            found.append(f"{write} over operands of wgmma that another warp group may still read")
    return found


def _parse(ptx: str) -> tuple[list[Statement], dict[str, int]]:
    statements: list[Statement] = []
    labels = {}
    for match in _LINE.finditer(re.sub(r"//.*", "", ptx)):
        if match["label"]:
            labels[match["label"]] = len(statements)
        else:
            operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^\s,{}[\]]+", match["rest"])
            statements.append(Statement(match["guard"] or "", match["opcode"], operands))
    return statements, labels


def _is_wgmma(statement: Statement) -> bool:
    return statement.opcode.startswith("wgmma.mma_async")


def _is_write(statement: Statement) -> bool:
    return bool(_WRITES.match(statement.opcode))


def _pending(statements: list[Statement], labels: dict[str, int]) -> dict[int, set[Read]]:
    """By statement, what may still be read when it is reached, over all paths to it."""
    before: dict[int, set[Read]] = defaultdict(set)
    seen, todo = set(), [0]
    while todo:
        i = todo.pop()
        if i == len(statements):
            continue
        seen.add(i)
        after = _step(before[i], i, statements[i])
        for successor in _successors(i, statements[i], labels):
            if successor not in seen or not after <= before[successor]:
                before[successor] |= after
                todo.append(successor)
    return before


def _successors(i: int, statement: Statement, labels: dict[str, int]) -> list[int]:
    if statement.opcode in ("ret", "exit", "trap"):
        return [i + 1] if statement.guard else []
    target = labels.get(statement.operands[-1]) if statement.opcode.startswith("bra") else None
    if target is None:  # no branch, or one within inline assembly, which waits in a loop
        return [i + 1]
    return [target, i + 1] if statement.guard else [target]


def _step(reads: set[Read], i: int, statement: Statement) -> set[Read]:
    opcode = statement.opcode
    if _is_wgmma(statement):
        return reads | {Read(i, 0)}
    if opcode.startswith("wgmma.commit_group"):
        return {Read(at, None if n is None else min(n + 1, MAX_GROUPS)) for at, n in reads}
    if opcode.startswith("wgmma.wait_group"):
        left = int(statement.operands[0])
        return {Read(at, None if n is None or n > left else n) for at, n in reads}
    if opcode in ("bar.sync", "barrier.sync") and len(statement.operands) == 1 and not statement.guard:
        return {read for read in reads if read.groups is not None}
    return reads


def _overlap(a: Extent, b: Extent) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _written(statement: Statement, ranges: Mapping[str, Range]) -> Extent:
    """The bytes that a write may reach."""
    low, high = _address(next(word for word in statement.operands if word.startswith("[")), ranges)
    return low, math.inf if ".bulk" in statement.opcode else (high // WRITE_BYTES + 1) * WRITE_BYTES


def _address(word: str, ranges: Mapping[str, Range]) -> tuple[float, float]:
    parts = [_value(part, ranges) or EVERYTHING for part in re.split(r"\s*\+\s*", word.strip("[] "))]
    return sum(part.low for part in parts), sum(part.high for part in parts)


def _operands(statement: Statement, ranges: Mapping[str, Range]) -> list[Extent]:
    """The bytes that the operands of a wgmma in shared memory may lie in."""
    n, k, dtype = re.search(r"\.m64n(\d+)k(\d+)\.\w+\.(\w+)", statement.opcode).groups()
    by_column = statement.operands[-2:] if dtype in ("bf16", "f16") else ("0", "0")
    return [
        _tile(ranges.get(word, EVERYTHING), size, int(k) if flag == "1" else 0)
        for word, size, flag in zip(statement.operands[1:3], (64, int(n)), by_column, strict=True)
        if not word.startswith("{")
    ]


def _tile(descriptor: Range, rows: int, columns: int) -> Extent:
    """What a tile may cover, of which a descriptor says the place: PTX ISA, "Matrix Descriptor Format".

    It is made of atoms of 8 rows by the swizzle's width; of 8 of `columns` if these, of two bytes, are not 0.
    """
    low, high, _ = descriptor
    if not high - low < 1 << 14:
        return -math.inf, math.inf
    start, (leading, stride) = int(low) & 0x3FFF, [(int(low) >> shift & 0x3FFF) << 4 for shift in (16, 32)]
    width = (16, 128, 64, 32)[int(low) >> 62 & 3]
    atoms = -(-2 * rows // width) + columns // 8 - 1 if columns else rows // 8
    first, last = ((place << 4) // (8 * width) * 8 * width for place in (start, start + int(high - low)))
    return first, last + (atoms - 1) * max(leading, stride) + 8 * width


def _memory(statements: list[Statement], labels: dict[str, int], threads: int) -> dict[int, list[Extent]]:
    """By statement, the bytes of shared memory that a write changes or a wgmma reads, from any thread at any time."""
    assigned = Counter(s.operands[0] for s in statements if s.operands)
    limits = {s.operands[0]: s.operands[1:] for s in statements if s.opcode == "setp.gt.s32"}
    limits = {predicate: compared for predicate, compared in limits.items() if assigned[predicate] == 1}
    anywhere: dict[str, Range] = {"%tid.x": Range.of(0, threads - 1), "global_smem": Range(0, 0, 0)}
    starts = set(labels.values())
    for rounds in count():
        before, block, memory = dict(anywhere), {}, {}
        for i, statement in enumerate(statements):
            if i in starts:
                block = {}  # of what the basic block has assigned so far
            ranges = ChainMap(block, anywhere)
            if _is_wgmma(statement):
                memory[i] = _operands(statement, ranges)
            elif _is_write(statement):
                memory[i] = [_written(statement, ranges)]
            elif statement.operands:
                for target in re.findall(r"%r\w+", "" if statement.operands[0][0] == "[" else statement.operands[0]):
                    found = _result(statement, ranges, limits)
                    _assign(target, found, block, anywhere, statement.guard != "", rounds > MAX_ROUNDS)
        if anywhere == before:
            return memory
    raise AssertionError


def _assign(
    target: str, found: Range | None, block: dict[str, Range], anywhere: dict[str, Range], maybe: bool, widen: bool
) -> None:
    block.pop(target, None)
    if found is None:
        return
    if not maybe:
        block[target] = found
    known = anywhere.get(target, found)
    joined = known.join(found)
    anywhere[target] = EVERYTHING if widen and joined != known else joined


def _value(word: str, ranges: Mapping[str, Range]) -> Range | None:
    """The range of an operand, None for a register that nothing is known to be assigned to yet."""
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", word):
        return Range(int(word, 0), int(word, 0), int(word, 0))
    return ranges.get(word, None if word.startswith("%r") else EVERYTHING)


def _result(statement: Statement, ranges: Mapping[str, Range], limits: dict[str, list[str]]) -> Range | None:
    """What an instruction may assign, None if an operand of it is not assigned yet."""
    name, *types = statement.opcode.split(".")
    if name not in ("selp", *_ARITHMETIC) or types[-1][0] == "f" or "hi" in types or statement.operands[0][0] == "{":
        return EVERYTHING
    words = statement.operands[1:]
    values = [_value(word, ranges) for word in words]
    if any(value is None for value in values):
        return None
    return _selected(words, values, ranges, limits) if name == "selp" else _ARITHMETIC[name](types, *values)


def _selected(
    words: list[str], values: list[Range], ranges: Mapping[str, Range], limits: dict[str, list[str]]
) -> Range:
    """Of `selp`; a value that is selected unless it is greater than a limit is not: so a ring of buffers counts."""
    selected, other, _ = values
    limited, limit = limits.get(words[2], ("", ""))
    if limited == words[1]:
        other = Range.of(other.low, min(other.high, (_value(limit, ranges) or EVERYTHING).high), other.bits)
    return selected.join(other)


def _converted(types: list[str], a: Range) -> Range:
    *_, to, source = types
    if to[0] not in "us" or source[0] not in "us":
        return EVERYTHING
    kept = 0 <= a.low <= a.high < 2 ** min(int(to[1:]), int(source[1:])) or (to, source) == ("s64", "s32")
    return a if kept else EVERYTHING


def _sum(types: list[str], a: Range, b: Range) -> Range:
    return Range.of(a.low + b.low, a.high + b.high, -1 if a.bits & b.bits else a.bits | b.bits)


def _difference(types: list[str], a: Range, b: Range) -> Range:
    return Range.of(a.low - b.high, a.high - b.low)


def _product(types: list[str], a: Range, b: Range) -> Range:
    if not a.finite or not b.finite:
        return EVERYTHING
    products = [x * y for x in a[:2] for y in b[:2]]
    return Range.of(min(products), max(products))


def _and(types: list[str], a: Range, b: Range) -> Range:
    for value, mask in ((a, b), (b, a)):
        if value.low >= 0 and mask.low == mask.high and value.bits >= 0 and value.bits & mask.bits == value.bits:
            return value
    bits = a.bits & b.bits
    return Range.of(0, math.inf, bits) if bits >= 0 else EVERYTHING


def _or(types: list[str], a: Range, b: Range) -> Range:
    """Of `or` and `xor`."""
    if not a.bits & b.bits:
        return _sum(types, a, b)
    return Range.of(0, a.high + b.high, a.bits | b.bits) if min(a.low, b.low) >= 0 else EVERYTHING


def _left(types: list[str], a: Range, b: Range) -> Range:
    if b.low != b.high:
        return EVERYTHING
    return Range.of(a.low * 2**b.low, a.high * 2**b.low, a.bits << b.low)


def _right(types: list[str], a: Range, b: Range) -> Range:
    if b.low != b.high:
        return EVERYTHING
    greatest = 2 ** int(types[-1][1:]) - 1
    if types[-1][0] != "s" and not 0 <= a.low <= a.high <= greatest:
        a = Range.of(0, greatest, a.bits & greatest)
    return Range.of(a.low >> b.low, a.high >> b.low, a.bits >> b.low) if a.finite else EVERYTHING


def _field(types: list[str], a: Range, first: Range, length: Range) -> Range:
    size = 2**length.low
    if types[-1][0] == "s":
        return Range(-size // 2, size // 2 - 1)
    if 0 <= a.low <= a.high < size << first.low:
        return Range.of(a.low >> first.low, a.high >> first.low, a.bits >> first.low)
    return Range.of(0, size - 1, a.bits >> first.low & size - 1)


_ARITHMETIC: dict[str, Callable[..., Range]] = {
    "mov": lambda types, a: a,
    "cvt": _converted,
    "shfl": lambda types, a, *lanes: a,
    "add": _sum,
    "sub": _difference,
    "mul": _product,
    "mad": lambda types, a, b, c: _sum(types, _product(types, a, b), c),
    "and": _and,
    "or": _or,
    "xor": _or,
    "shl": _left,
    "shr": _right,
    "bfe": _field,
}
