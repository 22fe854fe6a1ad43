"""What a user asks for: one YAML file as frozen, fully resolved models.

Field names are TRL's, PEFT's and Optuna's own. `train` and `lora` are plain mappings because any field of the pinned
`trl.SFTConfig` and `peft.LoraConfig` may stand there; `tuner.spec.check` holds them against a snapshot of those.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from tuner.spec.space import Distribution

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PACKINGS = ("none", "bfd", "bfd_split", "wrapped")
DATA_FORMATS = ("auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt", "tokenized")
GOAL_OF_METRIC = {"eval_loss": "minimize", "mean_token_accuracy": "maximize"}

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: Any) -> Any:
    """Return seconds for `90`, `'90s'`, `'30m'`, `'4h'`, `'1d'` or a sum such as `'1h30m'`."""
    if not isinstance(text, str):
        return text
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("a duration such as 90s, 30m, 4h or 1h30m")
    return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)


Seconds = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]


def parse_size(text: Any) -> Any:
    """Return bytes for `'500MB'`, `'20GB'` or `'1.5TB'`, powers of ten."""
    if not isinstance(text, str):
        return text
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])B", text)
    if not found:
        raise ValueError("a size such as 500MB, 20GB or 1TB")
    return int(float(found[1]) * {"M": 10**6, "G": 10**9, "T": 10**12}[found[2]])


Bytes = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Name = Annotated[str, Field(pattern=rf"^{NAME.pattern}$")]


class Section(BaseModel):
    """A part of the spec: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSpec(Section):
    """The base model every trial starts from."""

    name: str = Field(
        description="Hub id, folder, or `package:NAME` for a model that an installed Python package ships."
    )
    revision: str = Field("main", description="Branch, tag or commit on the hub.")
    gguf_file: str | None = Field(None, description="File name, when the weights are a GGUF file (transformers' name).")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="Type the base is loaded in.")
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="How bitsandbytes holds the base weights; of a base that is stored so, what its config says.",
    )
    attn_implementation: str | None = Field(None, description="As transformers' `from_pretrained` takes it.")
    trust_remote_code: bool = Field(False, description="Run Python code that the model repository ships.")


class DataSpec(Section):
    """Where the examples come from, how rows are read, and what is held out for evaluation."""

    path: str = Field(description="JSON, JSONL, CSV, Parquet or Arrow file, a folder saved by datasets, or a hub id.")
    name: str | None = Field(None, description="Configuration of a hub data set.")
    split: str = Field("train", description="Split of a hub data set or saved DatasetDict.")
    revision: str | None = Field(None, description="Revision of a hub data set.")
    format: Literal["auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt", "tokenized"] = Field(
        "auto", description="How a row is read; `auto` recognises it by its columns and says which it took."
    )
    columns: dict[str, str] = Field({}, description="Rename columns: what the format expects -> what the file has.")
    template: str | None = Field(None, description="A text with {column} fields, made from each row.")
    formatter: str | None = Field(
        None, description="`module:function` of yours, importable where it runs; makes a row one of a known format."
    )
    eval_path: str | None = Field(None, description="A separate evaluation file; without it a fraction is held out.")
    eval_fraction: float = Field(0.05, gt=0, lt=1, description="Share of rows held out when there is no eval_path.")
    max_eval_examples: int = Field(500, ge=1, description="At most this many evaluation rows.")
    max_train_examples: int | None = Field(None, ge=1, description="At most this many training rows.")
    seed: int = Field(0, description="Seed of the hold-out and of the subsets above.")


class ObjectiveSpec(Section):
    """What 'best' means."""

    metric: Literal["eval_loss", "mean_token_accuracy"] = Field(
        "eval_loss", description="The figure trials compete on."
    )
    goal: Literal["minimize", "maximize"] = Field("minimize", description="Optuna's direction; must fit the metric.")


class BudgetSpec(Section):
    """How much is spent: exactly one of the three per-trial budgets; all become trained tokens."""

    trials: int = Field(ge=1, description="Number of trials.")
    tokens_per_trial: int | None = Field(None, ge=1, description="Trained tokens of a full trial.")
    steps_per_trial: int | None = Field(None, ge=1, description="Optimizer steps at the spec's own batch size.")
    epochs_per_trial: float | None = Field(None, gt=0, description="Passes over the training set.")
    evals_per_trial: int = Field(
        8, ge=1, le=10_000, description="Evaluations, evenly spaced in tokens, the last at the end."
    )
    time_limit: Seconds | None = Field(None, description="Wall time of the sweep; `4h`, `30m` or seconds.")
    tokens: int | None = Field(None, ge=1, description="Trained tokens of all trials together.")
    gpu_hours: float | None = Field(None, gt=0, description="Hours of all trials, each times the GPUs it holds.")
    max_failures: int = Field(
        3, ge=1, description="The search ends when its first trials, this number of them, all fail in the same way."
    )
    disk: Bytes | None = Field(None, description="Size of the sweep's folder; `500MB`, `20GB` or bytes.")


