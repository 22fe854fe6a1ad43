"""The fields of trl.SFTConfig and peft.LoraConfig as of the pinned versions, from a snapshot that loads neither."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tuner.spec.checks.words import any_of, as_number, nearest
from tuner.spec.policy import REFUSED_VALUES
from tuner.spec.sweep import PACKINGS

SNAPSHOT = Path(__file__).with_name("fields.json")

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "null": "null",
    "dict": "keys and values",
    "list": "a list",
    "list[int]": "a list of whole numbers",
    "list[str]": "a list of texts",
}


@dataclass(frozen=True)
class Interval:
    """The numbers a field makes sense for."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low or (value == self.low and not self.low_open)
        return above and (value < self.high or (value == self.high and not self.high_open))

    def __str__(self) -> str:
        low = f"{'above' if self.low_open else 'at least'} {self.low}" if self.low > -math.inf else ""
        high = f"{'below' if self.high_open else 'at most'} {self.high}" if self.high < math.inf else ""
        return " and ".join(part for part in (low, high) if part)


POSITIVE = Interval(0, low_open=True)
AT_LEAST_0 = Interval(0)
AT_LEAST_1 = Interval(1)
SHARE = Interval(0, 1, high_open=True)
INTERVALS = {
    "train.per_device_train_batch_size": AT_LEAST_1,
    "train.per_device_eval_batch_size": AT_LEAST_1,
    "train.gradient_accumulation_steps": AT_LEAST_1,
    "train.max_length": AT_LEAST_1,
    "train.learning_rate": POSITIVE,
    "train.warmup_steps": AT_LEAST_0,
    "train.weight_decay": AT_LEAST_0,
    "train.adam_beta1": SHARE,
    "train.adam_beta2": SHARE,
    "train.adam_epsilon": POSITIVE,
    "train.max_grad_norm": AT_LEAST_0,
    "train.label_smoothing_factor": SHARE,
    "train.neftune_noise_alpha": POSITIVE,
    "train.torch_empty_cache_steps": AT_LEAST_1,
    "train.dataloader_num_workers": AT_LEAST_0,
    "train.dataloader_prefetch_factor": AT_LEAST_1,
    "train.pad_to_multiple_of": AT_LEAST_1,
    "train.seed": Interval(0, 2**32 - 1),
    "train.data_seed": Interval(0, 2**32 - 1),
    "train.router_aux_loss_coef": AT_LEAST_0,
    "train.ddp_bucket_cap_mb": AT_LEAST_1,
    "train.ddp_timeout": AT_LEAST_1,
    "lora.r": AT_LEAST_1,
    "lora.lora_alpha": POSITIVE,
    "lora.alpha_ratio": POSITIVE,
    "lora.lora_dropout": SHARE,
}


@dataclass(frozen=True)
class Field:
    """One field that a spec may fix or search."""

    key: str
    """Dotted, such as `train.learning_rate`."""
    types: tuple[str, ...]
    choices: tuple[str, ...] = ()
    default: Any = None
    help: str = ""

    @property
    def interval(self) -> Interval | None:
        return INTERVALS.get(self.key)

    @property
    def is_number(self) -> bool:
        return "int" in self.types or "float" in self.types

    @property
    def is_whole(self) -> bool:
        return "int" in self.types and "float" not in self.types

    @property
    def is_scalar(self) -> bool:
        """Whether a choice of the space can hold a value of it."""
        return bool({"bool", "int", "float", "str"} & set(self.types))

    def accepts(self, value: Any) -> bool:
        """Whether the library takes this value, as far as its type, choices and range say."""
        return any(self._fits(value, name) for name in self.types)

    def _fits(self, value: Any, name: str) -> bool:
        match value:
            case None:
                return name == "null"
            case bool():
                return name == "bool"
            case int() | float():
                whole = isinstance(value, int)
                return (name == "float" or (name == "int" and whole)) and self._in_range(value)
            case str():
                return name == "str" and (not self.choices or value in self.choices)
            case dict():
                return name == "dict"
            case list():
                member = {"list[int]": int, "list[str]": str}.get(name)
                return name.startswith("list") and all(member is None or type(part) is member for part in value)
        return False

    def _in_range(self, value: float) -> bool:
        return math.isfinite(value) and (self.interval is None or value in self.interval)

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        words: list[str] = []
        for name in ("bool", "int", "float", "str", "list", "list[int]", "list[str]", "dict", "null"):
            if name not in self.types or (name == "int" and "float" in self.types):
                continue
            if name == "bool":
                words += ["true", "false"]
            elif name == "str" and self.choices:
                words += self.choices
            elif name in ("int", "float") and self.interval is not None:
                words.append(f"{_WORDS[name]} {self.interval}")
            else:
                words.append(_WORDS[name])
        return any_of(words)

    def nearest(self, value: Any) -> str | None:
        """The value that was probably meant, as it should have been written."""
        if self.is_number and (number := as_number(value, self.is_whole)) is not None:
            return number if self._in_range(float(number)) else None
        if "bool" in self.types and str(value).lower() in ("yes", "on", "no", "off"):
            return "true" if str(value).lower() in ("yes", "on") else "false"
        return nearest(value, self.choices) if isinstance(value, str) else None


@cache
def all_fields() -> dict[str, Field]:
    """Every field of the snapshot by dotted key, `alpha_ratio` added, `packing` as the spec spells it.

    The choices are those that the service takes as well.
    """
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    fields = {}
    for section in ("train", "lora"):
        for name, told in snapshot[section].items():
            key = f"{section}.{name}"
            choices = tuple(choice for choice in told["choices"] if (key, choice) not in REFUSED_VALUES)
            fields[key] = Field(key, tuple(told["types"]), choices, told["default"], told["help"])
    fields["train.packing"] = Field(
        "train.packing",
        ("str",),
        PACKINGS,
        "none",
        "How sequences are packed into rows of max_length; none: not at all",
    )
    fields["lora.alpha_ratio"] = Field("lora.alpha_ratio", ("float",), (), None, "lora_alpha as a multiple of r")
    # PEFT annotates an int and takes any number; without targets the service takes every linear layer.
    fields["lora.lora_alpha"] = replace(fields["lora.lora_alpha"], types=("float",))
    fields["lora.target_modules"] = replace(fields["lora.target_modules"], default="all-linear")
    return fields


def checkpoints_activations(train: Mapping[str, Any]) -> bool:
    """Whether a trainer with these fields computes activations again, under either name; TRL's default is to do so."""
    new = train.get("activation_checkpointing")
    return bool(train.get("gradient_checkpointing", True) if new is None else new)
