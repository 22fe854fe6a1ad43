"""How the workers of a trial share it: what contradicts itself, or what the libraries cannot do."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuner.errors import Problem
from tuner.spec.checks.fields import place_of, possible_values
from tuner.spec.checks.paths import is_small_file
from tuner.spec.checks.words import any_of, nearest, show
from tuner.spec.space import Int
from tuner.spec.sweep import SweepSpec

SHARDS_QUANTIZED = {"none": None, "nf4": ("auto", "ddp", "fsdp", "zero1", "zero2"), "int8": ("auto", "ddp")}
"""Of each quantisation, the strategies that it can be trained with; None: every one."""
_WHY_NOT = {
    "nf4": "ZeRO-3 parts a weight while it is loaded, before it can be quantised",
    "int8": "what scales an int8 weight does not follow it where it is sharded or cast",
}

TORCH_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
_OF_SHAPES = ("adafactor", "galore", "apollo", "lomo", "adalomo")

DEEPSPEED_KEYS = (
    *("zero_optimization", "bf16", "fp16", "gradient_clipping", "gradient_accumulation_steps", "train_batch_size"),
    *("train_micro_batch_size_per_gpu", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "aio", "data_types"),
    *("activation_checkpointing", "comms_logger", "flops_profiler", "steps_per_print", "wall_clock_breakdown"),
    *("memory_breakdown", "dump_state", "disable_python_gc"),
)
"""What may stand in DeepSpeed settings; the sections as DeepSpeed's DeepSpeedConfig reads them."""
ZERO_KEYS = (
    *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions", "overlap_comm"),
    *("allgather_bucket_size", "load_from_fp32_weights", "offload_optimizer", "offload_param", "sub_group_size"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size"),
    *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "round_robin_gradients"),
    *("stage3_gather_16bit_weights_on_model_save", "ignore_unused_parameters", "memory_efficient_linear"),
    *("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients"),
)
"""What may stand in `zero_optimization`: names and aliases of fields of DeepSpeedZeroConfig."""
AUTO_ONLY = {
    "train_batch_size": "train.per_device_train_batch_size",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "bf16.enabled": "model.dtype",
    "fp16.enabled": "model.dtype",
}
"""What DeepSpeed may be told only by the trainer, and the key that says it."""
ELSEWHERE = {"optimizer": "train.optim", "scheduler": "train.lr_scheduler_type", "torch_autocast": "model.dtype"}

