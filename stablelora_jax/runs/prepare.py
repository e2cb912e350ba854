"""The setup of a run: everything is loaded, checked and placed before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stablelora_jax.config.parallel import MeshConfig
from stablelora_jax.config.run import RunConfig
from stablelora_jax.data import (
    Loader,
    longest_row,
    most_segments,
)
from stablelora_jax.data.tasks import load_questions
from stablelora_jax.evaluation.loglikelihood import Rows, make_compute
from stablelora_jax.interop.export import locate_adapter
from stablelora_jax.interop.peft import require_peft_form
from stablelora_jax.interop.warm_start import start_adapters
from stablelora_jax.lora.apply import Adapted, adapted
from stablelora_jax.lora.initializers import CALIBRATED, OFF_BASE
from stablelora_jax.lora.pairs import pairs
from stablelora_jax.lora.summary import describe
from stablelora_jax.lora.to_lora import is_plain
from stablelora_jax.lora.transform import adapter_shapes, init_adapters
from stablelora_jax.models.architecture import DecoderConfig
from stablelora_jax.models.attention import best_here, require_here
from stablelora_jax.models.decoder import Decoder
from stablelora_jax.models.inputs import require_known
from stablelora_jax.models.pretrained.load import (
    base_directory,
    load_pretrained,
    require_tokenizer,
)
from stablelora_jax.models.pretrained.shapes import architecture
from stablelora_jax.models.untie import untie
from stablelora_jax.parallel import Layout, mesh_layout, pmap_layout, to_host
from stablelora_jax.rank_allocation import Allocation
from stablelora_jax.runs.build import (
    make_allocation,
    make_hyperparams,
    make_objective,
    make_schedule,
    make_training,
)
from stablelora_jax.runs.calibrate import make_calibration
from stablelora_jax.runs.directory import identity
from stablelora_jax.runs.training_data import load_training_data, with_steps
from stablelora_jax.runs.validation import ValidationSet, make_validation_set
from stablelora_jax.training.remat_policy import choose_remat
from stablelora_jax.training.step import Hyperparams, TrainState, init_state
from stablelora_jax.utils.errors import InputError
from stablelora_jax.utils.fingerprint import fingerprint

T = TypeVar("T")


class TrainingSetup(NamedTuple):
    """Everything that a run uses and never changes."""

    config: RunConfig  # with steps in place of epochs
    directory: Path
    base: str  # directory or hub id of the base model
    layout: Layout
    model: Adapted
    params: optax.Params  # of the base, placed by the layout
    loader: Loader
    data: dict[str, Any]  # statistics of the training data
    validation_set: ValidationSet
    schedule: optax.Schedule
    tx: Callable[[Hyperparams], optax.GradientTransformation]
    hyperparams: Hyperparams  # placed by the layout
    trained: Callable[[Any], Any]  # stops the gradients of frozen parts of the adapters
    allocation: Allocation  # of the ranks
    start: TrainState  # host arrays
    compute: Callable[[Any, Any, Rows], tuple[np.ndarray, np.ndarray]]  # of make_compute
    metadata: dict[str, Any]  # of every checkpoint; must match on resuming
    first_evaluation: dict[str, Any]  # at step 0, empty until it is made; jobs that begin as the base share it


@dataclass(frozen=True)
class Base:
    """The base of a run, or of several in one process, which then load and tokenise nothing twice."""

    name: str  # directory or hub id
    layout: Layout
    model: Decoder
    params: optax.Params  # placed by the layout
    fingerprint: Any
    known: dict[Any, Any] = field(default_factory=dict)  # what runs on this base share, see :meth:`once`

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """``make()``, or what it gave when it was asked for under the same ``key``."""
        if key not in self.known:
            self.known[key] = make()
        found: T = self.known[key]
        return found


def prepare(
    config: RunConfig,
    directory: Path,
    log_fn: Callable[[str], None],
    *,
    resumes: bool = False,
    base: Base | None = None,
) -> TrainingSetup:
    """Load the base and the data and make the initial state; for a run that ``resumes``, only its structure counts.

    Args:
      config: of the run.
      directory: of the run.
      log_fn: takes lines of text.
      resumes: whether the state will come from a checkpoint.
      base: as :func:`load_base` gives it for this configuration; None: it is loaded here.

    Raises:
      InputError: an input that cannot be used.
    """
    base = load_base(config) if base is None else base
    layout, model, params = base.layout, base.model, base.params
    require_groups(config, layout)
    if config.max_length > model.config.max_position_embeddings:
        most = model.config.max_position_embeddings
        raise InputError(f"max_length {config.max_length} is more than the {most} of {base.name}: lower it")
    loader = load_training_data(config, model.tokenizer, log_fn, base.once)
    require_known(loader.store.tokens, model.config.vocab_size, base.name)
    config, data = with_steps(config, loader, log_fn)
    asked = (config.task, config.data, config.max_length, config.metric, config.evaluate)
    validation_set = base.once(("validation", repr(asked)), lambda: _validation_set(config, model.tokenizer))
    for example in validation_set.examples:
        require_known(example.tokens, model.config.vocab_size, base.name)
    key = jax.random.key(config.seed)
    adapters = _adapters(config, key, base, loader, log_fn, resumes=resumes)
    allocation = make_allocation(config)
    adapters = adapters if allocation.start is None else allocation.start(adapters)
    require_peft_form(adapters, config.lora, params)
    if config.stability_every and not is_plain(adapters, config.lora):
        raise InputError("stability_every is for plain LoRA and DoRA whose start is the base's: leave it out")
    tx, trained = make_training(config, params, adapters)
    start = to_host(init_state(adapters, tx(make_hyperparams(config, adapters)), jax.random.fold_in(key, 1)))
    log_fn(describe(params, adapters, config.lora))
    if config.freeze:
        log_fn(f"frozen: {', '.join(config.freeze)}")
    length = longest_row(loader)
    model = _configured(config, base, loader, adapters)
    if (config.model.attention, config.model.remat) != ("auto", "auto"):
        _trace(model, params, length)
    adapted_model, hyperparams = adapted(model, config.lora), make_hyperparams(config, adapters)
    return TrainingSetup(
        config=config,
        directory=directory,
        base=base.name,
        layout=layout,
        model=adapted_model,
        params=params,
        loader=loader,
        data=data,
        validation_set=validation_set,
        schedule=make_schedule(config),
        tx=tx,
        hyperparams=layout.place_base(hyperparams),
        trained=trained,
        allocation=allocation,
        start=start,
        compute=_compute(base, adapted_model, hyperparams),
        metadata={"run": identity(config), "base": base.fingerprint, "data": {"digest": data["digest"]}},
        first_evaluation=base.once(("evaluation", repr(asked)), dict) if _is_base(config, start.adapters) else {},
    )


def _adapters(
    config: RunConfig, key: jax.Array, base: Base, loader: Loader, log_fn: Callable[[str], None], *, resumes: bool
) -> Any:
    """The adapters at step 0; of a run that resumes, those that start from data are zeros, which nothing reads."""
    if config.init_from is not None and not resumes:
        return start_adapters(locate_adapter(config.init_from), base.params, config.lora)
    if config.lora.init not in CALIBRATED:
        return init_adapters(key, base.params, config.lora)
    shapes = adapter_shapes(base.params, config.lora)
    if resumes:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    model = adapted(_configured(config, base, loader, shapes), config.lora)
    calibration = make_calibration(config, base.name, base.layout, model, base.params, loader, log_fn)
    return init_adapters(key, base.params, config.lora, calibration=calibration)


def _configured(config: RunConfig, base: Base, loader: Loader, adapters: Any) -> Decoder:
    sizes = {"length": longest_row(loader), "segments": most_segments(loader)}
    return configure_decoder(base.model, config, base.layout, base.params, adapters, **sizes)


def _is_base(config: RunConfig, adapters: Any) -> bool:
    """Whether the adapters, host arrays, change nothing at step 0: plain pairs whose B is zero."""
    if config.lora.init in OFF_BASE:
        return False
    plain = len(jax.tree.leaves(adapters)) == 2 * len(pairs(adapters))
    return plain and not any(np.any(pair["lora_b"]) for pair in pairs(adapters).values())


def load_base(config: RunConfig) -> Base:
    """The base of ``config`` with its tokenizer, placed by the layout that ``config.parallel`` asks for.

    Raises:
      InputError: it cannot be loaded, or the layout does not fit the devices.
    """
    name = config.model.path or str(base_directory())
    layout = make_layout(config, architecture(config.model.path))
    require_groups(config, layout)  # before minutes of loading
    model, params = load_pretrained(
        name, dtype=jnp.dtype(config.model.dtype), sharding=layout.base_sharding, quantize=config.model.quantize
    )
    if config.model.untie:
        model, params = untie(model, params)
    require_tokenizer(model.tokenizer, name)
    return Base(name, layout, model, params, fingerprint(params))


def _compute(base: Base, model: Adapted, hyperparams: Hyperparams) -> Callable[[Any, Any, Rows], Any]:
    """Of ``make_compute``, one program for all runs on ``base`` whose specs differ in scale and dropout alone."""
    bare = replace(model.spec, alpha=model.spec.rank, scaling="lora", alpha_pattern={}, dropout=0.0)
    compute = base.once(("compute", model.model, bare), lambda: make_compute(adapted(model.model, bare), base.layout))
    scales = {"lora_hp": base.layout.place_state(to_host(hyperparams.lora_hyperparams))}
    return lambda params, others, rows: compute(params, {**others, **scales}, rows)


def _validation_set(config: RunConfig, tokenizer: Any) -> ValidationSet:
    questions = load_questions(config.task, "validation") if config.evaluate else []
    return make_validation_set(config, tokenizer, questions)


def configure_decoder(
    model: Decoder, config: RunConfig, layout: Layout, params: Any, adapters: Any, *, length: int, segments: int
) -> Decoder:
    """``model`` with the attention and the remat policy for the rows and the devices of the run.

    Args:
      model: the run's decoder.
      config: the run.
      layout: of the run.
      params: the placed base, or its shapes with their shardings.
      adapters: or their shapes.
      length: maximum of tokens of a row.
      segments: maximum of segments of a row, as :func:`stablelora_jax.data.most_segments` counts them.

    Raises:
      InputError: an attention that does not run here.
    """
    kind = str(config.model.attention)
    require_here(kind)
    if kind == "auto" and isinstance(config.parallel, MeshConfig):
        packed = segments if segments > 1 else 0
        kind = best_here(model.dtype, model.config, length, packed, partitioned=True)
    remat: str = config.model.remat
    if remat == "auto":
        rows = config.batch_size // (layout.parts * config.gradient_accumulation_steps)
        sizes: dict[str, Any] = {"rows": rows, "length": length, "dtype": model.dtype}
        remat = choose_remat(model.config, params, adapters, **sizes, attention=kind)
    return model.clone(attention=kind, segments=segments, remat=remat)


def _trace(model: Decoder, params: Any, length: int) -> None:
    """Trace the model with the attention and remat that the user chose: errors come before anything is written."""
    row = jax.ShapeDtypeStruct((1, length), jnp.int32)
    jax.eval_shape(lambda p, row: model.apply({"params": p}, row, row, row, method="hidden"), params, row)


def make_layout(config: RunConfig, model: DecoderConfig) -> Layout:
    """The layout that ``config.parallel`` asks for.

    Raises:
      InputError: its sizes are not those of the devices.
    """
    own = config.parallel
    if not isinstance(own, MeshConfig):
        return pmap_layout()
    return mesh_layout(own.data, own.fsdp, own.tensor, key_value_heads=model.num_key_value_heads)


def require_groups(config: RunConfig, layout: Layout) -> None:
    """Check that the rows of a batch divide over devices and micro-batches, with what belongs together.

    Raises:
      InputError: they do not.
    """
    group, micros = make_objective(config).group, config.gradient_accumulation_steps
    if config.batch_size % (group * layout.parts * micros) and config.batch_size % (layout.parts * micros) == 0:
        raise InputError(
            f"objective {config.objective.name} takes rows in groups of {group}: batch_size must be a multiple of "
            f"{group * layout.parts * micros}, not {config.batch_size}"
        )
    layout.require_rows(config.batch_size, micros)
