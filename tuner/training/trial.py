"""One trial: a stock TRL `SFTTrainer`, told its budget, and a callback that scores it at the budget's milestones."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from tuner.errors import InfeasibleError
from tuner.spec.batch import batch_of_one, share_of_batch
from tuner.spec.layout import Root, Save, refuse_full_disk
from tuner.spec.space import resolve
from tuner.spec.sweep import ResourcesSpec, SweepSpec
from tuner.spec.trial import Report, TrialConfig, milestones
from tuner.training.baseline import Preparation, prepare_rows, refuse_changed_data
from tuner.training.budget import StepPlan, plan_steps
from tuner.training.checkpoint import can_go_on, complete_checkpoint, newest_checkpoint, only_weights
from tuner.training.dataset import DEFAULT_SEED
from tuner.training.evaluation import Score, score
from tuner.training.model import load_model, load_tokenizer
from tuner.training.strategy import (
    RefuseFallback,
    gather_weights,
    largest_of_workers,
    loads_in_parts,
    quant_storage,
    sharing_arguments,
)
from tuner.training.watchdog import unwatched
from tuner.training.workers import WorkersTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Emit = Callable[[Report, Save | None], None]
"""Takes a report and a function that saves the adapter it scores into a folder; called on every rank.

The function is None of an earlier report of a trial that goes on: it was emitted before, and the adapter is trained on
since. But those who were to hear of it may have been gone by then.
"""

# What `tuner.training.dataset` has already applied to the rows; SFTTrainer would look for it in raw ones.
_PREPARED_FIELDS = frozenset(
    {
        "assistant_only_loss",
        "chat_template_path",
        "completion_only_loss",
        "dataset_text_field",
    }
)


def run_trial(
    spec: SweepSpec,
    config: TrialConfig,
    sweep: Preparation,
    output_dir: Path,
    emit: Emit,
    root: Root | None = None,
    moved: Callable[[], None] = unwatched,
) -> None:
    """Train one trial to the end of its budget, emitting a report at every milestone.

    What it takes to go on from there is in `output_dir` before a report is emitted; a trial that finds it there goes
    on, and emits its reports up to there again. `root` is that folder's, where it may be in an object store. `moved` is
    called whenever the training has got a little further.

    Raises InfeasibleError when the point cannot be trained (diverged, a step larger than the budget's grain, or
    libraries that would share it among workers otherwise than was asked) and DataError when the data are not those the
    sweep began with; an out-of-memory error of torch's is left as it is.
    """
    planned = _load_and_plan(spec, config, sweep, output_dir)
    root = root or Root(output_dir)
    cut_off = newest_checkpoint(output_dir, root)
    if cut_off:
        print(f"trial {config['number']} goes on from its last evaluation", flush=True)
    before = cut_off.reports if cut_off else []
    planned.trainer.add_callback(ReportAtMilestones(planned, emit, root, before, moved))
    with only_weights() if cut_off else nullcontext():
        planned.trainer.train(resume_from_checkpoint=str(cut_off.folder) if cut_off else None)


def score_untuned(
    spec: SweepSpec, sweep: Preparation, output_dir: Path, moved: Callable[[], None] = unwatched
) -> Score:
    """The untuned base's score, by workers who share it as those of a trial do: no one of them needs all of it.

    An adapter that has not been trained adds nothing. All workers must call, and all get the score.
    """
    config = resolve(spec, 0, {})
    config["train"] |= {
        "per_device_train_batch_size": spec.resources.workers_per_trial,
        "gradient_accumulation_steps": 1,
    }
    if config["lora"] is not None:
        config["lora"] |= {"init_lora_weights": True, "use_dora": False}
    planned = _load_and_plan(spec, config, sweep, output_dir)
    planned.trainer.add_callback(_ScoreFirst(planned, moved))
    try:
        planned.trainer.train()
    except _Scored as scored:
        return scored.score
    raise AssertionError("a training began without a word to its callbacks")


def _load_and_plan(spec: SweepSpec, config: TrialConfig, sweep: Preparation, output_dir: Path) -> PlannedTrial:
    """A trial of its own, its base loaded; it refuses to train otherwise than was asked."""
    resources, cache = spec.resources, Root.of(spec).cache
    in_parts = loads_in_parts(resources, config["model"]["quantization"])
    if in_parts:
        load_tokenizer(config["model"], cache)  # converts a GGUF file, which ZeRO-3 would shard from the next line on
    args = sft_config(config, output_dir, resources)
    model = load_model(config["model"], cache, None if in_parts else args.device, quant_storage(resources))
    planned = plan_trial(spec, config, sweep, model, args)
    planned.trainer.add_callback(RefuseFallback(planned.trainer, resources, config))
    return planned


@dataclass(frozen=True)
class PlannedTrial:
    """A trainer that is ready to train, and what its trial is to report."""

    trainer: SFTTrainer
    plan: StepPlan
    eval_rows: Dataset


def plan_trial(
    spec: SweepSpec, config: TrialConfig, sweep: Preparation, model: PreTrainedModel, args: SFTConfig
) -> PlannedTrial:
    """Build the trainer of one trial over prepared data, and find the steps that its budget is."""
    cache = Root.of(spec).cache
    tokenizer = load_tokenizer(config["model"], cache)
    prepared = prepare_rows(spec, config["train"], tokenizer)
    refuse_changed_data(spec, prepared, sweep)
    rows = load_from_disk(str(prepared.train))
    trainer = build_trainer(config, model, tokenizer, rows, args)
    plan = plan_steps(trainer, milestones(sweep.tokens_per_trial, spec.budget.evals_per_trial))
    trainer.args.max_steps = plan.max_steps
    return PlannedTrial(trainer, plan, load_from_disk(str(prepared.eval)))


def build_trainer(
    config: TrialConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    args: SFTConfig,
) -> SFTTrainer:
    """The trainer of one trial, over rows that are already tokenised and packed."""
    rows, _ = batch_of_one(config["train"])
    kind = SFTTrainer if args.world_size == 1 else partial(WorkersTrainer, batch_of_one=rows)
    return kind(
        model=model,
        args=args,
        train_dataset=train_rows,
        processing_class=tokenizer,
        peft_config=lora_config(config),
    )


def sft_config(config: TrialConfig, output_dir: Path, resources: ResourcesSpec = ResourcesSpec()) -> SFTConfig:
    """TRL's settings of one worker of a trial: the user's, and those the service owns.

    Raises InfeasibleError where the workers cannot divide a step.
    """
    train = {field: value for field, value in config["train"].items() if field not in _PREPARED_FIELDS}
    packing = train.pop("packing", "none")
    size, accumulation = share_of_batch(*batch_of_one(config["train"]), resources.workers_per_trial)
    train |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
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
        **sharing_arguments(resources),
    )


def lora_config(config: TrialConfig) -> LoraConfig | None:
    """PEFT's settings of one trial; every linear layer unless the spec names others; None for full fine-tuning."""
    if config["lora"] is None:
        return None
    return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **config["lora"]})


