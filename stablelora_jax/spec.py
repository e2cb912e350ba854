"""What a user says about adapters: one frozen dataclass, in PEFT's words."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stablelora_jax import tree
from stablelora_jax.errors import InputError

HEADS = ("lm_head", "head", "classifier", "score", "embed_out", "logits", "unembed")  # never part of "all-linear"

SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal numbers of float32


def _help(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class LoraSpec:
    """Which modules are adapted and how: static, hashable, comparable, serialisable. Words and meanings are PEFT's.

    Raises:
      InputError: a value out of range or of the wrong kind.
    """

    rank: int = _help(8, "rank r of A (in, r) and B (r, out)")
    alpha: float = _help(16, "numerator of the scale")
    target: str | tuple[str, ...] = _help(
        ("q_proj", "v_proj"), "list of module-name endings, one regular expression, or all-linear (never the head)"
    )
    scaling: Literal["lora", "rslora"] = _help("lora", "lora: alpha/r; rslora: alpha/sqrt(r)")
    dropout: float = _help(0.0, "dropout rate on the input of the low-rank path, during training only")
    exclude: str | tuple[str, ...] = _help((), "modules left out, written as target is")
    layers: tuple[int, ...] | None = _help(None, "numbers of the layers to adapt; null for all")
    rank_pattern: Mapping[str, int] = _help((), "rank for modules whose name ends in a pattern; first match wins")
    alpha_pattern: Mapping[str, float] = _help((), "alpha likewise")
    stacked: tuple[str, ...] = _help(("layers",), "modules whose parameters have a leading layer axis (nn.scan)")
    in_axes: Mapping[str, tuple[int, ...]] = _help(
        (), "kernel axes that a module contracts, stack axes not counted, where its bias does not tell"
    )
    modules_to_save: tuple[str, ...] = _help((), "endings of modules that are trained in full beside the adapters")
    bias: Literal["none", "all", "lora_only"] = _help("none", "biases trained: none, all, those of adapted modules")
    lora_bias: bool = _help(False, "a bias on the low-rank path, s (x A B + b), beside each pair; not with dora")
    parametrization: Literal["lora", "dora"] = _help("lora", "how the pair changes a kernel")
    init: Literal["kaiming"] = _help("kaiming", "how a pair starts; kaiming is PEFT's default")

    def __post_init__(self) -> None:
        """Check every field and bring lists and maps into their canonical, hashable form."""
        for name in ("target", "exclude", "stacked", "modules_to_save"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern", "in_axes"):
            object.__setattr__(self, name, _canonical(name, getattr(self, name)))
        if isinstance(self.target, str) and self.target.lower() == "all-linear":
            object.__setattr__(self, "target", "all-linear")
        for name in ("stacked", "modules_to_save"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        if self.layers is not None:
            layers = self.layers if isinstance(self.layers, tuple | list | set | range) else (self.layers,)
            if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
                raise InputError(f"layers must be whole numbers, not {self.layers!r}")
            object.__setattr__(self, "layers", tuple(sorted(set(layers))))
        self._check()

    def _check(self) -> None:
        for key, rank in (("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in items(self.rank_pattern))):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise InputError(f"{key} must be a whole number of at least 1, not {rank!r}")
            if rank >= 2**63:
                raise InputError(f"{key} must be below 2**63, not {rank!r:.40}")
        alphas = ((f"alpha_pattern[{k!r}]", v) for k, v in items(self.alpha_pattern))
        for key, alpha in (("alpha", self.alpha), *alphas):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= sys.float_info.max:
                raise InputError(f"{key} must be a positive number, not {alpha!r}")
        self._check_scales()
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), not {self.dropout!r}")
        if not self.target:
            raise InputError("target is empty: name modules, give a regular expression or say all-linear")
        if not isinstance(self.lora_bias, bool) or (self.lora_bias and self.parametrization != "lora"):
            raise InputError(f"lora_bias must be true or false, and true only with lora, not {self.lora_bias!r}")
        for name, kind in get_type_hints(type(self)).items():
            allowed = get_args(kind) if get_origin(kind) is Literal else (getattr(self, name),)
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")

    def _check_scales(self) -> None:
        """Adapters are float32: a scale beyond its range makes every step infinite, or every one nothing."""
        ranks = (self.rank, *(rank for _, rank in items(self.rank_pattern)))
        alphas = (self.alpha, *(alpha for _, alpha in items(self.alpha_pattern)))
        for alpha, rank in ((min(alphas), max(ranks)), (max(alphas), min(ranks))):
            scale = alpha / (rank if self.scaling == "lora" else math.sqrt(rank))
            if not SMALLEST <= scale <= LARGEST:
                raise InputError(f"alpha {alpha!r} with rank {rank} is a scale of {scale:.3g}, beyond float32's range")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, maps and numbers; ``LoraSpec(**spec.to_dict()) == spec``."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("rank_pattern", "alpha_pattern", "in_axes"):
            plain[name] = {key: list(v) if isinstance(v, tuple) else v for key, v in plain[name]}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    def selects(self, name: str) -> bool:
        """Whether the module called ``name`` is adapted; what is trained in full is not."""
        if self.saves(name):
            return False
        if self.exclude and tree.matches(self.exclude, name):
            return False
        if self.target == "all-linear":
            chosen = name.rsplit(".", 1)[-1] not in HEADS
        else:
            chosen = tree.matches(self.target, name)
        return chosen and (self.layers is None or tree.layer_number(name, self.stacked) in self.layers)

    def saves(self, name: str) -> bool:
        """Whether the module called ``name``, or one that it lies in, is trained in full by ``modules_to_save``."""
        parts = name.split(".")
        return bool(self.modules_to_save) and any(
            tree.matches(self.modules_to_save, ".".join(parts[: i + 1])) for i in range(len(parts))
        )

    def rank_of(self, name: str) -> int:
        """The rank of the module called ``name``: the first key of ``rank_pattern`` that matches, else ``rank``."""
        return next((rank for key, rank in items(self.rank_pattern) if tree.pattern_matches(key, name)), self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of the module called ``name``, by ``alpha_pattern`` and ``alpha``."""
        return next((alpha for key, alpha in items(self.alpha_pattern) if tree.pattern_matches(key, name)), self.alpha)

    def scale_of(self, name: str) -> float:
        """The scale s of the module called ``name``."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (rank if self.scaling == "lora" else math.sqrt(rank))


def items(patterns: Any) -> tuple[tuple[str, Any], ...]:
    """The ``(pattern, value)`` pairs of a spec's pattern map, in the order in which they are tried."""
    return patterns


