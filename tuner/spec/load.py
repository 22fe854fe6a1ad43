"""From a YAML file to a spec that is checked, resolved and absolute, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.errors import NotFoundError, Problem, SpecError
from tuner.spec.check import check_values
from tuner.spec.checks.words import nearest, show
from tuner.spec.sweep import SweepSpec
from tuner.spec.text import parse_yaml, write_yaml

MAX_BYTES = 1_000_000


def load_spec(
    path: str | Path, overrides: Sequence[str] = (), root: str | Path | None = None, elsewhere: bool = False
) -> SweepSpec:
    """Return the spec of a YAML file, `a.b=value` overrides laid over it, all paths absolute.

    With `elsewhere` it is for another machine, and no path need exist on this one.

    Raises `SpecError` with every problem, or `NotFoundError` where there is no such file.
    """
    spec, problems = check_file(path, overrides, root, elsewhere)
    if spec is None:
        raise SpecError(problems, str(path))
    return spec


def check_file(
    path: str | Path, overrides: Sequence[str] = (), root: str | Path | None = None, elsewhere: bool = False
) -> tuple[SweepSpec | None, list[Problem]]:
    """Return the spec and no problems, or None and every problem; raises `NotFoundError` where there is no file."""
    file = Path(path)
    try:
        values = parse_yaml(_read(file), str(path))
        values = apply_overrides(values, overrides) if overrides else values
    except SpecError as error:
        return None, error.problems
    return check_values(values, file.absolute().parent, str(root) if root else None, elsewhere)


def parse_spec(values: Mapping[str, Any], base: str | Path, root: str | Path | None = None) -> SweepSpec:
    """Return the spec of plain values; its paths start from the folder `base`. Raises `SpecError`."""
    spec, problems = check_values(values, Path(base).absolute(), str(root) if root else None)
    if spec is None:
        raise SpecError(problems)
    return spec


def parse_point(words: Sequence[str]) -> dict[str, Any]:
    """Return the point that `lora.r=16`, `train.packing=bfd`, ... stand for. Raises `SpecError`."""
    wrong = [
        Problem(word, show(word), "KEY=VALUE, such as lora.r=16") for word in words if not all(word.partition("=")[:2])
    ]
    if wrong:
        raise SpecError(wrong, "point")
    return {key: parse_yaml(text, key) for key, _, text in (word.partition("=") for word in words)}


def dump_spec(spec: SweepSpec) -> str:
    """Return the YAML that loads as this spec, with every default written out."""
    values = spec.model_dump()
    # A key stands in its section or in the space, never in both.
    values["model"] = {name: value for name, value in values["model"].items() if f"model.{name}" not in spec.space}
    values["space"] = {key: distribution.model_dump(exclude_none=True) for key, distribution in spec.space.items()}
    return write_yaml(values)


def _read(file: Path) -> str:
    if not file.is_file():
        siblings = [other.name for other in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        near = nearest(file.name, siblings)
        raise NotFoundError(f"no spec {file}" + (f"; did you mean {file.parent / near}?" if near else ""))
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise SpecError([Problem("the file", f"over {MAX_BYTES} bytes", "a spec of at most 1 MB")], str(file))
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise SpecError([Problem(f"line {line}", "bytes that are not UTF-8", "UTF-8 text")], str(file)) from error
    except OSError as error:
        raise NotFoundError(f"cannot read {file}: {error.strerror}") from error


def apply_overrides(values: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values with each `a.b=value` laid over them; null takes a key out of `space`.

    Raises `SpecError` for every override that is no `key=value` or reaches into what has no keys.
    """
    values = copy.deepcopy(values) if isinstance(values, dict) else {}
    problems: list[Problem] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        override = override if len(override) < 200 else f"{override[:100]}..."
        if not equals or not all(key.split(".")):
            problems.append(Problem(f"--set {override}", show(override), "key=value, such as budget.trials=4"))
            continue
        try:
            _put(values, key, parse_yaml(text, f"--set {override}"))
        except SpecError as error:
            problems += [Problem(f"--set {override}", found.got, found.allowed) for found in error.problems]
    if problems:
        raise SpecError(problems, "--set")
    return values


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; where keys hold dots themselves, as in `space`, the longest that is there wins."""
    section, rest, inside = values, key, ""
    while True:
        name = _first_key(section, rest, two=inside in ("space", "when"))
        rest = rest[len(name) + 1 :]
        if not rest:
            break
        if section.get(name) is None:
            section[name] = {}
        if not isinstance(section[name], dict):
            raise SpecError([Problem(key, f"{name} is {show(section[name])}", f"a key of a section; {name} has none")])
        section, inside = section[name], name
    if inside == "space" and value is None:
        section.pop(name, None)
    else:
        section[name] = value


def _first_key(section: Mapping[str, Any], dotted: str, two: bool) -> str:
    """The key of `section` that a dotted path starts with; a new key has two parts in `space`, else one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in section:
            return name
    return ".".join(parts[: 2 if two else 1])
