"""Which sweeps train their trials on one base, which trials of those need a process apart, and why."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from tuner.spec.space import Choice, Distribution
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import TrialConfig

# Any other value than those given means that a trial is more than low-rank products beside frozen linear layers, that
# its loss is not the mean negative log-likelihood that all slots are computed with, that its optimizer sees more than
# one number at a time, or that it would change what its neighbours compute.
_NEEDED: dict[str, tuple[tuple[Any, ...], str]] = {
    "lora.use_dora": ((False,), "DoRA rescales the base's own columns"),
    "lora.init_lora_weights": ((True, False, "gaussian", "orthogonal"), "this init is a variant of LoRA"),
    "lora.modules_to_save": ((None, []), "modules_to_save trains whole modules of the base"),
    "lora.trainable_token_indices": ((None, [], {}), "trainable_token_indices trains rows of the embedding"),
    "lora.target_parameters": ((None, []), "target_parameters adapts what is no linear layer"),
    "lora.bias": (("none",), "lora.bias trains the base's biases"),
    "lora.fan_in_fan_out": ((False,), "fan_in_fan_out layers store their weights transposed"),
    "model.dtype": (("float32", "bfloat16"), "float16 scales each trial's loss by itself"),
    "train.optim": (
        ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"),
        "the optimizer is not elementwise",
    ),
    "train.loss_type": (("nll",), "the joint loss is nll"),
    "train.label_smoothing_factor": ((0, 0.0), "the joint loss is not smoothed"),
    "train.torch_compile": ((False,), "the joint step is not compiled"),
    "train.torch_compile_backend": ((None,), "the joint step is not compiled"),
    "train.torch_compile_mode": ((None,), "the joint step is not compiled"),
    "train.use_liger_kernel": ((False,), "the joint step has its own head"),
    "train.activation_offloading": ((False,), "the joint step keeps its activations"),
    "train.gradient_checkpointing_kwargs": ((None, {}), "the joint step checkpoints whole layers"),
    "train.activation_checkpointing_kwargs": ((None, {}), "the joint step checkpoints whole layers"),
    "train.full_determinism": ((False,), "full_determinism changes the whole process"),
}
_OF_A_PROCESS = {"train.tf32": "tf32 is switched for a whole process"}
"""Keys that may have any one value, but not several."""


def most_to_learn_from(spec: SweepSpec) -> int:
    """Trials at once that leave the search something to learn: a third of a search that learns from its trials."""
    proposes = spec.search.sampler not in ("random", "grid", "qmc") and len(spec.search.enqueue) < spec.budget.trials
    learns = proposes or spec.stopping.type != "none"
    return math.ceil(spec.budget.trials / 3) if learns else spec.budget.trials


def most_at_once(spec: SweepSpec) -> int:
    """Trials at once on all shared bases together: what is asked for of each, or what the search learns from."""
    return spec.budget.trials if isinstance(spec.resources.share_base, int) else most_to_learn_from(spec)


def why_not_shared(spec: SweepSpec) -> list[str]:
    """Reasons why every trial of a sweep needs a model of its own; empty when trials can share one base."""
    return list(_of_all_trials(spec))


def _of_all_trials(spec: SweepSpec) -> Iterator[str]:
    if spec.resources.share_base == "off":
        yield "resources.share_base is off"
    if spec.resources.memory_per_worker is not None:
        yield "resources.memory_per_worker bounds each trial's own process"
    if spec.lora is None:
        yield "full fine-tuning changes every weight of the base"
    if spec.resources.workers_per_trial > 1:
        yield f"a trial has {spec.resources.workers_per_trial} workers"
    elif spec.resources.on_ray_train:
        yield f"resources.strategy is {spec.resources.strategy}"
    for key in spec.space:
        if key.startswith("model."):
            yield f"{key} is searched: the trials have different bases"
    sections = {"model": spec.model.model_dump(), "train": spec.train, "lora": spec.lora or {}}
    for key, (allowed, reason) in _NEEDED.items():
        searched = spec.space.get(key)
        if searched is None:
            refused = _value(sections, key, allowed[0]) not in allowed
        else:
            refused = searched.when is None and not any(value in allowed for value in _values(searched))
        if refused:
            yield f"{key}: {reason}"


def why_apart(config: TrialConfig) -> list[str]:
    """Reasons why a trial of a sweep that shares its base needs a process apart; empty for a slot."""
    reasons = [
        f"{key}: {reason}"
        for key, (allowed, reason) in _NEEDED.items()
        if _value(config, key, allowed[0]) not in allowed
    ]
    return reasons + [f"{key}: {reason}" for key, reason in _OF_A_PROCESS.items() if config["point"].get(key)]


def trials_apart(spec: SweepSpec) -> list[str]:
    """Which trials of a sweep that shares its base train apart, and why: a sentence for each searched key."""
    sentences = []
    for key, searched in spec.space.items():
        allowed, reason = _NEEDED.get(key, ((None, False), _OF_A_PROCESS.get(key)))
        refused = [json.dumps(value).strip('"') for value in _values(searched) if value not in allowed]
        if reason and refused:
            which = " or ".join(refused) if isinstance(searched, Choice) else f"{searched.low:g} to {searched.high:g}"
            sentences.append(f"trials with {key} {which} train apart: {reason}")
    return sentences


def _value(sections: Mapping[str, Any], key: str, default: Any) -> Any:
    section, field = key.split(".", 1)
    return (sections[section] or {}).get(field, default)


def _values(distribution: Distribution) -> list[Any]:
    """The values of a choice, or the ends of a range."""
    return list(distribution.values) if isinstance(distribution, Choice) else [distribution.low, distribution.high]
