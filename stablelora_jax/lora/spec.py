"""What a user says about adapters: one frozen dataclass, in PEFT's words."""

from __future__ import annotations

import bisect
import itertools
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stablelora_jax.lora.initializers import INITIALIZERS, ONE_IS_ZERO
from stablelora_jax.lora.names import first_match, layer_number, lists_one, matches
from stablelora_jax.lora.parametrizations import PARAMETRIZATIONS
from stablelora_jax.utils import patterns
from stablelora_jax.utils.errors import InputError

# never part of "all-linear"
HEADS = ("lm_head", "head", "classifier", "score", "embed_out", "logits", "logits_dense", "unembed")

SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal numbers of float32

ONLY_FOR = {  # initialisations that mean something for a few parametrisations
    "lora_ga": (
        ("lora", "dora", "slora"),
        "a matrix between its A and B, which have no gradient in common, stays zero",
    ),
    "nystrom": (("slora", "inttune"), "it starts the matrix N between two factors"),
    "lora_sb": (("lora_xs",), "it makes the matrix R between two frozen factors"),
    "loftq": (("lora", "dora"), "what corrects the quantised base is A B itself"),
}
MOST_LAYERS = 2**20
MOST_LETTERS = 2**24  # that are compared to see whether the order of patterns matters


def _help(default: Any, text: str, was: str | None = None, peft: str | None = None) -> Any:
    """A field with its meaning, the key that it was in older configurations, and PEFT's name if that is another."""
    return field(default=default, metadata={"help": text, "was": was, "peft": peft})


