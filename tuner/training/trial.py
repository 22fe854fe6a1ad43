"""One trial: a stock TRL `SFTTrainer`, told its budget, and a callback that scores it at the budget's milestones."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from tuner.errors import DataError, InfeasibleError, TunerError
from tuner.spec.layout import Root
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report, TrialConfig, milestones
from tuner.training.baseline import Preparation, prepare_rows
from tuner.training.budget import StepPlan, plan_steps
from tuner.training.dataset import DEFAULT_SEED
from tuner.training.evaluation import Score, score
from tuner.training.model import load_model, load_tokenizer
from tuner.training.tokens import configure_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Emit = Callable[[Report, Callable[[Path], None]], None]
"""Takes a report and a function that saves the adapter it scores into a folder; called on every rank."""

ScoreFunction = Callable[[Any, Dataset, int], Score]
"""Scores a model on rows with a batch size, as `evaluation.score` does."""

# What `tuner.training.dataset` has already applied to the rows; SFTTrainer would look for it in raw ones.
_PREPARED_FIELDS = frozenset(
    {
        "assistant_only_loss",
        "chat_template_path",
        "completion_only_loss",
        "dataset_text_field",
    }
)


def run_trial(spec: SweepSpec, config: TrialConfig, sweep: Preparation, output_dir: Path, emit: Emit) -> None:
    """Train one trial to the end of its budget, emitting a report at every milestone.

    Raises InfeasibleError when the point cannot be trained (diverged, or a step larger than the budget's grain),
    DataError when the data are not those the sweep began with, and TunerError when the libraries would train otherwise
    than was asked; an out-of-memory error of torch's is left as it is.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(config["model"], Root(Path(spec.storage.root)).cache, device)
    trainer = planned_trainer(spec, config, sweep, model, output_dir, emit)
    ranks, asked = trainer.args.world_size, spec.resources.workers_per_trial
    if ranks != asked:
        raise TunerError(f"resources.workers_per_trial asks for {asked} workers, the trainer found {ranks}")
    trainer.train()


def planned_trainer(
    spec: SweepSpec,
    config: TrialConfig,
    sweep: Preparation,
    model: PreTrainedModel,
    output_dir: Path,
    emit: Emit,
    trainer_class: type[SFTTrainer] = SFTTrainer,
    score: ScoreFunction = score,
) -> SFTTrainer:
    """The trainer of one trial, ready for `train()`: data prepared, steps planned, reports at the milestones."""
    cache = Root(Path(spec.storage.root)).cache
    prepared = prepare_rows(spec, config["train"])
    if prepared.summary["fingerprints"] != sweep.data["fingerprints"]:
        raise DataError(f"{spec.data.path} has changed since the sweep began: its trials could not be compared")
    rows = load_from_disk(str(prepared.train))
    trainer = build_trainer(config, model, tokenizer_for(config, cache), rows, output_dir, trainer_class)
    plan = plan_steps(trainer, milestones(sweep.tokens_per_trial, spec.budget.evals_per_trial))
    trainer.args.max_steps = plan.max_steps
    trainer.add_callback(ReportAtMilestones(plan, load_from_disk(str(prepared.eval)), emit, score))
    return trainer


def tokenizer_for(config: TrialConfig, cache: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer with the chat template and the special tokens of the trial's `train` section."""
    tokenizer = load_tokenizer(config["model"], cache)
    configure_tokenizer(tokenizer, config["train"])
    return tokenizer


def build_trainer(
    config: TrialConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    output_dir: Path,
    trainer_class: type[SFTTrainer] = SFTTrainer,
) -> SFTTrainer:
    """The trainer of one trial, over rows that are already tokenised and packed."""
    return trainer_class(
        model=model,
        args=sft_config(config, output_dir),
        train_dataset=train_rows,
        processing_class=tokenizer,
        peft_config=lora_config(config),
    )


def sft_config(config: TrialConfig, output_dir: Path) -> SFTConfig:
    """TRL's settings of one trial: the user's, and those the service owns."""
    train = {field: value for field, value in config["train"].items() if field not in _PREPARED_FIELDS}
    packing = train.pop("packing", "none")
    # The order of the data follows from the trial's own seed, not from what else seeds this process meanwhile.
    if train.get("data_seed") is None:
        train["data_seed"] = train.get("seed", DEFAULT_SEED)
    return SFTConfig(
        **train,
        output_dir=str(output_dir),
        packing=packing != "none",
        packing_strategy=packing if packing != "none" else "bfd",
        eval_packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        bf16=config["model"]["dtype"] == "bfloat16",
        fp16=config["model"]["dtype"] == "float16",
        use_cpu=not torch.cuda.is_available(),
        max_steps=1,  # until the budget is planned, which needs the trainer's own batches
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",  # the milestones decide when to log
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )


def lora_config(config: TrialConfig) -> LoraConfig | None:
    """PEFT's settings of one trial; every linear layer unless the spec names others; None for full fine-tuning."""
    if config["lora"] is None:
        return None
    return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **config["lora"]})


class ReportAtMilestones(TrainerCallback):
    """Has the trainer log at every milestone, scores the model there, and emits one Report."""

    def __init__(self, plan: StepPlan, eval_rows: Dataset, emit: Emit, score: ScoreFunction):
        self._plan = plan
        self._eval_rows = eval_rows
        self._emit = emit
        self._score = score
        self._started = self._resumed = time.monotonic()
        self._tokens_then = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._resumed = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = state.global_step in self._plan.evaluations

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs, model = kwargs["logs"], kwargs["model"]
        if "loss" not in logs:  # the summary at the end of training
            return
        milestone, trained_tokens = self._plan.evaluations[state.global_step]
        seconds = time.monotonic() - self._resumed
        result = self._score(model, self._eval_rows, args.per_device_eval_batch_size)
        report = Report(
            tokens=milestone,
            trained_tokens=trained_tokens,
            step=state.global_step,
            epoch=state.epoch,
            train_loss=logs["loss"],
            eval_loss=result.eval_loss,
            mean_token_accuracy=result.mean_token_accuracy,
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm", 0.0),
            tokens_per_s=(trained_tokens - self._tokens_then) / seconds,
            peak_memory_bytes=peak_memory_bytes(),
            duration_s=time.monotonic() - self._started,
        )
        self._emit(report, model.save_pretrained)
        if not report.is_finite():
            raise InfeasibleError("diverged", f"eval_loss is {report.eval_loss} after {trained_tokens} tokens")
        self._resumed = time.monotonic()
        self._tokens_then = trained_tokens


def peak_memory_bytes() -> int:
    """Most memory this process has held: of the GPU where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
