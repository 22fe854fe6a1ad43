"""What an option needs beside the packages that come along: one more package, or a GPU. Nothing is imported here."""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from tuner.errors import Problem
from tuner.spec.checks.fields import place_of, possible_values
from tuner.spec.checks.words import any_of, show
from tuner.spec.sweep import ResourcesSpec, SweepSpec

GPU_DEVICES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")
"""Of NVIDIA's driver, AMD's, and either under WSL."""
# Module -> what pip is to install.
_PACKAGES = {
    "apollo_torch": "apollo-torch",
    "flash_attn": "flash-attn",
    "galore_torch": "galore-torch",
    "gguf": "gguf",
    "grokadamw": "grokadamw",
    "kernels": "kernels",
    "liger_kernel": "liger-kernel",
    "lomo_optim": "lomo-optim",
    "optimi": "torch-optimi",
    "schedulefree": "schedulefree",
    "torch_npu": "torch-npu",
    "torch_xla": "torch-xla",
    "torchao": "torchao",
    "torchdistx": "git+https://github.com/pytorch/torchdistx",
}
_OF_OPTIMIZER = {
    "adalomo": "lomo_optim",
    "adamw_anyprecision": "torchdistx",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_torch_xla": "torch_xla",
    "apollo_": "apollo_torch",
    "galore_": "galore_torch",
    "grokadamw": "grokadamw",
    "lomo": "lomo_optim",
    "schedule_free_": "schedulefree",
    "stable_adamw": "optimi",
}
"""How an optimizer's name begins -> the module that it is in."""

_OPTIMIZERS_FOR_GPUS = ("adalomo", "galore_adamw_8bit", "galore_adamw_8bit_layerwise")
"""Those that call CUDA whatever device the weights are on."""
_FOR_GPUS = {
    "train.use_liger_kernel": "takes kernels that are written for GPUs",
    "train.activation_offloading": "moves activations off a GPU",
    "train.tf32": "is a number format of GPUs",
}


def check_needs(spec: SweepSpec) -> list[Problem]:
    """Find every option whose package is not installed, or which takes a GPU where trials have none."""
    found = []
    for key, value, reason in [] if _has_gpus(spec.resources) else _for_gpus(spec):
        allowed = f"others: it {reason}, and no trial has one here"
        found.append(Problem(place_of(spec, key), show(value), allowed))
    for key, value, modules in _needed(spec):
        if not any(importlib.util.find_spec(module) for module in modules):
            packages = any_of([f"pip install {_PACKAGES[module]}" for module in modules])
            found.append(Problem(place_of(spec, key), show(value), f"a package that is installed ({packages})"))
    return found


def _needed(spec: SweepSpec) -> Iterator[tuple[str, Any, list[str]]]:
    """Key, value, and the modules of which it needs one."""
    if spec.model.gguf_file is not None:
        yield "model.gguf_file", spec.model.gguf_file, ["gguf"]
    for value in possible_values(spec, "model.attn_implementation"):
        if value == "flash_attention_2":
            yield "model.attn_implementation", value, ["flash_attn", "kernels"]
    for value in possible_values(spec, "train.optim"):
        for name, module in _OF_OPTIMIZER.items():
            if str(value).startswith(name):
                yield "train.optim", value, [module]
    if True in possible_values(spec, "train.use_liger_kernel"):
        yield "train.use_liger_kernel", True, ["liger_kernel"]


def check_foreign_code(spec: SweepSpec) -> list[Problem]:
    """Find an attention that is code to be taken from the hub, where none is trusted."""
    allowed = "one of transformers' own; code from the hub only beside model.trust_remote_code: true"
    return [
        Problem(place_of(spec, "model.attn_implementation"), show(value), allowed)
        for value in possible_values(spec, "model.attn_implementation")
        if "/" in str(value) and not spec.model.trust_remote_code
    ]


def why_gpu(spec: SweepSpec) -> list[str]:
    """Options that workers without a GPU cannot follow, or would silently leave out; empty for most specs."""
    return [f"{key}{'' if value is True else f' {value}'} {reason}" for key, value, reason in _for_gpus(spec)]


def _for_gpus(spec: SweepSpec) -> Iterator[tuple[str, Any, str]]:
    """Key, value, and why it takes a GPU."""
    for value in possible_values(spec, "train.optim"):
        if str(value).startswith("paged_"):
            yield "train.optim", value, "keeps its state in memory that a GPU and its host share"
        elif value in _OPTIMIZERS_FOR_GPUS:
            yield "train.optim", value, "is written for GPUs"
    for value in possible_values(spec, "model.attn_implementation"):
        if str(value).startswith("flash"):
            yield "model.attn_implementation", value, "is written for GPUs"
    for key, reason in _FOR_GPUS.items():
        if True in possible_values(spec, key):
            yield key, True, reason


def _has_gpus(resources: ResourcesSpec) -> bool:
    """Whether trials may have GPUs: as asked for or, where that is not said, if this machine has one.

    Devices are looked for as files: no library that knows them is light. A cluster may have others.
    """
    if resources.gpus_per_worker is not None:
        return resources.gpus_per_worker > 0
    if "RAY_ADDRESS" in os.environ:
        return True
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    return not hidden and any(glob.glob(device) for device in GPU_DEVICES)
