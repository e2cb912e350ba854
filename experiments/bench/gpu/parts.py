"""Assigns kernels to parts of the training step: by the model operation that a kernel comes from, else by its name.

The names of operations contain scopes (``lora``, ``loss``, ``update``, ``attention``). A fusion is assigned by its
matmul if it has one, else by its root operation; everything fused into it is counted there.
"""

from __future__ import annotations

import re
from collections import Counter

PARTS = ("base products", "attention", "low-rank path", "elementwise", "head and loss", "optimizer", "copies", "other")
SCOPES = {"update": "optimizer", "lora": "low-rank path", "loss": "head and loss", "attention": "attention"}  # in order
PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
MOVES = ("dynamic_slice", "dynamic_update_slice", "transpose", "convert_element_type", "copy", "slice", "reshape")
MOVES += ("broadcast_in_dim", "squeeze", "psum", "all_gather", "reduce_scatter")
UNINFORMATIVE = (
    "",
    "closed_call",
    "eval_jaxpr",
    "while",
    "body",
    "cond",
    "checkpoint",
    "rematted_computation",
    "shard_map",
)
ALWAYS_COPIES = re.compile(r"^(memcpy|memset|nccl)", re.I)
GEMM = re.compile(r"gemm|nvjet|cutlass|xmma|cublas|split_?k|\bdot\b|_dot_", re.I)
NAMES = {
    "attention": re.compile(r"fmha|flash|sdpa|mha_|attention", re.I),
    "base products": GEMM,
    "elementwise": re.compile(r"softmax|reduce|add|subtract|multiply|divide|rsqrt|exponential|cosine|logistic", re.I),
    "copies": re.compile(r"copy|transpose|dynamic.?(update.?)?slice|convert|bitcast|broadcast|concatenate", re.I),
}
CONTAINER = re.compile(r"^(while|call|conditional|command_buffer)[._\d]*$")  # their contents have events of their own
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")  # name, shape, opcode, the rest
AROUND = ("while", "call", "conditional", "parameter", "constant", "tuple", "get-tuple-element")
HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+)\s.*\{$")
OP_NAME = re.compile(r'op_name="([^"]*)"')


def op_names_of(text: str) -> dict[str, str]:
    """The model operation (``op_name``) of each instruction of a compiled program, from its HLO text."""
    own: dict[str, str] = {}
    calls: dict[str, str] = {}
    inside: dict[str, list[tuple[str, str]]] = {}  # opcode and operation; without scalars, which compute indices
    computation = ""
    for line in text.splitlines():
        if not (found := INSTRUCTION.match(line)):
            computation = header[1] if (header := HEADER.match(line)) else computation
            continue
        name, kind, opcode, rest = found.groups()
        if opcode in AROUND:
            continue
        if called := re.search(r"calls=%?([\w.-]+)", rest):
            calls[name] = called[1]
        if op := OP_NAME.search(rest):
            own[name] = op[1].split(";")[0]
            if "[]" not in kind:
                inside.setdefault(computation, []).append((opcode, own[name]))
    return own | {name: _of_fusion(own.get(name, ""), inside.get(called, [])) for name, called in calls.items()}


def _of_fusion(own: str, inside: list[tuple[str, str]]) -> str:
    """The operation of a fusion: of its matmul; else its own or, if that only moves data, the most frequent in it."""
    products = [op for opcode, op in inside if opcode in ("dot", "convolution", "custom-call")]
    if products or _is_informative(own):
        return next(iter(products), own)
    counted = Counter(op for _, op in inside if _is_informative(op)).most_common(1)
    return counted[0][0] if counted else own or next((op for _, op in inside), "")


def _is_informative(op: str) -> bool:
    """Whether the name of an operation tells what is computed."""
    return op.rsplit("/", 1)[-1] not in MOVES + UNINFORMATIVE


def operation(name: str, hlo_op: str, op_names: dict[str, str], by_kernel: dict[str, str]) -> str:
    """The model operation that a kernel comes from; "" if unknown.

    Args:
      name: the name of the kernel.
      hlo_op: the instruction (of several, joined by ``::``, the innermost is used), or the operation itself.
      op_names: operations by instruction.
      by_kernel: operations by :func:`kernel_name` of the instruction, the name that XLA gives to its own kernels.
    """
    innermost = hlo_op.rsplit("::", 1)[-1].lstrip("%")
    return op_names.get(innermost) or (innermost if "/" in innermost else by_kernel.get(kernel_name(name), ""))


def kernel_name(instruction: str) -> str:
    """The kernel name that XLA derives from an instruction's name: a C identifier."""
    return re.sub(r"\W", "_", instruction)


def part_of(name: str, op: str) -> str:
    """The entry of ``PARTS`` for a kernel ``name`` of the model operation ``op``, which may be ""."""
    if ALWAYS_COPIES.match(name):
        return "copies"
    words = set(re.findall(r"[\w.]+", op))
    for scope, part in SCOPES.items():
        if scope in words:
            return part
    last = op.rsplit("/", 1)[-1]
    if last in PRODUCTS or (op and GEMM.search(name)):
        return "base products"
    if last in MOVES:
        return "copies"
    if last not in UNINFORMATIVE and any(word.startswith("Decoder") for word in words):
        return "elementwise"
    return next((part for part, pattern in NAMES.items() if pattern.search(name)), "other")
