"""The calibration of a run whose adapters start from data: on the first batches of its training data.

The batches and their order are those of training, which the seed decides; each is computed in the run's micro-batches
over its devices, so that the result depends, up to rounding, on neither. The sums are on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stablelora_jax.config.run import RunConfig
from stablelora_jax.data import Batch, Loader, batch_of_step
from stablelora_jax.lora.apply import Adapted
from stablelora_jax.lora.calibration import Targets, finished, measured, quantization_residual
from stablelora_jax.lora.initializers import CALIBRATED
from stablelora_jax.lora.leaves import reads_more
from stablelora_jax.lora.probes import total
from stablelora_jax.lora.target_modules import find_target_modules
from stablelora_jax.models.decoder import head_path
from stablelora_jax.models.pretrained.load import load_pretrained
from stablelora_jax.models.untie import untie
from stablelora_jax.parallel import Layout, to_host
from stablelora_jax.runs.build import make_objective, make_schedule
from stablelora_jax.training.step import micro_batches, summed_over
from stablelora_jax.utils.tree import get_in


def make_calibration(
    config: RunConfig,
    name: str,
    layout: Layout,
    model: Adapted,
    params: Any,
    loader: Loader,
    log_fn: Callable[[str], None],
) -> dict[str, Any] | None:
    """What the initialisation of ``config.lora`` starts from; None where that is no data.

    Args:
      config: of the run.
      name: of the base, which LoftQ reads once more, as it was before it was quantised.
      layout: of the run.
      model: the adapted decoder as it trains.
      params: of the base, placed by the layout.
      loader: of the training data.
      log_fn: takes lines of text.

    Raises:
      InputError: what the batches give is not finite, or a kernel that LoftQ is to correct is not quantised.
    """
    kind = CALIBRATED.get(config.lora.init)
    if kind is None:
        return None
    if kind == "residual":
        log_fn(f"init {config.lora.init}: reading {name} as it was before it was quantised")
        return quantization_residual(_full(config, name, layout), params, config.lora)
    targets = find_target_modules(params, config.lora)
    targets = {path: target for path, target in targets.items() if reads_more(target, config.lora)}
    log_fn(f"init {config.lora.init}: measuring on {config.calibration_batches} batches")
    measure = layout.compile(_measure(config, layout, model, targets), ("base", "rows"))
    sums: Any = None
    for step in range(config.calibration_batches):
        batch = layout.place_rows(partial(batch_of_step, loader, step), config.batch_size)
        found = layout.fetch(measure(params, batch))
        sums = found if sums is None else jax.tree.map(np.add, sums, found)
    return to_host(finished(sums, config.calibration_batches, targets, config.lora, _first_rate(config)))


def _measure(
    config: RunConfig, layout: Layout, model: Adapted, targets: Targets
) -> Callable[[Any, Batch], dict[Any, jax.Array]]:
    parts, objective = layout.parts if layout.axis is None else 1, make_objective(config)

    def measure(params: Any, batch: Batch) -> dict[Any, jax.Array]:
        count = layout.sum_parts(objective.divisor(batch))

        def mean_loss(model: Adapted, variables: Mapping[str, Any], micro: Batch) -> jax.Array:
            return objective.loss(model, variables, micro, None, parts) / jnp.maximum(count, 1)

        inputs = CALIBRATED[config.lora.init] == "inputs"
        loss = _forward if inputs else mean_loss
        given: dict[str, Any] = {"targets": targets, "token_mask": lambda micro: micro.loss_mask}
        own = partial(measured, model, loss, params, **given)
        micros = jax.tree.map(lambda x: micro_batches(x, parts, config.gradient_accumulation_steps), (batch,))
        return layout.sum_parts(summed_over(own, micros))

    return measure


def _forward(model: Adapted, variables: Mapping[str, Any], batch: Batch) -> jax.Array:
    """A scalar to which every module's output leads; logits are computed for an adapted head alone."""
    method = None if get_in(variables["lora"], head_path(model.model.config)) else "hidden"
    return total(model.apply(variables, batch.tokens, batch.positions, batch.segment_ids, method=method))


def _first_rate(config: RunConfig) -> float:
    """The first learning rate that is not zero."""
    schedule = make_schedule(config)
    return next((rate for rate in (float(schedule(step)) for step in range(config.steps)) if rate), 0.0)


def _full(config: RunConfig, name: str, layout: Layout) -> Any:
    model, params = load_pretrained(name, dtype=jnp.float32, sharding=layout.base_sharding)
    return untie(model, params)[1] if config.model.untie else params
