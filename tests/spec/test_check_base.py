"""What a base's own config.json says is held against the spec, without any library that could load the base."""

# ruff: noqa: E501 - a row of the table is a line, the message as the user reads it

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuner.spec.checks.base import learned_positions
from tuner.spec.load import check_values

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FP4 = {"load_in_4bit": True}
BYTES = {"bnb_4bit_quant_storage": "uint8"}


def said(tmp_path: Path, config: dict[str, Any], **sections: Any) -> list[str]:
    """What is said of a spec whose base has this config.json."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    values: dict[str, Any] = {
        "name": "stored",
        "data": {"path": "rows.jsonl"},
        "space": {"train.learning_rate": {"type": "log_uniform", "low": 1e-5, "high": 1e-3}},
        "budget": {"trials": 2, "tokens_per_trial": 2000},
        "storage": {"root": str(tmp_path / "runs")},
        **sections,
    }
    values["model"] = {"name": str(folder), **sections.get("model", {})}
    return [str(problem) for problem in check_values(values, tmp_path)[1]]


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (NF4, {"quantization": "nf4"}, []),
        (INT8, {"quantization": "int8"}, []),
        (None, {"quantization": "nf4"}, []),
        (NF4, {}, ["model.quantization: got 'none'; allowed: nf4, as the config.json of the base says; did you mean nf4?"]),
        (INT8, {"quantization": "nf4"}, ["model.quantization: got 'nf4'; allowed: int8, as the config.json of the base says; did you mean int8?"]),
        (FP4, {"quantization": "nf4"}, ["model.name: got '...'; allowed: a base with plain weights, or bitsandbytes' nf4 or int8"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("within", [None, "text_config"])
def test_a_base_that_is_quantised_is_what_its_config_says(tmp_path, stored, asked, expected, within):
    settings = {"quantization_config": stored}
    found = said(tmp_path, {"model_type": "llama", **({within: settings} if within else settings)}, model=asked)
    assert len(found) == len(expected)
    for problem, words in zip(found, expected, strict=True):
        before, _, after = words.partition("'...'")
        assert problem.startswith(before)
        assert after in problem


def test_every_other_quantisation_that_a_config_can_name_is_refused_with_its_name(tmp_path):
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    methods = [name for name in AUTO_QUANTIZATION_CONFIG_MAPPING if not name.startswith("bitsandbytes")]
    assert {"gptq", "awq", "fp8", "mxfp4", "compressed-tensors", "torchao"} <= set(methods)
    for number, method in enumerate([*methods, "one of tomorrow"]):
        place = tmp_path / str(number)
        place.mkdir()
        config = {"model_type": "llama", "quantization_config": {"quant_method": method, "bits": 4}}
        (problem,) = said(place, config, model={"quantization": "nf4"})
        assert f"whose config.json says {method}; allowed: a base with plain weights" in problem


def test_a_searched_quantisation_and_what_needs_plain_or_other_weights_is_refused_too(tmp_path):
    config = {"model_type": "llama", "quantization_config": {**NF4, **BYTES}}
    space = {"model.quantization": {"type": "choice", "values": ["none", "nf4"]}}
    resources = {"strategy": "fsdp", "workers_per_trial": 2}
    sections = {"space": space, "promotion": {"merge_into": "original"}, "resources": resources}
    searched, strategy, merged = said(tmp_path, config, model={"dtype": "bfloat16"}, **sections)
    assert searched.startswith("space.model.quantization: got 'none'; allowed: nf4, as")
    assert {strategy.partition(":")[0], merged.partition(":")[0]} == {"resources.strategy", "promotion.merge_into"}


@pytest.mark.parametrize(
    ("config", "train", "expected"),
    [
        ({"model_type": "gpt2", "n_positions": 64}, {"max_length": 64}, None),
        ({"model_type": "gpt2", "n_positions": 64}, {"max_length": 65}, "train.max_length: got 65; allowed: at most 64, the positions that the base has learned; did you mean 64?"),
        ({"model_type": "opt", "max_position_embeddings": 512}, {}, "train.max_length: got 1024; allowed: at most 512, the"),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, {"max_length": 513}, "train.max_length: got 513; allowed: at most 512, the"),
        ({"model_type": "gpt2", "n_positions": 64}, {"max_length": 60, "pad_to_multiple_of": 50}, "train.pad_to_multiple_of: got 50, which pads 60 tokens to 100; allowed: at most 64"),
        ({"model_type": "llama", "max_position_embeddings": 64}, {"max_length": 65}, None),
    ],
)  # fmt: skip
def test_a_length_above_the_learned_positions_is_refused_with_both_numbers(tmp_path, config, train, expected):
    found = said(tmp_path, config, train=train)
    assert [problem.startswith(expected or "") for problem in found] == ([True] if expected else [])


def test_a_searched_length_is_held_against_the_positions_too(tmp_path):
    space = {"train.max_length": {"type": "choice", "values": [32, 128]}}
    (problem,) = said(tmp_path, {"model_type": "gpt2", "n_positions": 64}, space=space)
    assert problem.startswith("space.train.max_length: got 128; allowed: at most 64")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"quantization_config": 3, "n_positions": "many"}'])
def test_a_config_that_cannot_be_read_is_left_to_what_loads_it(tmp_path, text):
    found = said(tmp_path, {})
    (tmp_path / "base" / "config.json").write_text(text)
    assert found == []
    assert learned_positions({"model_type": "gpt2", "n_positions": "many"}) is None
