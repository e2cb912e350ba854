"""Every key of ``experiments/train.py``: one frozen dataclass a section, with its meaning and default beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from stablelora_jax.config.engine import Section
from stablelora_jax.config.keys import NonNegativeInt, PositiveFloat, PositiveInt, option, section
from stablelora_jax.config.objective import CONFIGS as OBJECTIVES
from stablelora_jax.config.objective import ObjectiveConfig
from stablelora_jax.config.optimizer import CONFIGS, OptimizerConfig
from stablelora_jax.config.parallel import DistributedConfig, MeshConfig, PmapConfig
from stablelora_jax.config.rank_allocation import RankAllocationConfig, allocation_of
from stablelora_jax.config.schedule import Cosine, ScheduleConfig, schedule_of
from stablelora_jax.lora.spec import LoraSpec
from stablelora_jax.utils.errors import InputError

MOST = {"steps": 2**31 - 1, "batch_size": 2**20, "max_length": 2**24}  # steps are counted in int32


@dataclass(frozen=True)
class ModelConfig(Section):
    """The frozen base."""

    path: str | None = option(None, "model directory, .gguf file or hub id; null for the small base of this package")
    dtype: Literal["float32", "bfloat16"] = option("float32", "dtype of the base and of matrix products")
    untie: bool = option(False, "give a tied head its own weights, to train head and embedding separately")
    quantize: Literal["nf4", "int8"] | None = option(
        None, "quantise the layers' kernels to 4.13 or 8 bits per weight; null: keep dtype"
    )
    remat: Literal["auto", "everything", "save_dots", "no_mlp", "attention", "nothing"] = option(
        "auto",
        "what the forward pass saves for the backward pass; auto: the fastest that memory allows",
        renamed={"useful": "save_dots"},
    )
    attention: Literal["auto", "xla", "blockwise", "cudnn", "splash"] = option(
        "auto",
        "xla: dense; blockwise: flash in XLA; cudnn: NVIDIA GPUs; splash: TPUs; auto: the best one here",
        renamed={"blocks": "blockwise"},
    )


@dataclass(frozen=True)
class CompareSizesTask(Section):
    """A generated task for the small base that ships with the package."""

    name: Literal["compare_sizes"] = option("compare_sizes", "which of four animals is the biggest, or the smallest")
    train_limit: PositiveInt | None = option(None, "use only the first questions of the training split")
    validation_limit: PositiveInt | None = option(None, "use only the first questions of the validation split")


@dataclass(frozen=True)
class ArcTask(Section):
    """ARC from the hub (``allenai/ai2_arc``) or from a local directory."""

    name: Literal["arc_easy", "arc_challenge"] = option("arc_easy", "grade-school science questions")
    path: str | None = option(None, "directory with train.jsonl and validation.jsonl; null for the hub")
    train_limit: PositiveInt | None = option(None, "use only the first questions of the training split")
    validation_limit: PositiveInt | None = option(None, "use only the first questions of the validation split")


@dataclass(frozen=True)
class QaTask(Section):
    """The other multiple-choice sets of the paper, from the hub or from a local directory."""

    name: Literal["hellaswag", "social_i_qa", "openbookqa", "merged_qa"] = option(
        "merged_qa", "merged_qa is these three and both of ARC, one after another"
    )
    path: str | None = option(None, "directory with SPLIT.jsonl (merged_qa: with a directory a set); null for the hub")
    train_limit: PositiveInt | None = option(None, "use only the first questions of the training split")
    validation_limit: PositiveInt | None = option(None, "use only the first questions of the validation split")


@dataclass(frozen=True)
class MathTask(Section):
    """Math word problems from the hub or from a local directory; answers are generated, in GSM8K's prompt format."""

    name: Literal["metamathqa", "gsm8k"] = option("metamathqa", "the training set; both are evaluated on GSM8K")
    path: str | None = option(None, "directory with train.jsonl; null for the hub")
    held_out: bool = option(True, "hold out one question in 64 for validation; false trains on all")
    train_limit: PositiveInt | None = option(None, "use only the first problems of the training split")
    validation_limit: PositiveInt | None = option(None, "use only the first of the held-out problems")


