"""The spec reference in the README, generated from the models so that it cannot lie.

`python -m tuner.spec.reference README.md` rewrites it there; a test fails when it no longer fits the models.
"""

from __future__ import annotations

import sys
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tuner.spec.checks.words import show
from tuner.spec.fields import all_fields
from tuner.spec.policy import FIXED_ONLY, USER
from tuner.spec.space import Choice, Int, LogUniform, Uniform
from tuner.spec.sweep import SweepSpec, section_of

_NAMES = {bool: "bool", int: "int", float: "number", str: "text", types.NoneType: "null", dict: "mapping", Any: "any"}


def spec_reference() -> str:
    """Return markdown: a table for every section, the distributions, and the fields of `train` and `lora`."""
    parts = [_of_model("The file", SweepSpec)]
    for name, field in SweepSpec.model_fields.items():
        section = section_of(field)
        if section is not None:
            parts.append(_of_model(f"`{name}`", section))
    parts.append(_SPACE)
    parts += [_of_model(f"`type: {kind}`", model) for kind, model in _distributions().items()]
    parts.append(_of_fields("train", "trl.SFTConfig"))
    parts.append(_of_fields("lora", "peft.LoraConfig"))
    return "\n\n".join(parts) + "\n"


_SPACE = """\
### `space`

A searched key is `train.FIELD`, `lora.FIELD`, `model.dtype`, `model.quantization` or `model.attn_implementation`. It is
either fixed in its section or searched here. `lora.alpha_ratio` stands for `lora_alpha / r`. With
`when: {train.packing: [bfd]}` a key is searched only where another choice has one of these values. Each key has a
distribution:"""


def _distributions() -> dict[str, type[BaseModel]]:
    return {"choice": Choice, "int": Int, "uniform": Uniform, "log_uniform": LogUniform}


def _of_model(title: str, model: type[BaseModel]) -> str:
    rows = [
        _row(f"`{name}`", _type(field), _default(field), _what(field)) for name, field in model.model_fields.items()
    ]
    return "\n".join([f"### {title}", "", _sentence(model), "", *_head("key", "type", "default", "what it is"), *rows])


def _of_fields(section: str, library: str) -> str:
    rows = []
    for key in sorted(key for key in USER if key.startswith(f"{section}.")):
        field = all_fields()[key]
        note = " Fixed only." if key in FIXED_ONLY else ""
        rows.append(_row(f"`{key.split('.')[1]}`", field.allowed, f"`{_plain(field.default)}`", f"{field.help}.{note}"))
    summary = f"{len(rows)} fields of `{library}` that a spec may fix or search; the service decides the others."
    table = "\n".join([*_head("key", "type", "default", "what it is"), *rows])
    return f"### `{section}`\n\n{summary}\n\n<details><summary>Show them</summary>\n\n{table}\n\n</details>"


def _head(*cells: str) -> list[str]:
    return [_row(*cells), _row(*("---" for _ in cells))]


def _row(*cells: str | None) -> str:
    return "| " + " | ".join((cell or "").replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _what(field: FieldInfo) -> str:
    section = section_of(field)
    return field.description or (_sentence(section) if section else "")


def _sentence(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().split("\n")[0]


def _type(field: FieldInfo) -> str:
    words = _of_hint(field.annotation)
    for bound, word in (("ge", "at least"), ("gt", "above"), ("lt", "below")):
        for limit in field.metadata:
            if hasattr(limit, bound):
                words += f" {word} {getattr(limit, bound)}"
    return words


def _of_hint(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        parsers = {"parse_duration": "duration", "parse_size": "size"}
        named = [name for parser, name in parsers.items() if any(parser in repr(part) for part in arguments[1:])]
        return named[0] if named else _of_hint(arguments[0])
    if origin in (typing.Union, types.UnionType):
        names = [_of_hint(argument) for argument in arguments]
        scalars = [name for name in names if name != "null"]
        return "scalar" if len(scalars) == 4 else " or ".join([*scalars, *(name for name in names if name == "null")])
    if origin is list:
        return f"list of {_of_hint(arguments[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return "section"
    return _NAMES.get(hint, str(hint))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "below" if isinstance(default, BaseModel) else f"`{_plain(default)}`"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) and value else show(value)


BEGIN, END = "<!-- made by `make readme` -->\n", "<!-- end of what `make readme` made -->"


def with_reference(page: str) -> str:
    """Return a page with the present reference between its markers."""
    return put_between(page, BEGIN, END, f"\n{spec_reference()}\n")


def put_between(page: str, begin: str, end: str, content: str) -> str:
    """Return a page with this content between two markers. Raises ValueError where they are not."""
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"no place for it: the page lacks {begin.strip()!r} or {end!r}")
    return f"{head}{begin}{content}{end}{tail}"


if __name__ == "__main__":
    (page,) = map(Path, sys.argv[1:])
    page.write_text(with_reference(page.read_text(encoding="utf-8")), encoding="utf-8")
