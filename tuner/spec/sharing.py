"""Which sweeps can train many trials on one base, and what stands in the way of the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tuner.spec.sweep import SweepSpec

# Any other value than those given means that a trial is more than low-rank products beside frozen linear layers, or
# that its loss is not the mean negative log-likelihood that all slots are computed with.
_NEEDED: dict[str, tuple[tuple[Any, ...], str]] = {
    "lora.use_dora": ((False,), "DoRA rescales the base's own columns"),
    "lora.modules_to_save": ((None, []), "modules_to_save trains whole modules of the base"),
    "lora.trainable_token_indices": ((None, [], {}), "trainable_token_indices trains rows of the embedding"),
    "lora.target_parameters": ((None, []), "target_parameters adapts what is no linear layer"),
    "lora.bias": (("none",), "lora.bias trains the base's biases"),
    "lora.fan_in_fan_out": ((False,), "fan_in_fan_out layers store their weights transposed"),
    "model.dtype": (("float32", "bfloat16"), "float16 scales each trial's loss by itself"),
    "train.loss_type": (("nll",), "the joint loss is nll"),
    "train.label_smoothing_factor": ((0, 0.0), "the joint loss is not smoothed"),
    "train.torch_compile": ((False,), "the joint step is not compiled"),
    "train.use_liger_kernel": ((False,), "the joint step has its own head"),
    "train.activation_offloading": ((False,), "the joint step keeps its activations"),
}


def why_not_shared(spec: SweepSpec) -> list[str]:
    """Reasons why the trials of a sweep each need their own model; empty when they can share one base."""
    return list(_reasons(spec))


def _reasons(spec: SweepSpec) -> Iterator[str]:
    if spec.resources.share_base == "off":
        yield "resources.share_base is off"
    if spec.lora is None:
        yield "full fine-tuning changes every weight of the base"
    if spec.resources.workers_per_trial > 1:
        yield f"a trial has {spec.resources.workers_per_trial} workers"
    for key in spec.space:
        if key.startswith("model."):
            yield f"{key} is searched: the trials have different bases"
    for key, (allowed, reason) in _NEEDED.items():
        if any(value not in allowed for value in _values(spec, key)):
            yield f"{key}: {reason}"


def _values(spec: SweepSpec, key: str) -> list[Any]:
    """Every value that trials may have for a key that the spec mentions."""
    distribution = spec.space.get(key)
    if distribution is not None:
        return list(distribution.values) if distribution.type == "choice" else [distribution.low, distribution.high]
    section, field = key.split(".", 1)
    values = getattr(spec, section)
    values = values.model_dump() if section == "model" else values or {}
    return [values[field]] if field in values else []
