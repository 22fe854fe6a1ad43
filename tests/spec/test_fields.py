"""The snapshot of the libraries' fields, and the schema and reference made from it: complete, and not stale."""

from __future__ import annotations

import json

from tuner.spec.checks.fields import searchable_fields
from tuner.spec.fields import INTERVALS, SNAPSHOT, all_fields
from tuner.spec.policy import FIXED_ONLY, OWNED, REFUSED_VALUES, USER
from tuner.spec.reference import spec_reference
from tuner.spec.schema import SCHEMA, make_schema, write_schema
from tuner.spec.snapshot import take_snapshot, write_snapshot
from tuner.spec.sweep import SweepSpec


def test_the_snapshot_fits_the_installed_libraries():
    assert SNAPSHOT.read_text() == write_snapshot(take_snapshot()), "run: python -m tuner.spec.snapshot"


def test_the_schema_fits_the_models():
    assert SCHEMA.read_text() == write_schema(make_schema()), "run: python -m tuner.spec.schema"


def test_every_field_is_either_the_users_or_the_services():
    assert set(all_fields()) == USER | set(OWNED)
    assert not USER & set(OWNED)


def test_the_policy_names_no_field_that_is_not_there():
    assert set(FIXED_ONLY) <= USER
    assert set(INTERVALS) <= USER
    assert {key for key, _ in REFUSED_VALUES} <= USER


def test_every_default_of_the_libraries_is_a_value_that_the_check_accepts():
    wrong = [
        key for key in USER if key != "lora.alpha_ratio" and not all_fields()[key].accepts(all_fields()[key].default)
    ]
    assert wrong == []


def test_types_ranges_and_choices_are_held():
    fields = searchable_fields()
    assert fields["train.learning_rate"].accepts(1)
    assert not fields["train.learning_rate"].accepts(True)
    assert not fields["train.learning_rate"].accepts(0)
    assert not fields["lora.r"].accepts(8.0)
    assert fields["lora.target_modules"].accepts(["q_proj"])
    assert not fields["lora.target_modules"].accepts([1])
    assert fields["train.max_length"].accepts(None)
    assert not fields["lora.bias"].accepts("some")
    assert not fields["model.dtype"].accepts("float8")


def test_the_schema_takes_the_shipped_words_and_refuses_others():
    import jsonschema

    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    good = {
        "name": "a",
        "model": {"name": "m"},
        "data": {"path": "d"},
        "train": {"packing": "bfd", "learning_rate": 1e-4},
        "lora": None,
        "space": {"train.learning_rate": {"type": "uniform", "low": 0.1, "high": 0.2}},
        "budget": {"trials": 1, "tokens_per_trial": 1, "time_limit": "1h30m"},
    }
    assert list(validator.iter_errors(good)) == []
    for section, value in [
        ("train", {"packing": True}),
        ("train", {"output_dir": "x"}),
        ("lora", {"r": 0}),
        ("space", {"train.eos_token": {"type": "choice", "values": ["a", "b"]}}),
        ("budget", {"trials": 1, "time_limit": "soon"}),
    ]:
        assert list(validator.iter_errors({**good, section: value})), (section, value)


def test_the_reference_names_every_key_of_every_section():
    text = spec_reference()
    for section in SweepSpec.model_fields:
        assert f"`{section}`" in text
    for key in USER:
        assert f"| `{key.split('.')[1]}` |" in text
