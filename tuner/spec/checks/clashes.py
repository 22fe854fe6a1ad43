"""Settings that are right by themselves and wrong together: what TRL, PEFT or a server would find in mid-trial."""

from __future__ import annotations

from typing import Any

from tuner.errors import Problem
from tuner.spec.checks.fields import place_of, possible_values
from tuner.spec.checks.peek import peek_format
from tuner.spec.checks.words import any_of, show
from tuner.spec.fields import checkpoints_activations
from tuner.spec.sweep import SweepSpec

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vllm.config.lora.MaxLoRARanks: what its --max-lora-rank takes."""
NOT_CHAT = {
    "text": "plain text",
    "alpaca": "instructions without turns",
    "prompt_completion": "prompts and completions as plain text",
    "tokenized": "already tokenised",
}
NO_COMPLETION = {"text": "plain text", "messages": "whole conversations", "sharegpt": "whole conversations"}
SCHEDULER_NEEDS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Arguments without which transformers' schedulers raise, any one of them."""


LOW_RANK = ("galore_", "apollo_")
READ_ARGUMENTS = (
    *LOW_RANK,
    *("adagrad", "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "grokadamw"),
    *("paged_ademamix", "rmsprop", "schedule_free_", "sgd", "stable_adamw"),
)
"""How the names of optimizers begin that look at train.optim_target_modules, and of those that look at optim_args."""


def check_clashes(spec: SweepSpec) -> list[Problem]:
    """Find every contradiction between settings, the searched ones with all their values."""
    found = [*_check_packing(spec), *_check_loss(spec), *_check_trainer(spec)]
    found += [*_check_optimizer(spec), *_check_memory(spec)]
    return found + (_check_full(spec) if spec.lora is None else [*_check_lora(spec), *_check_server(spec)])


def _check_packing(spec: SweepSpec) -> list[Problem]:
    found = []
    packings = possible_values(spec, "train.packing")
    max_lengths = possible_values(spec, "train.max_length")
    packed = [packing for packing in packings if packing != "none"]
    if packed and None in max_lengths:
        found.append(Problem("train.max_length", "null", f"a length, since train.packing may be {packed[0]}", "1024"))
    if True in possible_values(spec, "train.padding_free") and max_lengths != [None]:
        distribution = spec.space.get("train.padding_free")
        packings = ((distribution and distribution.when) or {}).get("train.packing", packings)
        if "none" in packings:
            allowed = "packing bfd, bfd_split or wrapped beside it, or train.max_length: null"
            found.append(Problem(place_of(spec, "train.padding_free"), "true without packing", allowed))
    return found


def _check_loss(spec: SweepSpec) -> list[Problem]:
    """TRL refuses these once it sees the first row; here the declared format, or a look at the file, says it."""
    wanted = [name for name in ("assistant_only_loss", "completion_only_loss") if spec.train.get(name) is True]
    if not wanted:
        return []
    found = []
    format_, seen = peek_format(spec.data, spec.train.get("dataset_text_field", "text"))
    kind = f"the first row of data.path is {format_}" if seen else f"data.format is {format_}"
    if spec.data.template is not None:
        kind = "data.template makes text"
    if "assistant_only_loss" in wanted and format_ in NOT_CHAT:
        allowed = f"false, since {kind}: {NOT_CHAT[format_]}"
        found.append(Problem("train.assistant_only_loss", "true", allowed))
    if "completion_only_loss" in wanted and format_ in NO_COMPLETION:
        allowed = f"false, since {kind}: {NO_COMPLETION[format_]}"
        near = "assistant_only_loss" if format_ != "text" else None
        found.append(Problem("train.completion_only_loss", "true", allowed, near))
    return found


def _check_trainer(spec: SweepSpec) -> list[Problem]:
    found = []
    arguments = spec.train.get("lr_scheduler_kwargs") or {}
    for scheduler in possible_values(spec, "train.lr_scheduler_type"):
        needs = SCHEDULER_NEEDS.get(str(scheduler), ())
        if needs and isinstance(arguments, dict) and not any(name in arguments for name in needs):
            allowed = f"{' or '.join(needs)}, which {scheduler} needs"
            found.append(Problem("train.lr_scheduler_kwargs", show(arguments), allowed))
    if 0 in possible_values(spec, "train.dataloader_num_workers"):
        for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
            if spec.train.get(name):
                allowed = "train.dataloader_num_workers of at least 1 beside it"
                found.append(Problem(f"train.{name}", show(spec.train[name]), allowed))
    return found


def _check_optimizer(spec: SweepSpec) -> list[Problem]:
    found = []
    optimizers = [str(value) for value in possible_values(spec, "train.optim")]
    at = place_of(spec, "train.optim")
    low_rank = [name for name in optimizers if name.startswith(LOW_RANK)]
    modules, arguments = spec.train.get("optim_target_modules"), spec.train.get("optim_args")
    if low_rank and modules is None:
        allowed = f"the modules whose gradients {low_rank[0]} projects"
        found.append(Problem("train.optim_target_modules", "null", allowed, "all-linear"))
    if modules is not None and not low_rank:
        allowed = f"null, since {any_of(optimizers)} looks at no modules"
        found.append(Problem("train.optim_target_modules", show(modules), allowed))
    if arguments is not None and not any(name.startswith(READ_ARGUMENTS) for name in optimizers):
        found.append(Problem("train.optim_args", show(arguments), f"null, since {any_of(optimizers)} reads none"))
    schedule_free = any(name.startswith("schedule_free_") for name in optimizers)
    for warmup in possible_values(spec, "train.warmup_steps"):
        if schedule_free and isinstance(warmup, float) and 0 < warmup < 1:
            allowed = "a number of steps: a schedule-free optimizer knows no share of them"
            found.append(Problem(place_of(spec, "train.warmup_steps"), show(warmup), allowed))
    for name in low_rank:
        if name.endswith("_layerwise"):
            if possible_values(spec, "train.gradient_accumulation_steps") != [1]:
                found.append(Problem(at, show(name), "others, since train.gradient_accumulation_steps is not 1"))
            if spec.resources.workers_per_trial > 1:
                found.append(Problem(at, show(name), "others, since resources.workers_per_trial is not 1"))
    return found


def _check_memory(spec: SweepSpec) -> list[Problem]:
    """Checkpointing and Liger, whose further settings would otherwise be left out without a word."""
    found = []
    for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        settings = spec.train.get(key)
        if settings and not checkpoints_activations(spec.train):
            found.append(Problem(f"train.{key}", show(settings), "null, since nothing is checkpointed"))
        elif isinstance(settings, dict) and settings.get("selective") and settings.get("use_reentrant"):
            allowed = "false or nothing, since selective checkpointing is not reentrant"
            found.append(Problem(f"train.{key}.use_reentrant", "true", allowed))
    settings = spec.train.get("liger_kernel_config")
    if settings is not None and True not in possible_values(spec, "train.use_liger_kernel"):
        found.append(
            Problem("train.liger_kernel_config", show(settings), "null, since train.use_liger_kernel is false")
        )
    elif isinstance(settings, dict) and settings.get("fused_linear_cross_entropy"):
        allowed = "false or nothing: TRL fuses the head in its own way"
        found.append(Problem("train.liger_kernel_config.fused_linear_cross_entropy", "true", allowed))
    return found


def _check_lora(spec: SweepSpec) -> list[Problem]:
    found = []
    for targets in possible_values(spec, "lora.target_modules"):
        if "lm_head" in (targets if isinstance(targets, list) else [targets]):
            allowed = "modules other than lm_head: TRL computes the loss from its weight, past any adapter"
            found.append(Problem(place_of(spec, "lora.target_modules"), show(targets), allowed, "all-linear"))
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(targets, str) and (spec.lora or {}).get(name) is not None:
                allowed = f"null, since lora.target_modules is the text {show(targets)}"
                found.append(Problem(f"lora.{name}", show((spec.lora or {})[name]), allowed))
    inits = possible_values(spec, "lora.init_lora_weights")
    odd = [rank for rank in possible_values(spec, "lora.r") if isinstance(rank, int) and rank % 2]
    if "orthogonal" in inits and odd:
        found.append(
            Problem(place_of(spec, "lora.r"), show(odd[0]), "even ranks, since init_lora_weights is orthogonal")
        )
    if "mica" in inits and any(kind != "none" for kind in possible_values(spec, "model.quantization")):
        allowed = "other values, since mica needs an unquantised base"
        found.append(Problem(place_of(spec, "lora.init_lora_weights"), "'mica'", allowed))
    return found


def _check_full(spec: SweepSpec) -> list[Problem]:
    kinds: list[Any] = [kind for kind in possible_values(spec, "model.quantization") if kind != "none"]
    if not kinds:
        return []
    allowed = "none, since lora is null: quantised weights cannot be trained"
    return [Problem(place_of(spec, "model.quantization"), show(kinds[0]), allowed, "none")]


def _check_server(spec: SweepSpec) -> list[Problem]:
    if spec.promotion is None or spec.promotion.server != "vllm":
        return []
    found = []
    distribution = spec.space.get("lora.r")
    if distribution is not None and distribution.type != "choice":
        allowed = "choice, since vllm serves only the ranks " + ", ".join(map(str, VLLM_RANKS))
        found.append(Problem("space.lora.r.type", distribution.type, allowed, "choice"))
    else:
        wrong = [rank for rank in possible_values(spec, "lora.r") if isinstance(rank, int) and rank not in VLLM_RANKS]
        for rank in wrong:
            near = str(next((served for served in VLLM_RANKS[1:] if served > rank), VLLM_RANKS[-1]))
            allowed = "the ranks vllm serves: " + ", ".join(map(str, VLLM_RANKS))
            found.append(Problem(place_of(spec, "lora.r"), show(rank), allowed, near))
    if True in possible_values(spec, "lora.use_dora"):
        found.append(Problem(place_of(spec, "lora.use_dora"), "true", "false, since vllm serves no DoRA adapters"))
    if (spec.lora or {}).get("modules_to_save"):
        found.append(Problem("lora.modules_to_save", show((spec.lora or {})["modules_to_save"]), "null, for vllm"))
    return found