FSDP_KEYS = (
    *("reshard_after_forward", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params"),
    *("cpu_ram_efficient_loading", "activation_checkpointing"),
)
"""What may stand in `resources.fsdp`: what of transformers' fsdp_config FSDP2 reads and the service does not decide."""
FSDP_OWNED = {
    "version": "nothing, it is FSDP2",
    "cpu_offload": "resources.offload",
    "state_dict_type": "nothing, adapters are gathered whole",
}
_FSDP1 = {
    "offload_params": "resources.offload",
    "sharding_strategy": "reshard_after_forward: true shards parameters too, false gradients and states only",
    "backward_prefetch": "nothing, FSDP2 prefetches by itself",
    "backward_prefetch_policy": "nothing, FSDP2 prefetches by itself",
    "forward_prefetch": "nothing, FSDP2 prefetches by itself",
    "use_orig_params": "nothing, FSDP2 always uses the original parameters",
    "sync_module_states": "nothing, FSDP2 always starts from the same weights",
    "limit_all_gathers": "nothing, FSDP2 always limits them",
}
"""Names of accelerate's settings and of FSDP1's, and what they are in `resources.fsdp`."""


def check_strategy(spec: SweepSpec) -> list[Problem]:
    """Find everything about workers and sharding that cannot work together."""
    return [*_check_settings(spec), *_check_quantization(spec), *_check_optimizers(spec), *_check_batches(spec)]


def why_not_optimizer(strategy: str, optim: str) -> str | None:
    """Why an optimizer cannot train what this strategy shards; None where it can."""
    if strategy == "fsdp" and optim not in TORCH_OPTIMIZERS:
        return "only torch's own optimizers know the sharded weights of fsdp"
    if strategy.startswith("zero") and optim.startswith(_OF_SHAPES):
        return "it looks at a weight's rows and columns, and ZeRO flattens weights"
    return None


def _check_settings(spec: SweepSpec) -> Iterator[Problem]:
    asked = spec.resources
    if asked.strategy == "fsdp" and asked.gpus_per_worker == 0:
        yield Problem("resources.strategy", "'fsdp' without GPUs", "ddp, zero1, zero2 or zero3: there it becomes ddp")
    if asked.offload and asked.strategy in ("auto", "ddp"):
        allowed = f"false, or a strategy of fsdp, zero1, zero2 or zero3: {asked.strategy} shards nothing"
        yield Problem("resources.offload", "true", allowed, "false")
    if asked.fsdp is not None:
        yield from _check_fsdp(spec, asked.fsdp)
    if isinstance(asked.deepspeed, str):
        yield Problem("resources.deepspeed", show(asked.deepspeed), f"a JSON file; {_why_unread(asked.deepspeed)}")
    elif asked.deepspeed is not None:
        yield from _check_deepspeed(asked.deepspeed, asked.strategy)


def _why_unread(path: str) -> str:
    if os.path.exists(path) and not is_small_file(Path(path)):
        return "this is no file of at most 1 MB"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return str(error)
    return f"it holds {type(found).__name__}, not keys and values"


def _check_deepspeed(settings: dict[str, Any], strategy: str) -> Iterator[Problem]:
    at = "resources.deepspeed"
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        yield Problem(f"{at}.zero_optimization.stage", show(stage), "1, 2 or 3")
    elif strategy != f"zero{stage}":
        allowed = f"zero{stage}, the stage in resources.deepspeed"
        yield Problem("resources.strategy", show(strategy), allowed, f"zero{stage}")
    for key in settings:
        if key in ELSEWHERE:
            yield Problem(f"{at}.{key}", show(settings[key]), "nothing, the trainer has its own", ELSEWHERE[key])
        elif key not in DEEPSPEED_KEYS:
            near = nearest(key, DEEPSPEED_KEYS)
            yield Problem(f"{at}.{key}", "an unknown key", any_of(DEEPSPEED_KEYS), near)
    for key in zero if isinstance(zero, dict) else ():
        if key not in ZERO_KEYS:
            yield Problem(f"{at}.zero_optimization.{key}", "an unknown key", any_of(ZERO_KEYS), nearest(key, ZERO_KEYS))
    for key, instead in AUTO_ONLY.items():
        section, _, name = key.rpartition(".")
        values = settings.get(section, {}) if section else settings
        if not isinstance(values, dict):
            yield Problem(f"{at}.{section}", show(values), "keys and values")
        elif values.get(name, "auto") != "auto":
            yield Problem(f"{at}.{key}", show(values[name]), f"'auto', since {instead} says it", "auto")


def _check_fsdp(spec: SweepSpec, settings: dict[str, Any]) -> Iterator[Problem]:
    at = "resources.fsdp"
    if spec.resources.strategy != "fsdp":
        yield Problem(
            "resources.strategy", show(spec.resources.strategy), "fsdp, since resources.fsdp is given", "fsdp"
        )
    for key in settings:
        name = key.removeprefix("fsdp_")  # as accelerate's own files spell them
        if instead := (FSDP_OWNED | _FSDP1).get(name):
            yield Problem(f"{at}.{key}", show(settings[key]), instead)
        elif key not in FSDP_KEYS:
            yield Problem(f"{at}.{key}", "an unknown key", any_of(FSDP_KEYS), nearest(name, FSDP_KEYS))
    twice = possible_values(spec, "train.gradient_checkpointing") != [False]
    if settings.get("activation_checkpointing") and twice:
        allowed = "false, or train.gradient_checkpointing: false beside it: one of the two"
        yield Problem(f"{at}.activation_checkpointing", "true", allowed)


def _check_quantization(spec: SweepSpec) -> Iterator[Problem]:
    """The QLoRA matrix: nf4 with ddp, fsdp, zero1 and zero2, int8 with ddp."""
    strategy, at = spec.resources.strategy, place_of(spec, "model.quantization")
    for quantization in possible_values(spec, "model.quantization"):
        allowed = SHARDS_QUANTIZED.get(quantization)
        if allowed and strategy not in allowed:
            why = f"{_WHY_NOT[quantization]}; {quantization} with {any_of(allowed)}"
            yield Problem("resources.strategy", f"{show(strategy)} with {at} {show(quantization)}", why)
        if quantization == "nf4" and strategy == "fsdp" and possible_values(spec, "model.dtype") != ["bfloat16"]:
            allowed_type = "bfloat16, which nf4 weights are stored as so that fsdp shards them"
            yield Problem(place_of(spec, "model.dtype"), "another type", allowed_type, "bfloat16")


def _check_optimizers(spec: SweepSpec) -> Iterator[Problem]:
    at = "train.optim"
    for optim in possible_values(spec, at):
        if why := why_not_optimizer(spec.resources.strategy, str(optim)):
            yield Problem(place_of(spec, at), show(optim), f"{any_of(TORCH_OPTIMIZERS)}: {why}", "adamw_torch")


def _check_batches(spec: SweepSpec) -> Iterator[Problem]:
    """The rows of a step are the same for any number of workers, so these must divide them."""
    workers = spec.resources.workers_per_trial
    if workers == 1:
        return
    if "group_by_length" in possible_values(spec, "train.train_sampling_strategy"):
        allowed = f"random or sequential: {workers} workers would each draw an order of their own"
        yield Problem(place_of(spec, "train.train_sampling_strategy"), "'group_by_length'", allowed, "random")
    keys = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
    for batch, accumulation in itertools.product(*(_values_to_divide(spec, key, workers) for key in keys)):
        if isinstance(batch, int) and isinstance(accumulation, int) and batch * accumulation % workers:
            allowed = f"a product with {keys[1]} that resources.workers_per_trial, {workers}, divides"
            yield Problem(place_of(spec, keys[0]), f"{batch} x {accumulation} rows in a step", allowed)
            return


def _values_to_divide(spec: SweepSpec, key: str, workers: int) -> list[Any]:
    """Every value of a key; of a range as many as there are workers, among which is every remainder that it leaves."""
    searched = spec.space.get(key)
    if isinstance(searched, Int):
        return list(range(searched.low, searched.high + 1, searched.step)[:workers])
    return possible_values(spec, key)