@dataclass(frozen=True)
class JsonlTask(Section):
    """Rows of your own, from a local directory or the hub."""

    name: Literal["jsonl"] = option("jsonl", "rows of your own")
    kind: Literal["choice", "completion", "chat", "preference", "text", "auto"] = option(
        "completion",
        "format of a row: chat: messages; choice: prompt, choices, label; preference: prompt, chosen, rejected; "
        "auto: by the first row's columns",
    )
    path: str | None = option(None, "directory with train.jsonl and validation.jsonl; null where hub is given")
    hub: str | None = option(None, "a data set on the hub")
    hub_config: str | None = option(None, "configuration of the hub's data set")
    fields: Mapping[str, str] = option(
        {}, "column of prompt, choices, label, completion, target, messages, tools, chosen, rejected, text or id"
    )
    train_limit: PositiveInt | None = option(None, "use only the first rows of the training split")
    validation_limit: PositiveInt | None = option(None, "use only the first rows of the validation split")


@dataclass(frozen=True)
class DataConfig(Section):
    """How texts become batches."""

    batching: Literal["bucket", "pack"] = option(
        "bucket",
        "bucket: one text per row, padded to one of a few lengths; pack: many texts per row",
    )
    truncate: Literal["left", "right", "error"] = option(
        "left",
        "side on which a text longer than `max_length` is truncated; error: refuse it",
        renamed={"refuse": "error"},
    )
    chat_template: bool | None = option(
        None,
        "apply the model's chat template, to messages, or to a prompt as a user turn; null: for chats only",
    )
    loss_on: Literal["assistant", "last"] = option(
        "assistant", "of chats in the model's chat template: learn all answers of the assistant, or only the last"
    )
    cache: str | None = option(None, "directory for tokenised data, reused by the next run; null for none")


