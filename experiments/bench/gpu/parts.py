"""To which part of a training step a kernel belongs: by the operation of the model it comes from, else by its name.

The model's operations carry scopes in their names (``lora``, ``loss``, ``update``, ``attention``). A fusion counts
where its product lies, else where its last operation lies: what else was fused into it counts there, too.
"""

from __future__ import annotations

import re
from collections import Counter

PARTS = ("base products", "attention", "low-rank path", "elementwise", "head and loss", "optimizer", "copies", "other")
SCOPES = {"update": "optimizer", "lora": "low-rank path", "loss": "head and loss", "attention": "attention"}  # in order
PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
MOVES = ("dynamic_slice", "dynamic_update_slice", "transpose", "convert_element_type", "copy", "slice", "reshape")
MOVES += ("broadcast_in_dim", "squeeze", "psum", "all_gather", "reduce_scatter")
SILENT = ("", "closed_call", "eval_jaxpr", "while", "body", "cond", "checkpoint", "rematted_computation", "shard_map")
ALWAYS_COPIES = re.compile(r"^(memcpy|memset|nccl)", re.I)
GEMM = re.compile(r"gemm|nvjet|cutlass|xmma|cublas|split_?k|\bdot\b|_dot_", re.I)
NAMES = {
    "attention": re.compile(r"fmha|flash|sdpa|mha_|attention", re.I),
    "base products": GEMM,
    "elementwise": re.compile(r"softmax|reduce|add|subtract|multiply|divide|rsqrt|exponential|cosine|logistic", re.I),
    "copies": re.compile(r"copy|transpose|dynamic.?(update.?)?slice|convert|bitcast|broadcast|concatenate", re.I),
}
CONTAINER = re.compile(r"^(while|call|conditional|command_buffer)[._\d]*$")  # what they hold has events of its own
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")  # name, shape, opcode, the rest
AROUND = ("while", "call", "conditional", "parameter", "constant", "tuple", "get-tuple-element")
HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+)\s.*\{$")
OP_NAME = re.compile(r'op_name="([^"]*)"')


def op_names_of(text: str) -> dict[str, str]:
    """The model's operation of each instruction of a compiled program, from its HLO text."""
    own: dict[str, str] = {}
    calls: dict[str, str] = {}
    inside: dict[str, list[tuple[str, str]]] = {}  # opcode and operation, without scalars: those count indices
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
    """The product in a fusion; else its own operation or, where that only moves what it gives, the most frequent."""
    products = [op for opcode, op in inside if opcode in ("dot", "convolution", "custom-call")]
    if products or _tells(own):
        return next(iter(products), own)
    counted = Counter(op for _, op in inside if _tells(op)).most_common(1)
    return counted[0][0] if counted else own or next((op for _, op in inside), "")


def _tells(op: str) -> bool:
    """Whether an operation says what is computed."""
    return op.rsplit("/", 1)[-1] not in MOVES + SILENT


def operation(name: str, hlo_op: str, op_names: dict[str, str], by_kernel: dict[str, str]) -> str:
    """The model's operation a kernel comes from; "" where nothing tells it.

    Args:
      name: of the kernel.
      hlo_op: the instruction; of several with ``::`` between the innermost counts. Or the operation itself.
      op_names: the operations by instruction.
      by_kernel: the same by :func:`kernel_name` of the instruction, as XLA calls the kernels that it writes itself.
    """
    innermost = hlo_op.rsplit("::", 1)[-1].lstrip("%")
    return op_names.get(innermost) or (innermost if "/" in innermost else by_kernel.get(kernel_name(name), ""))


def kernel_name(instruction: str) -> str:
    """What XLA makes of an instruction's name for its kernel: a C identifier."""
    return re.sub(r"\W", "_", instruction)


def part_of(name: str, op: str) -> str:
    """One of ``PARTS`` for a kernel ``name`` of the model's operation ``op``, which may be ""."""
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
    if last not in SILENT and any(word.startswith("Decoder") for word in words):
        return "elementwise"
    return next((part for part, pattern in NAMES.items() if pattern.search(name)), "other")