class SearchSpec(Section):
    """Which Optuna sampler proposes points."""

    sampler: Literal["tpe", "random", "cmaes", "gp", "qmc", "grid"] = Field("tpe", description="Optuna sampler.")
    startup_trials: int = Field(8, ge=0, description="Random points before the sampler learns; default: at most half.")
    seed: int = Field(0, description="Seed of the sampler.")
    enqueue: list[dict[str, Any]] = Field([], description="Known points to try first, keyed as in `space`.")


class StoppingSpec(Section):
    """When a trial is stopped early, in evaluations at equal token counts."""

    type: Literal["asha", "hyperband", "median", "none"] = Field("asha", description="Rule of early stopping.")
    grace_evals: int = Field(2, ge=1, description="Evaluations before a trial may be stopped; below evals_per_trial.")
    reduction_factor: int = Field(3, ge=2, description="Of this many trials at a rung, one goes on.")
    patience: int | None = Field(
        None, ge=1, description="A trial whose objective has not improved for so many evaluations is over; null: never."
    )
    min_delta: float = Field(0.0, ge=0, description="What is no improvement to patience: at most so much better.")


class ResourcesSpec(Section):
    """What one trial gets of the machine."""

    strategy: Literal["auto", "ddp", "fsdp", "zero1", "zero2", "zero3"] = Field(
        "auto", description="How the workers of one trial share its training; auto: by what its memory is estimated at."
    )
    offload: bool = Field(False, description="Of fsdp and zero*: keep what is sharded in the CPU's memory.")
    deepspeed: str | dict[str, Any] | None = Field(
        None, description="Of zero*: DeepSpeed settings of your own, as a JSON file or here; null: the shipped ones."
    )
    fsdp: dict[str, Any] | None = Field(None, description="Of fsdp: fields of transformers' fsdp_config; null: none.")
    share_base: Literal["auto", "off"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Trials at once on one shared base: auto measures how many pay, off gives each its own."
    )
    workers_per_trial: int = Field(
        1, ge=1, description="Ray Train workers of one trial; they divide the rows of its steps among them."
    )
    cpus_per_worker: int = Field(1, ge=1, description="CPU cores, and torch threads, of one worker.")
    gpus_per_worker: float | None = Field(None, ge=0, description="GPUs of one worker; null: one where there is one.")
    memory_per_worker: Bytes | None = Field(
        None, description="Most that a worker may allocate beyond its libraries; trials then share no base; null: any."
    )
    max_concurrent_trials: int | None = Field(None, ge=1, description="At most so many at once; null: what fits.")
    stuck_after: Seconds = Field(
        600, description="A step or save that takes longer, and 20 times the longest before, ends its attempt; `10m`."
    )

    @property
    def on_ray_train(self) -> bool:
        """Whether a trial runs in workers of Ray Train: it has several, or is sharded, which even one can be."""
        return self.workers_per_trial > 1 or self.strategy not in ("auto", "ddp")


class PromotionSpec(Section):
    """What it takes for the best trial to get the alias."""

    alias: Name = Field("production", description="Name the promoted model gets.")
    max_regression: float = Field(0.01, ge=0, description="How much worse, relatively, the merged model may score.")
    merge_into: Literal["dequantized", "original"] = Field(
        "dequantized", description="For quantised bases: merge into the weights trained on, or the original ones."
    )
    server: Literal["vllm"] | None = Field(None, description="Server whose limits a trial's adapter must respect.")


class StorageSpec(Section):
    """Where everything is kept."""

    root: str = Field("runs", description="Folder, or `s3://BUCKET/PREFIX`, of all sweeps, promoted models and caches.")
    study: str | None = Field(None, description="SQLAlchemy URL, `${VARIABLE}` allowed; null: SQLite in the sweep.")
    keep_best: int = Field(3, ge=1, description="Trials whose best adapter is kept when the sweep is over.")


class SweepSpec(Section):
    """One sweep, as asked. Loaded from YAML by `tuner.load_spec`; all paths absolute, all defaults filled in."""

    name: Name = Field(description="Name of the sweep, also of its folder.")
    model: ModelSpec
    data: DataSpec
    train: dict[str, Any] = Field(
        {}, description="Fields of trl.SFTConfig; packing is none, bfd, bfd_split or wrapped."
    )
    lora: dict[str, Any] | None = Field(
        {}, description="Fields of peft.LoraConfig, or alpha_ratio; null: full fine-tuning."
    )
    space: dict[str, Distribution] = Field(description="What is searched, by dotted key.")
    objective: ObjectiveSpec = ObjectiveSpec()
    budget: BudgetSpec
    search: SearchSpec = SearchSpec()
    stopping: StoppingSpec = StoppingSpec()
    resources: ResourcesSpec = ResourcesSpec()
    promotion: PromotionSpec | None = PromotionSpec()
    storage: StorageSpec = StorageSpec()


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that stands in a field of `SweepSpec`, if one does."""
    options = (field.annotation, *get_args(field.annotation))
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)