@dataclass(frozen=True)
class RunConfig(Section):
    """A run; the same values give the same adapters."""

    model: ModelConfig = section(ModelConfig, "the frozen base")
    task: CompareSizesTask | ArcTask | QaTask | MathTask | JsonlTask = section(CompareSizesTask, "the training task")
    data: DataConfig = section(DataConfig, "how texts become batches")
    lora: LoraSpec = section(LoraSpec, "what is adapted, in PEFT's terms")
    optimizer: OptimizerConfig = section(CONFIGS["stable_lora"], "how the adapters are trained")
    objective: ObjectiveConfig = section(OBJECTIVES["sft"], "what is minimised: a likelihood, or a preference")
    schedule: ScheduleConfig = section(Cosine, "the learning rate over the run")
    rank_allocation: RankAllocationConfig | None = section(lambda: None, "which ranks are trained when; null: all")
    freeze: tuple[str, ...] = option((), "frozen parts of the adapters: ends of names, such as layers.0 or lora_a")
    init_from: str | None = option(
        None, "adapter or run that a new run starts from; null: fresh adapters", was="adapter"
    )
    calibration_batches: PositiveInt = option(
        8, "training batches on which lora_ga, lora_sb and eva measure where adapters start"
    )
    parallel: PmapConfig | MeshConfig = section(PmapConfig, "device parallelism")
    distributed: DistributedConfig | None = section(lambda: None, "several processes in one run")
    steps: Annotated[int, Meta(ge=1, le=MOST["steps"])] = option(300, "optimizer steps")
    epochs: PositiveFloat | None = option(None, "passes over the training data, instead of steps; null: use steps")
    batch_size: Annotated[int, Meta(ge=1, le=MOST["batch_size"])] = option(32, "rows per step, over all devices")
    gradient_accumulation_steps: PositiveInt = option(
        1, "micro-batches of a step; the result is the same", was="accumulate"
    )
    max_length: Annotated[int, Meta(ge=1, le=MOST["max_length"])] = option(
        256, "maximum tokens per row; see data.truncate", was="length"
    )
    max_grad_norm: PositiveFloat | None = option(1.0, "clip the global gradient norm; null for none", was="clip_norm")
    max_consecutive_errors: PositiveInt = option(5, "stop after this many consecutive steps that are not finite")
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = option(
        0, "seed of the initial adapters, the order of rows, and dropout"
    )
    output: str | None = option(None, "run directory; null for runs/<task>-<digest of the configuration>")
    accept_changes: bool = option(False, "resume a run although configuration, base or data have changed")
    checkpoint_every: PositiveInt = option(100, "steps between checkpoints; the last step is always saved")
    checkpoint_minutes: PositiveFloat | None = option(None, "minutes between further checkpoints; null for none")
    keep_checkpoints: PositiveInt = option(
        2, "number of newest checkpoints to keep; the best evaluation's is kept as well"
    )
    evaluate: bool = option(True, "evaluate validation loss, and accuracy of choices, before and after training")
    evaluate_every: PositiveInt | None = option(None, "steps between further evaluations in training; null for none")
    evaluate_minutes: PositiveFloat | None = option(None, "minutes between further evaluations; null for none")
    metric: Literal["loss", "acc", "acc_norm"] = option("loss", "evaluation metric for patience and select")
    patience: PositiveInt | None = option(None, "stop after this many evaluations without improvement; null: never")
    select: Literal["last", "best"] = option("last", "which adapter to keep: the last step's or the best evaluation's")
    stability_every: PositiveInt | None = option(
        None, "steps between measurements of the stability terms; null for none"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = option(("tensorboard",), "metric loggers")
    num_samples: NonNegativeInt = option(4, "validation questions to print, with answers before and after", was="show")

    def __post_init__(self) -> None:
        """Check what the types do not express."""
        super().__post_init__()
        if "layers" not in self.lora.stacked:
            raise InputError("lora.stacked must hold layers: a run's model stacks its layers under that name")
        if self.lora.init == "loftq" and not self.model.quantize and self.init_from is None:
            raise InputError("lora.init loftq corrects what a base loses: say model.quantize=nf4, or another init")
        if self.batch_size % self.gradient_accumulation_steps:
            raise InputError(
                f"batch_size {self.batch_size} does not divide into {self.gradient_accumulation_steps} micro-batches"
            )
        if self.objective.name != "sft" and self.data.batching == "pack":
            raise InputError(f"objective {self.objective.name} takes pairs of rows: say data.batching=bucket")
        now_and_then = self.evaluate_every or self.evaluate_minutes
        if now_and_then and not self.evaluate:
            raise InputError(f"evaluate_{'every' if self.evaluate_every else 'minutes'} needs evaluate: true")
        if not now_and_then and (self.patience is not None or self.select == "best"):
            raise InputError(f"{'select: best' if self.patience is None else 'patience'} needs evaluate_every")
        if self.epochs is None:
            schedule_of(self.schedule, 1.0, self.steps)  # names the key that does not fit
            allocation_of(self.rank_allocation, self.lora, self.optimizer, self.steps)


def takes_template(config: RunConfig) -> bool:
    """Whether prompts use the model's chat template: by default, for chats only."""
    asked = config.data.chat_template
    return is_chat(config) if asked is None else asked


def is_chat(config: RunConfig) -> bool:
    """Whether the task's rows are messages.

    Raises:
      InputError: ``task.kind`` is still ``auto``.
    """
    if isinstance(config.task, JsonlTask) and config.task.kind == "auto":
        raise InputError("task.kind=auto is for stablelora train and data alone: name the kind of the rows")
    return isinstance(config.task, JsonlTask) and config.task.kind == "chat"
