"""Writes down the fields of the pinned trl.SFTConfig and peft.LoraConfig, so that checking a spec loads neither.

`python -m tuner.spec.snapshot` rewrites fields.json; a test fails when it no longer fits the installed libraries.
"""

from __future__ import annotations

import enum
import json
import re
import types
import typing
from dataclasses import MISSING, fields
from importlib.metadata import version
from typing import Any

from tuner.spec.fields import SNAPSHOT

_SCALARS = {bool: "bool", int: "int", float: "float", str: "str", types.NoneType: "null"}

CHOICES_IN_PROSE = {
    "pad_to_multiple_of": ["auto"],
    "loss_type": ["nll", "dft"],
    "truncation_mode": ["keep_start", "keep_end"],
    "train_sampling_strategy": ["random", "sequential", "group_by_length"],
}
"""Choices that the libraries give only in their help texts, deprecated ones left out."""


def take_snapshot() -> dict[str, Any]:
    """Return {"versions", "train", "lora"}; a field has types, choices, default and the first sentence of its help."""
    from peft import LoraConfig
    from trl import SFTConfig

    return {
        "versions": {name: version(name) for name in ("trl", "transformers", "peft")},
        "train": _fields_of(SFTConfig),
        "lora": _fields_of(LoraConfig),
    }


def write_snapshot(snapshot: dict[str, Any]) -> str:
    """Return the text of fields.json."""
    return json.dumps(snapshot, indent=1, ensure_ascii=False) + "\n"


def _fields_of(config: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    described = {}
    for field in sorted(fields(config), key=lambda field: field.name):
        names, choices = _reduce(hints[field.name])
        described[field.name] = {
            "types": sorted(names),
            "choices": CHOICES_IN_PROSE.get(field.name, choices),
            "default": _plain(field.default_factory() if field.default_factory is not MISSING else field.default),
            "help": _first_sentence(field.metadata.get("help", "")),
        }
    return described


def _reduce(hint: Any) -> tuple[set[str], list[str]]:
    """Names of the types that YAML can express, and the choices of the text among them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SCALARS:
        return {_SCALARS[hint]}, []
    if origin is typing.Literal:
        texts = [value for value in arguments if isinstance(value, str)]
        return {_SCALARS[type(value)] for value in arguments}, texts
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"str"}, [member.value for member in hint]
    if origin is list:
        inner = arguments[0]
        return {f"list[{_SCALARS[inner]}]" if inner in _SCALARS else "list"}, []
    if origin in (typing.Union, types.UnionType):
        parts = [_reduce(argument) for argument in arguments]
        return set().union(*(names for names, _ in parts)), [choice for _, choices in parts for choice in choices]
    return {"dict"}, []


def _plain(default: Any) -> Any:
    if default is MISSING:
        return None
    if isinstance(default, enum.Enum):
        return default.value
    return default if isinstance(default, bool | int | float | str | list | dict | None) else {}


def _first_sentence(text: str) -> str:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", text)).strip()
    return re.split(r"(?<=[a-z)\]'`])\.\s", text)[0].removesuffix(".")


if __name__ == "__main__":
    SNAPSHOT.write_text(write_snapshot(take_snapshot()), encoding="utf-8")