def _names(field_name: str, value: Any) -> str | tuple[str, ...]:
    """A string as it is; a list of strings as a tuple, sorted and without repeats but for ``stacked``; None as ()."""
    if isinstance(value, str):
        return value
    names = () if value is None else value
    if not isinstance(names, tuple | list | set | frozenset) or not all(isinstance(n, str) for n in names):
        raise InputError(f"{field_name} must be a string or a list of strings, not {value!r}")
    return tuple(names) if field_name == "stacked" else tuple(sorted(set(names)))


def _canonical(field_name: str, patterns: Any) -> tuple[tuple[str, Any], ...]:
    """Pattern maps as tuples; sorted where the order cannot matter, since the first match wins where it can."""
    given = tuple(patterns.items()) if isinstance(patterns, Mapping) else () if patterns is None else patterns
    if not isinstance(given, tuple | list) or not all(isinstance(p, tuple | list) and len(p) == 2 for p in given):
        raise InputError(f"{field_name} must map patterns to values, not {patterns!r}")
    pairs = tuple((str(k), tuple(v) if isinstance(v, list) else v) for k, v in given)
    if field_name == "in_axes" and not all(isinstance(axes, tuple) for _, axes in pairs):
        raise InputError(f"in_axes must map patterns to lists of axes, such as {{'out': (0, 1)}}, not {patterns!r}")
    return (
        pairs if any(_overlap(p, q) for i, (p, _) in enumerate(pairs) for q, _ in pairs[:i]) else tuple(sorted(pairs))
    )


def _overlap(p: str, q: str) -> bool:
    """Whether two patterns may match the same name: literal endings are compared, other expressions assumed to."""
    literal = all(c.isalnum() or c in "_." for c in p + q)
    return not literal or all(a == b or "." in (a, b) for a, b in zip(reversed(p), reversed(q), strict=False))
