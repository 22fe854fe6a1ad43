"""YAML 1.2 in and out, safely: no tags, no duplicate keys, no alias bombs, numbers as people write them."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError, YAMLStreamError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from tuner.errors import Problem, SpecError

MAX_VALUES = 20_000
MAX_DEPTH = 40

_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}
_CONSTANTS |= {"Null": None, "NULL": None, "True": True, "TRUE": True, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(r"[-+]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def read_scalar(text: str) -> bool | int | float | str | None:
    """Return what an unquoted YAML 1.2 scalar stands for; `1e-5` and `2_000_000` are numbers, `no` is text."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        return int(text) if len(text) <= 20 else text  # longer ones fit no integer field anywhere
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return math.nan if text.lower() == ".nan" else float(text.replace(".", ""))
    return text


class _Reader:
    """Builds plain values from YAML events, and stops at whatever a spec has no use for."""

    def __init__(self, text: str, source: str):
        self.source = source
        self.events: Iterator[Event] = YAML(typ="safe", pure=True).parse(io.StringIO(text))
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.count = 0

    def document(self) -> Any:
        value, documents = None, 0
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.error(event, "a second document", "one YAML document")
                value = self.value(next(self.events), 0)
        return value

    def value(self, event: Event, depth: int) -> Any:
        if isinstance(event, AliasEvent):
            if event.anchor not in self.anchors:
                raise self.error(event, f"*{event.anchor}", "an alias of a value that stands complete above it")
            value, size = self.anchors[event.anchor]
            self.grow(event, size)
            return value
        if depth > MAX_DEPTH:
            raise self.error(event, f"values nested over {MAX_DEPTH} deep", "a flatter spec")
        if tag := getattr(event, "tag", None):
            raise self.error(event, f"the tag {tag}", "values without tags")
        before = self.count
        self.grow(event, 1)
        if isinstance(event, ScalarEvent):
            if _HALF_CHARACTER.search(event.value):
                raise self.error(event, "half a character", "whole Unicode characters")
            value = read_scalar(event.value) if event.style is None else event.value
        elif isinstance(event, SequenceStartEvent):
            value = self.sequence(depth)
        else:
            value = self.mapping(depth)
        if anchor := getattr(event, "anchor", None):
            self.anchors[anchor] = (value, self.count - before)
        return value

    def sequence(self, depth: int) -> list[Any]:
        values = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            values.append(self.value(event, depth + 1))
        return values

    def mapping(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            if isinstance(event, CollectionStartEvent):
                raise self.error(event, "a list or mapping as a key", "text as a key")
            key = self.value(event, depth + 1)
            if not isinstance(key, str):
                key = getattr(event, "value", key)
            if not isinstance(key, str):
                raise self.error(event, repr(key), "text as a key")
            if key in values:
                raise self.error(event, f"{key} twice", "each key once")
            values[key] = self.value(next(self.events), depth + 1)
        return values

    def grow(self, event: Event, size: int) -> None:
        self.count += size
        if self.count > MAX_VALUES:
            raise self.error(event, f"over {MAX_VALUES} values, aliases counted out", "a smaller spec")

    def error(self, event: Event, got: str, allowed: str) -> SpecError:
        mark = event.start_mark
        return SpecError([Problem(_place(mark.line, mark.column), got, allowed)], self.source)


def _place(line: int, column: int) -> str:
    return f"line {line + 1}, column {column + 1}"


def parse_yaml(text: str, source: str = "spec") -> Any:
    """Return the plain value of one YAML 1.2 document, or raise `SpecError` with the line and column."""
    try:
        return _Reader(text, source).document()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = _place(mark.line, mark.column) if mark else "YAML"
        raise SpecError([Problem(place, error.problem or "broken YAML", "YAML 1.2")], source) from error
    except (YAMLError, YAMLStreamError, ValueError, OverflowError) as error:
        raise SpecError([Problem("YAML", str(error).splitlines()[0], "YAML 1.2")], source) from error


def write_yaml(value: Mapping[str, Any]) -> str:
    """Return YAML that `parse_yaml` reads back as the same value."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.representer.add_representer(str, _represent_text)
    out = io.StringIO()
    yaml.dump(value, out)
    return out.getvalue()


def _represent_text(representer: Any, text: str) -> Any:
    plain = read_scalar(text) == text
    return representer.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')