class Reporter:
    """Makes the Reports of one trial: what its trainer logs at a milestone, its score, and the time it took."""

    def __init__(self, plan: StepPlan, last: Report | None = None):
        """`last` is the newest report of a trial that goes on from there."""
        self._plan = plan
        self._resumed = time.monotonic()
        self._started = self._resumed - (last.duration_s if last else 0)
        self._tokens_then = last.trained_tokens if last else 0

    def training_resumes(self) -> None:
        """From here on, time is training time."""
        self._resumed = time.monotonic()

    def training_paused(self) -> None:
        """Until `training_resumes`, time is not training time."""
        self._trained_s = time.monotonic() - self._resumed

    def report(
        self, step: int, epoch: float, train_loss: float, learning_rate: float, grad_norm: float, score: Score
    ) -> Report:
        milestone, trained_tokens = self._plan.evaluations[step]
        new_tokens, self._tokens_then = trained_tokens - self._tokens_then, trained_tokens
        return Report(
            tokens=milestone,
            trained_tokens=trained_tokens,
            step=step,
            epoch=epoch,
            train_loss=train_loss,
            eval_loss=score.eval_loss,
            mean_token_accuracy=score.mean_token_accuracy,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens_per_s=new_tokens / self._trained_s,
            peak_memory_bytes=peak_memory_bytes(),
            duration_s=time.monotonic() - self._started,
        )