@dataclass(frozen=True)
class LoraSpec:
    """Which modules are adapted and how: static, hashable, comparable, serialisable. Words and meanings are PEFT's.

    Raises:
      InputError: a value out of range or of the wrong kind.
    """

    rank: int = _help(8, "rank r of A (in, r) and B (r, out)", peft="r")
    alpha: float = _help(16, "numerator of the scale", peft="lora_alpha")
    target_modules: str | tuple[str, ...] = _help(
        ("q_proj", "v_proj"),
        "list of module-name endings, one regular expression, or all-linear (never the head)",
        was="target",
    )
    scaling: Literal["lora", "rslora", "rora", "none"] = _help(
        "lora", "lora: alpha/r; rslora, which RoRA repeats as rora: alpha/sqrt(r); none: 1", peft="use_rslora"
    )
    dropout: float = _help(
        0.0, "dropout rate on the input of the low-rank path, during training only", peft="lora_dropout"
    )
    exclude_modules: str | tuple[str, ...] = _help((), "modules left out, written as target_modules is", was="exclude")
    layers_to_transform: tuple[int, ...] | None = _help(None, "numbers of the layers to adapt; null: all", was="layers")
    rank_pattern: Mapping[str, int] = _help((), "rank for modules whose name ends in a pattern; first match wins")
    alpha_pattern: Mapping[str, float] = _help((), "alpha likewise")
    stacked: tuple[str, ...] = _help(("layers",), "modules whose parameters have a leading layer axis (nn.scan)")
    in_axes: Mapping[str, tuple[int, ...]] = _help(
        (), "kernel axes that a module contracts, stack axes not counted, where its bias does not tell"
    )
    modules_to_save: tuple[str, ...] = _help((), "endings of modules that are trained in full beside the adapters")
    bias: Literal["none", "all", "lora_only"] = _help("none", "biases trained: none, all, those of adapted modules")
    lora_bias: bool = _help(False, "a bias on the low-rank path, s (x A B + b), beside each pair; with lora alone")
    parametrization: Literal[tuple(PARAMETRIZATIONS)] = _help(  # type: ignore[valid-type]
        "lora", "how an adapter changes a kernel", peft="use_dora"
    )
    options: Mapping[str, int | float] = _help(
        (), "arguments of the parametrization by name, where it takes any: {topk: 4}"
    )
    init: Literal[tuple(INITIALIZERS)] = _help(  # type: ignore[valid-type]
        "kaiming", "how a pair starts; kaiming is PEFT's default", peft="init_lora_weights"
    )

    def __new__(cls, *_: Any, **given: Any) -> LoraSpec:
        """Refuse the names that fields had before they were PEFT's."""
        for f in fields(cls):
            if f.metadata["was"] in given:
                raise InputError(f"LoraSpec: {f.metadata['was']} is now called {f.name}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every field and bring lists and maps into their canonical, hashable form."""
        for name in ("target_modules", "exclude_modules", "stacked", "modules_to_save"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern", "in_axes", "options"):
            object.__setattr__(self, name, _canonical(name, getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern", "in_axes"):
            patterns.table(tuple(key for key, _ in getattr(self, name)))
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                patterns.whole(getattr(self, name))
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            object.__setattr__(self, "target_modules", "all-linear")
        for name in ("stacked", "modules_to_save"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        if self.layers_to_transform is not None:
            layers = (
                self.layers_to_transform
                if isinstance(self.layers_to_transform, tuple | list | set | range)
                else (self.layers_to_transform,)
            )
            if isinstance(layers, range) and layers[MOST_LAYERS:]:
                raise InputError(
                    f"layers_to_transform must be at most {MOST_LAYERS} numbers, not {self.layers_to_transform!r}"
                )
            if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
                raise InputError(f"layers_to_transform must be whole numbers, not {shown(self.layers_to_transform)}")
            object.__setattr__(self, "layers_to_transform", tuple(sorted(set(layers))))
        self._check()

    def _check(self) -> None:
        for key, rank in (("rank", self.rank), *((f"rank_pattern[{k!r:.80}]", v) for k, v in items(self.rank_pattern))):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise InputError(f"{key} must be a whole number of at least 1, not {shown(rank)}")
            if rank >= 2**63:
                raise InputError(f"{key} must be below 2**63, not {shown(rank)}")
        alphas = ((f"alpha_pattern[{k!r:.80}]", v) for k, v in items(self.alpha_pattern))
        for key, alpha in (("alpha", self.alpha), *alphas):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= sys.float_info.max:
                raise InputError(f"{key} must be a positive number, not {shown(alpha)}")
        self._check_scales()
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), not {shown(self.dropout)}")
        if not self.target_modules:
            raise InputError("target_modules is empty: name modules, give a regular expression or say all-linear")
        if not isinstance(self.lora_bias, bool) or (self.lora_bias and self.parametrization != "lora"):
            raise InputError(f"lora_bias must be true or false, and true only with lora, not {shown(self.lora_bias)}")
        for name, kind in get_type_hints(type(self)).items():
            allowed = get_args(kind) if get_origin(kind) is Literal else (getattr(self, name),)
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, not {shown(getattr(self, name))}")
        self._check_axes()

    def _check_axes(self) -> None:
        """Refuse what has no meaning for the parametrisation."""
        member = PARAMETRIZATIONS[self.parametrization]
        defaults = getattr(member, "OPTIONS", {})
        for name, value in items(self.options):
            if name not in defaults:
                known = f"it takes {', '.join(defaults)}" if defaults else "it takes none"
                raise InputError(f"parametrization {self.parametrization!r} has no option {name!r:.80}: {known}")
            if isinstance(value, bool) or not isinstance(value, int | type(defaults[name])) or not value > 0:
                raise InputError(f"options: {name} must be a positive {_kind(defaults[name])}, not {shown(value)}")
        if member.pair is None and self.dropout:
            raise InputError(
                f"parametrization {self.parametrization!r} changes the kernel itself: dropout, on the input of a "
                "low-rank path, has no meaning for it: leave it out"
            )
        what, pair = f"parametrization {self.parametrization!r}", PARAMETRIZATIONS[self.parametrization].PAIR
        if pair == "none" and self.init != "kaiming":
            raise InputError(f"{what} makes its own factors: init={self.init!r} has no meaning for it, leave init out")
        if (pair == "frozen" or self.parametrization == "adalora") and self.init in ONE_IS_ZERO:
            raise InputError(
                f"{what} needs both factors, of which init={self.init!r} leaves one at zero, so that nothing would "
                "ever learn: say init: svd, which is LoRA-XS's, init_ab, orthogonal, pissa, milora or olora"
            )
        if (self.parametrization, self.init) == ("slora", "orthogonal"):
            raise InputError(f"{what} puts a matrix between A and B: init='orthogonal', with A B = 0, is not the base")
        takes, why = ONLY_FOR.get(self.init, ((self.parametrization,), ""))
        if self.parametrization not in takes:
            raise InputError(
                f"init={self.init!r} is for parametrization {' or '.join(takes)}, not {self.parametrization}: {why}"
            )

    def _check_scales(self) -> None:
        """Adapters are float32: a scale beyond its range makes every step infinite, or every one nothing."""
        ranks = (self.rank, *(rank for _, rank in items(self.rank_pattern)))
        alphas = (self.alpha, *(alpha for _, alpha in items(self.alpha_pattern)))
        for alpha, rank in ((min(alphas), max(ranks)), (max(alphas), min(ranks))):
            scale = self._scale(alpha, rank)
            if not SMALLEST <= scale <= LARGEST:
                raise InputError(f"alpha {alpha!r} with rank {rank} is a scale of {scale:.3g}, beyond float32's range")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, maps and numbers; ``LoraSpec(**spec.to_dict()) == spec``."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("rank_pattern", "alpha_pattern", "in_axes", "options"):
            plain[name] = {key: list(v) if isinstance(v, tuple) else v for key, v in plain[name]}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any] | str | os.PathLike[str]) -> LoraSpec:
        """The spec with the meaning of a PEFT ``LoraConfig``; ``docs/coming-from-peft.md`` has every field.

        No model is needed, so names are taken as they are; :func:`stablelora_jax.load_peft` resolves those of an
        adapter against its base. Entries of ``modules_to_save`` end at a dot here, and at any letter in PEFT.

        Args:
          config: ``LoraConfig(...).to_dict()``, a parsed ``adapter_config.json``, keyword arguments of ``LoraConfig``,
            or a directory with an ``adapter_config.json``. An absent key has the default of PEFT 0.21.

        Raises:
          InputError: one line that names the key: unknown, a feature that a spec does not have, or a bad value.

        Example::

            >>> spec = LoraSpec.from_peft({"r": 4, "target_modules": ["q_proj"], "use_dora": True})
            >>> spec.rank, spec.alpha, spec.parametrization
            (4, 8, 'dora')
        """
        from stablelora_jax.lora.peft_config import from_peft  # which imports this module

        return from_peft(config)

    @property
    def arguments(self) -> dict[str, Any]:
        """Every argument of the parametrization, by name: those of ``options``, else its defaults."""
        return {**getattr(PARAMETRIZATIONS[self.parametrization], "OPTIONS", {}), **dict(items(self.options))}

    def selects(self, name: str) -> bool:
        """Whether the module called ``name`` is adapted; what is trained in full is not."""
        if self.saves(name):
            return False
        if self.exclude_modules and matches(self.exclude_modules, name):
            return False
        if self.target_modules == "all-linear":
            chosen = name.rsplit(".", 1)[-1] not in HEADS
        else:
            chosen = matches(self.target_modules, name)
        return chosen and (self.layers_to_transform is None or self._has_layer(layer_number(name, self.stacked)))

    def _has_layer(self, number: int | None) -> bool:
        layers = self.layers_to_transform or ()  # sorted
        at = len(layers) if number is None else bisect.bisect_left(layers, number)
        return at < len(layers) and layers[at] == number

    def saves(self, name: str) -> bool:
        """Whether the module called ``name``, or one that it lies in, is trained in full by ``modules_to_save``."""
        parts = name.split(".")
        above = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return bool(self.modules_to_save) and lists_one(self.modules_to_save, above)

    def rank_of(self, name: str) -> int:
        """The rank of the module called ``name``: the first key of ``rank_pattern`` that matches, else ``rank``."""
        found: int = first_match(items(self.rank_pattern), name, self.rank)
        return found

    def alpha_of(self, name: str) -> float:
        """The alpha of the module called ``name``, by ``alpha_pattern`` and ``alpha``."""
        found: float = first_match(items(self.alpha_pattern), name, self.alpha)
        return found

    def scale_of(self, name: str) -> float:
        """The scale s of the module called ``name``."""
        return self._scale(self.alpha_of(name), self.rank_of(name))

    def _scale(self, alpha: float, rank: int) -> float:
        if self.scaling == "none":
            return 1.0
        return alpha / (rank if self.scaling == "lora" else math.sqrt(rank))


def _kind(default: Any) -> str:
    return "whole number" if isinstance(default, int) else "number"


def items(table: Any) -> tuple[tuple[str, Any], ...]:
    """The ``(pattern, value)`` pairs of a spec's pattern map, in the order in which they are tried."""
    found: tuple[tuple[str, Any], ...] = table
    return found


def _names(field_name: str, value: Any) -> str | tuple[str, ...]:
    """A string as it is; a list of strings as a tuple, sorted and without repeats but for ``stacked``; None as ()."""
    if isinstance(value, str):
        return value
    names = () if value is None else value
    if not isinstance(names, tuple | list | set | frozenset) or not all(isinstance(n, str) for n in names):
        raise InputError(f"{field_name} must be a string or a list of strings, not {shown(value)}")
    return tuple(names) if field_name == "stacked" else tuple(sorted(set(names)))


def _canonical(field_name: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """Pattern maps as tuples; sorted where the order cannot matter, since the first match wins where it can."""
    given = tuple(value.items()) if isinstance(value, Mapping) else () if value is None else value
    if not isinstance(given, tuple | list) or not all(isinstance(p, tuple | list) and len(p) == 2 for p in given):
        raise InputError(f"{field_name} must map patterns to values, not {shown(given)}")
    pairs = tuple((str(k), tuple(v) if isinstance(v, list) else v) for k, v in given)
    if field_name == "in_axes" and not all(isinstance(axes, tuple) for _, axes in pairs):
        raise InputError(f"in_axes must map patterns to lists of axes, such as {{'out': (0, 1)}}, not {shown(given)}")
    return pairs if _overlap([pattern for pattern, _ in pairs]) else tuple(sorted(pairs))


def _overlap(keys: Sequence[str]) -> bool:
    """Whether two patterns may match the same name: literal endings are compared, other expressions assumed to.

    Of very many it is assumed too.
    """
    if len(keys) < 2:
        return False
    if not all(c.isalnum() or c in "_." for pattern in keys for c in pattern):
        return True
    return len(keys) * sum(map(len, keys)) > MOST_LETTERS or any(
        all(a == b or "." in (a, b) for a, b in zip(reversed(p), reversed(q), strict=False))
        for p, q in itertools.combinations(keys, 2)
    )


def shown(value: Any) -> str:
    """``repr(value)``, at most 80 characters of it."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # a number of more digits than Python writes
        return "a number of very many digits"
