"""How long a GPU takes at least for a program, read from the text that its compiler leaves.

Every kernel takes at least what its matrix products take at the peak, and at least what its
operands and results take to pass through the memory once, if nothing of them is in its cache. (XLA
has estimates of its own, with --xla_gpu_collect_cost_model_stats: of kernels that are plain loops
and sums they come to 6% more, of products and Triton's kernels they are hours.)
"""

import math
import re
from collections import Counter
from typing import NamedTuple

BYTES = {
    **{"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2},
    **{"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8},
}
_ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]")
# %name = shapes opcode(%operand, ...), attributes
_LINE = re.compile(r"^ +(?:ROOT )?%(\S+) = (.+?) ([a-z][a-z0-9-]*)\(([^)]*)\)(.*)")
_PART = re.compile(r"(?:ENTRY )?%(\S+) \(.*\{$")
_INSIDE_KERNELS = re.compile(r" fusion\(.* calls=%([\w.-]+)|to_apply=%([\w.-]+)")
# What is no kernel; collectives are counted by what they exchange.
_NO_KERNEL = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|partition-id|replica-id|after-all|while|"
    r"conditional|call|all-.*|reduce-scatter.*|collective-.*|.*-start|.*-done"
)
_COPIES = {"parameter", "bitcast", "reshape", "copy", "transpose"}
_SUMMED_OVER = re.compile(r'lhs_contracting_dim\w+"?[=:] ?[\[{]([^\]}]*)')
_PAIRS = re.compile(r'"intermediate_tensor_shape":.*?"dimensions": ?\[([^\]]*)\]')  # B, H, L, L


class Array(NamedTuple):
    dtype: str
    shape: list[int]

    @property
    def bytes(self) -> int:
        return BYTES[self.dtype] * math.prod(self.shape)


class Instruction(NamedTuple):
    results: list[Array]
    opcode: str
    operands: list[str]
    attributes: str


def arrays(text: str) -> list[Array]:
    """The arrays in the text of a shape, `(f32[8,4]{1,0}, u8[0]{0})`."""
    return [Array(dtype, _numbers(shape)) for dtype, shape in _ARRAY.findall(text)]


def least_seconds(program: str, flops: float, bandwidth: float) -> Counter[str]:
    """Seconds by kind; loops are counted once, collectives not at all.

    Args:
        flops: a second at the peak, of products in bf16.
        bandwidth: bytes a second of the memory.
    """
    parts = _read(program)
    inside = {name for names in _INSIDE_KERNELS.findall(program) for name in names}
    seconds = Counter()
    for name, part in parts.items():
        for one in part.values():
            if name in inside or _NO_KERNEL.fullmatch(one.opcode):
                continue
            fused = re.search(r" calls=%([\w.-]+)", one.attributes)
            within = parts[fused[1]] if fused else part
            steps = [*within.values()] if fused else [one]
            products = sum(_operations(step, within) for step in steps) / flops
            arguments = [x for operand in one.operands for x in part[operand].results]
            moved = sum(array.bytes for array in [*one.results, *arguments])
            kind = _kind(one, {step.opcode for step in steps}, products > 0)
            seconds[kind] += max(products, moved / bandwidth)
    return seconds


def _read(program: str) -> dict[str, dict[str, Instruction]]:
    """The instructions of each computation by their names."""
    parts, part = {}, {}
    for line in program.splitlines():
        if match := _PART.match(line):
            part = parts[match[1]] = {}
        elif match := _LINE.match(line):
            name, results, opcode, operands, attributes = match.groups()
            operands = re.findall(r"%([\w.-]+)", operands)
            part[name] = Instruction(arrays(results), opcode, operands, attributes)
    return parts


def _operations(one: Instruction, part: dict[str, Instruction]) -> float:
    """Of a matrix product, cuBLAS's and cuDNN's too, as many as take as long in bf16; else 0."""
    if "__cudnn$fmha" in one.attributes:
        pairs = math.prod(_numbers(_PAIRS.search(one.attributes)[1]))
        products = 5 if "Backward" in one.attributes else 2
        seen = 0.5 if "CAUSAL" in one.attributes else 1.0
        return 2 * products * seen * pairs * part[one.operands[0]].results[0].shape[-1]
    if one.opcode != "dot" and "__cublas" not in one.attributes:
        return 0.0
    left = part[one.operands[0]].results[0]
    axes = _numbers(_SUMMED_OVER.search(one.attributes)[1])
    operations = 2.0 * math.prod(left.shape[i] for i in axes) * math.prod(one.results[0].shape)
    if left.dtype != "f32":
        return operations
    # The matrix units are half as fast in TF32; what has to be exact in fp32 goes without them, at
    # 67 of 989 TFLOP/s.
    return operations / (0.068 if "highest" in one.attributes.lower() else 0.5)


def _kind(one: Instruction, opcodes: set[str], product: bool) -> str:
    name = re.search(r'op_name="([^"]*)"', one.attributes)
    if name and "attention" in name[1]:
        return "attention"
    if product:
        return "products"
    if opcodes <= _COPIES:
        return "copies"
    return "reductions" if "reduce" in opcodes else "the rest"


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
