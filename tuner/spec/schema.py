"""The JSON Schema of a sweep's YAML, which editors complete and check against.

`python -m tuner.spec.schema` rewrites sweep.schema.json; a test fails when it no longer fits the models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tuner.spec.checks.fields import searchable_fields
from tuner.spec.fields import Field, all_fields
from tuner.spec.policy import FIXED_ONLY, USER
from tuner.spec.sweep import SweepSpec

SCHEMA = Path(__file__).with_name("sweep.schema.json")

_TYPES: dict[str, dict[str, Any]] = {
    "bool": {"type": "boolean"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "str": {"type": "string"},
    "null": {"type": "null"},
    "dict": {"type": "object"},
    "list": {"type": "array"},
    "list[int]": {"type": "array", "items": {"type": "integer"}},
    "list[str]": {"type": "array", "items": {"type": "string"}},
}


def make_schema() -> dict[str, Any]:
    """Return the schema of a sweep, the fields of `train`, `lora` and `space` taken from the pinned libraries."""
    schema = SweepSpec.model_json_schema()
    sections = schema["properties"]
    sections["train"] |= _object(
        {key: _of_field(all_fields()[key]) for key in sorted(USER) if key.startswith("train.")}
    )
    lora = _object({key: _of_field(all_fields()[key]) for key in sorted(USER) if key.startswith("lora.")})
    sections["lora"]["anyOf"] = [lora, {"type": "null"}]
    distribution = sections["space"].pop("additionalProperties")
    schema["$defs"]["Distribution"] = distribution
    keys = [key for key, field in sorted(searchable_fields().items()) if key not in FIXED_ONLY and field.is_scalar]
    sections["space"] |= {
        "properties": {key: {"$ref": "#/$defs/Distribution"} for key in keys},
        "additionalProperties": False,
    }
    budget = schema["$defs"]["BudgetSpec"]["properties"]
    budget["time_limit"]["anyOf"].append({"type": "string", "pattern": r"^(\d+(\.\d+)?[smhd])+$"})
    budget["disk"]["anyOf"].append({"type": "string", "pattern": r"^\d+(\.\d+)?\s*[MGT]B$"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def write_schema(schema: dict[str, Any]) -> str:
    """Return the text of sweep.schema.json."""
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _object(fields: dict[str, dict[str, Any]]) -> dict[str, Any]:
    properties = {key.split(".", 1)[1]: schema for key, schema in fields.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _of_field(field: Field) -> dict[str, Any]:
    options = [dict(_TYPES[name]) for name in field.types if not (name == "int" and "float" in field.types)]
    for option in options:
        if option == _TYPES["str"] and field.choices:
            option["enum"] = list(field.choices)
        if option in (_TYPES["int"], _TYPES["float"]) and field.interval:
            option |= _of_interval(field)
    schema = options[0] if len(options) == 1 else {"anyOf": options}
    return {**schema, "default": field.default, "description": field.help}


def _of_interval(field: Field) -> dict[str, Any]:
    interval = field.interval
    bounds = {}
    if interval and interval.low > float("-inf"):
        bounds["exclusiveMinimum" if interval.low_open else "minimum"] = interval.low
    if interval and interval.high < float("inf"):
        bounds["exclusiveMaximum" if interval.high_open else "maximum"] = interval.high
    return bounds


if __name__ == "__main__":
    SCHEMA.write_text(write_schema(make_schema()), encoding="utf-8")
