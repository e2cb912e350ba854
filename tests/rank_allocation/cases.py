"""Adapters that rank allocations are tested on, and what they compute, in float64."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax import LoraSpec, init_adapters
from stablelora_jax.lora.leaves import adapter_target_modules
from stablelora_jax.utils import tree
from tests.helpers import trained

R = 4
TARGETS = {"target_modules": ["proj", "head"], "rank": R, "alpha": 6.0}
SPECS = {
    "plain": LoraSpec(**TARGETS),
    "padded": LoraSpec(**TARGETS, scaling="rslora", rank_pattern={"layers.1.proj": 1, "head": 3}),
    "no_scale": LoraSpec(**TARGETS, scaling="none"),
    "dora": LoraSpec(**TARGETS, parametrization="dora"),
    "adalora": LoraSpec(**TARGETS, parametrization="adalora", init="init_ab"),
    "pissa": LoraSpec(**TARGETS, init="pissa"),
}


def base():
    """A stack of three kernels and a kernel alone."""
    rng = np.random.default_rng(0)
    kernel = lambda *shape: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    return {"net": {"layers": {"proj": kernel(3, 6, 5)}, "head": kernel(5, 7)}}


@cache
def moved(spec):
    """Adapters of ``spec`` for :func:`base` as if trained; e of AdaLoRA, too."""
    adapters = trained(init_adapters(jax.random.key(0), base(), spec), spec)
    rng = np.random.default_rng(5)
    draw = lambda at, leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) if at[-1].key == "lora_e" else leaf
    return jax.tree_util.tree_map_with_path(draw, adapters)


def changes(adapters, spec, rank=None):
    """``s (A diag(e) B - A0 B0)`` of the first ``rank`` ranks by module name, float64, written down anew."""
    rules = {"lora": lambda a, k: a / k, "rslora": lambda a, k: a / k**0.5, "none": lambda a, k: 1.0}
    rule, found = rules[spec.scaling], {}
    for path, target in adapter_target_modules(adapters, spec).items():
        node = {name: np.asarray(leaf, np.float64) for name, leaf in tree.get_in(adapters, path).items()}
        for index, name, own in zip(np.ndindex(*target.stack), target.names, target.ranks, strict=True):
            if not own:
                continue
            k = min(own, rank or own)
            one = {leaf: value[index] for leaf, value in node.items()}
            e = one.get("lora_e", np.ones(target.rank))
            change = (one["lora_a"] * e)[:, :k] @ one["lora_b"][:k]
            if "frozen_a" in one:
                change = change - one["frozen_a"][:, :k] @ one["frozen_b"][:k]
            found[name] = rule(spec.alpha_of(name), k) * change
    return found