def refuse_divergence(report: Report) -> None:
    """Raise InfeasibleError for a score that is no number: such a trial learns nothing any more."""
    if not report.is_finite():
        raise InfeasibleError("diverged", f"eval_loss is {report.eval_loss} after {report.trained_tokens} tokens")


class ReportAtMilestones(TrainerCallback):
    """Has the trainer log at every milestone, scores the model there, has a checkpoint saved, and emits one Report."""

    def __init__(
        self,
        trial: PlannedTrial,
        emit: Emit,
        root: Root | None = None,
        before: Sequence[Report] = (),
        moved: Callable[[], None] = unwatched,
    ):
        """`root` is where checkpoints last, if there are to be any; `before` the reports of one that goes on."""
        self._trial = trial
        self._root = root
        self._reporter = Reporter(trial.plan, before[-1] if before else None)
        self._emit = emit
        self._reports = list(before)
        self._moved = moved

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for earlier in self._reports[:-1]:
            self._emit(earlier, None)
        if self._reports:
            self._tell(kwargs["model"])
        self._reporter.training_resumes()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._moved()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._moved()
        control.should_log = state.global_step in self._trial.plan.evaluations

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs, model = kwargs["logs"], kwargs["model"]
        if "loss" not in logs:  # the summary at the end of training
            return
        self._reporter.training_paused()
        kwargs["optimizer"].eval()  # a schedule-free one trains at other weights than it finds; steps turn it back
        rows, batch_size = self._trial.eval_rows, args.per_device_eval_batch_size
        result = score(model, rows, batch_size, args.device, self._moved)
        report = self._reporter.report(
            state.global_step, state.epoch, logs["loss"], logs["learning_rate"], logs.get("grad_norm", 0.0), result
        )
        memory = largest_of_workers(report.peak_memory_bytes, args.device)
        self._reports.append(replace(report, peak_memory_bytes=memory))
        more = state.global_step < self._trial.plan.max_steps
        saves = self._root is not None and more and can_go_on(args) and report.is_finite()
        trained = sum(weights.nbytes for weights in model.parameters() if weights.requires_grad)
        refuse_full_disk(Path(args.output_dir), trained * (4 if saves else 1))  # Adam's state is twice the adapter
        if saves:
            control.should_save = True  # which the trainer does next
        else:
            self._tell(model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._root is not None
        complete_checkpoint(self._trial.trainer, self._reports, self._root)
        self._moved()
        self._tell(kwargs["model"])

    def _tell(self, model: Any) -> None:
        self._emit(self._reports[-1], partial(model.save_pretrained, state_dict=gather_weights(self._trial.trainer)))
        refuse_divergence(self._reports[-1])
        self._reporter.training_resumes()


class _Scored(Exception):
    def __init__(self, score: Score):
        super().__init__(score)
        self.score = score


class _ScoreFirst(TrainerCallback):
    """Scores the model as its workers hold it, and ends the training before its first step."""

    def __init__(self, trial: PlannedTrial, moved: Callable[[], None]):
        self._trial = trial
        self._moved = moved

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows, batch_size = self._trial.eval_rows, args.per_device_eval_batch_size
        raise _Scored(score(kwargs["model"], rows, batch_size, args.device, self._moved))


def peak_memory_bytes() -> int:
    """Most memory this process has held: of the GPU where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
