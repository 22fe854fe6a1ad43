"""The conditions of `--where`: a small language of its own, parsed and compared, never evaluated."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

from tuner.errors import Problem, SpecError
from tuner.spec.checks.words import nearest
from tuner.spec.text import read_scalar

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(
    r"""\s*(?P<key>[A-Za-z_][\w.]*)\s*(?P<op>==|!=|<=|>=|<|>)\s*("(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>[^\s"'=<>!]+))\s*"""
)
_AND = re.compile(r"and(?=\s|$)")


def parse_where(text: str, keys: set[str]) -> list[tuple[str, str, Any]]:
    """The conditions of a `--where` as (key, operator, value); nothing is ever evaluated. Raises `SpecError`."""
    conditions = []
    position = 0
    while True:
        match = _CONDITION.match(text, position)
        if not match:
            raise _wrong(
                "--where",
                text[position:].strip() or "nothing",
                "KEY OP VALUE, joined by `and`, OP one of == != < <= > >=",
            )
        value = read_scalar(match["bare"]) if match["bare"] is not None else match["double"] or match["single"] or ""
        conditions.append((known_key(match["key"], keys, "--where"), match["op"], value))
        position = match.end()
        if position == len(text):
            return conditions
        joint = _AND.match(text, position)
        if not joint:
            raise _wrong("--where", text[position:], "`and` between two conditions")
        position = joint.end()


def holds(actual: Any, op: str, wanted: Any, key: str) -> bool:
    if op in ("==", "!="):
        same = kind(actual) == kind(wanted) and actual == wanted
        return same == (op == "==")
    if actual is None:
        return False
    if kind(actual) != kind(wanted) or kind(actual) == "truth value":
        raise _wrong("--where", f"{key} {op} {wanted!r}", f"a {kind(actual)} to compare {key} with")
    return _OPERATORS[op](actual, wanted)


def kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "truth value"
    return "number" if isinstance(value, int | float) else "text"


def known_key(key: str, keys: set[str], source: str) -> str:
    if key not in keys:
        raise SpecError([Problem(source, key, ", ".join(sorted(keys)), nearest(key, keys))], "query")
    return key


def _wrong(key: str, got: str, allowed: str) -> SpecError:
    return SpecError([Problem(key, got, allowed)], "query")
