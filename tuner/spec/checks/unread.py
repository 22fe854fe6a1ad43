"""What a spec says that nothing would read: refused where it would change a result, else said to have no effect."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from tuner.errors import Problem
from tuner.spec.checks.paths import PACKAGE
from tuner.spec.checks.words import show
from tuner.spec.fields import all_fields
from tuner.spec.sharing import why_not_shared
from tuner.spec.sweep import DataSpec, Section, SweepSpec

_OF_SEVERAL = (
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    "ddp_timeout",
)
"""Fields of `train` that only a trial of several workers reads; all but the last are DDP's alone."""
_OF_LOADER = (
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_in_order"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "torch_empty_cache_steps"),
)
"""Fields of `train` that a trial on a shared base does not read: its rows lie ready, and the device is not its own."""
_REDUCES = ("asha", "hyperband")
_LEARNS = ("tpe", "cmaes", "gp")


def check_unread(spec: SweepSpec) -> list[Problem]:
    """Find every key whose value would be left out, though a user counts on it."""
    return [*_of_data(spec.data), *_of_model(spec), *_of_resources(spec)]


def _of_data(data: DataSpec) -> Iterator[Problem]:
    of_hub = ["name", "revision"]
    if os.path.isfile(data.path):
        yield from _refused(data, "data", ["split", *of_hub], "data.path is a file")
    elif os.path.isdir(data.path):
        yield from _refused(data, "data", of_hub, "data.path is a folder")
    if data.eval_path is not None:
        yield from _refused(data, "data", ["eval_fraction"], "data.eval_path holds what is evaluated")
    if data.template is not None and data.format not in ("auto", "text"):
        yield Problem("data.format", show(data.format), "auto or text, since data.template makes text", "text")


def _of_model(spec: SweepSpec) -> Iterator[Problem]:
    name = spec.model.name
    if name.startswith(PACKAGE) or os.path.isdir(name):
        where = "an installed package" if name.startswith(PACKAGE) else "a folder"
        yield from _refused(spec.model, "model", ["revision"], f"model.name is {where}")
    quantized = spec.model.quantization != "none" or "model.quantization" in spec.space
    if spec.promotion is not None and not quantized:
        yield from _refused(spec.promotion, "promotion", ["merge_into"], "model.quantization is none")


def _of_resources(spec: SweepSpec) -> Iterator[Problem]:
    resources = spec.resources
    apart = why_not_shared(spec)
    if isinstance(resources.share_base, int) and apart:
        yield Problem("resources.share_base", show(resources.share_base), f"auto or off, since {apart[0]}", "off")
    if spec.budget.gpu_hours is not None and resources.gpus_per_worker == 0:
        allowed = "null, since resources.gpus_per_worker is 0: no trial holds a GPU"
        yield Problem("budget.gpu_hours", show(spec.budget.gpu_hours), allowed)


def _refused(section: Section, at: str, names: list[str], reason: str) -> Iterator[Problem]:
    for name in names:
        default, value = type(section).model_fields[name].default, getattr(section, name)
        if value != default:
            allowed = f"{show(default)} or nothing, since {reason}"
            yield Problem(f"{at}.{name}", show(value), allowed)


def without_effect(spec: SweepSpec) -> list[str]:
    """What may stand in the spec, for the day that another setting gives it a meaning, and has none now.

    Each is a sentence that begins with the key.
    """
    stopping, search, workers = spec.stopping, spec.search, spec.resources.workers_per_trial
    said: list[tuple[str, str]] = []
    if stopping.type not in _REDUCES and stopping.reduction_factor != _default(stopping, "reduction_factor"):
        said.append(("stopping.reduction_factor", f"stopping.type is {stopping.type}"))
    if stopping.type == "none" and stopping.grace_evals > _default(stopping, "grace_evals"):
        said.append(("stopping.grace_evals", "stopping.type is none"))
    if search.sampler not in _LEARNS and search.startup_trials > _default(search, "startup_trials"):
        said.append(("search.startup_trials", f"search.sampler is {search.sampler}"))
    shared = not why_not_shared(spec)
    if shared and spec.model.attn_implementation not in (None, "sdpa"):
        said.append(
            ("model.attn_implementation", "the trials share a base, whose joint step has an attention of its own")
        )
    for name, value in spec.train.items():
        if value == all_fields()[f"train.{name}"].default:
            continue
        if name in _OF_SEVERAL and workers == 1:
            said.append((f"train.{name}", "a trial has one worker"))
        elif name in _OF_SEVERAL[:-1] and spec.resources.strategy not in ("auto", "ddp"):
            said.append((f"train.{name}", f"resources.strategy is {spec.resources.strategy}"))
        elif name in _OF_LOADER and shared:
            said.append((f"train.{name}", "the trials share a base, whose rows need no loader"))
    return [f"{key} has no effect: {reason}" for key, reason in said]


def _default(section: Section, name: str) -> Any:
    return type(section).model_fields[name].default
