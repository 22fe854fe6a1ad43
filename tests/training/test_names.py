"""Names and sizes of a spec that the base does not have are refused in preparation, with the nearest or both numbers."""

# ruff: noqa: E501 - a row of the table is a line, the message as the user reads it

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trial import spec_for
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tuner.errors import SpecError
from tuner.spec.sweep import SweepSpec
from tuner.training.baseline import prepare_sweep
from tuner.training.names import unmatched_names
from tuner.training.sizes import rows_that_do_not_fit
from tuner.training.structure import Structure, refuse_other_structure

RATE = {"train.learning_rate": {"type": "log_uniform", "low": 1e-5, "high": 1e-3}}
MATCH = "allowed: names that match something in the base"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lora": {"target_modules": ["q_proj", "v_prj"]}}, f"lora.target_modules: got 'v_prj'; {MATCH}; did you mean v_proj?"),
    ({"lora": {"target_modules": ["self_attn.q_prj"]}}, f"lora.target_modules: got 'self_attn.q_prj'; {MATCH}; did you mean self_attn.q_proj?"),
    ({"lora": {"target_modules": r".*\.(k_prj|v_prj)"}}, "lora.target_modules: got"),
    ({"lora": {"target_modules": "q_proj"}}, "lora.target_modules: got 'q_proj'"),  # as a pattern, of the whole name
    ({"space": {"lora.target_modules": {"type": "choice", "values": ["all-linear", ".*k_prj"]}}}, "space.lora.target_modules: got '.*k_prj'"),
    ({"lora": {"exclude_modules": ["layers.9"]}}, "lora.exclude_modules: got 'layers.9'"),
    ({"lora": {"exclude_modules": "layers.9"}}, "lora.exclude_modules: got 'layers.9'"),
    ({"lora": {"modules_to_save": ["embed_token"]}}, f"lora.modules_to_save: got 'embed_token'; {MATCH}; did you mean embed_tokens?"),
    ({"lora": {"rank_pattern": {"q_prj": 4}}}, "lora.rank_pattern: got 'q_prj'; allowed: names or patterns of what gets an adapter; did you mean q_proj?"),
    ({"lora": {"rank_pattern": {"proj": 4}}}, "lora.rank_pattern: got 'proj'"),  # within a name is not its end
    ({"lora": {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}}}, "lora.rank_pattern: got 'v_proj'"),
    ({"lora": {"rank_pattern": {"lm_head": 4}}}, "lora.rank_pattern: got 'lm_head'"),
    ({"lora": {"alpha_pattern": {"(": 4}}}, "lora.alpha_pattern: got '('"),
    ({"lora": {"target_parameters": ["experts.gate"]}}, "lora.target_parameters: got 'experts.gate'"),
    ({"lora": {"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}}, "lora.layers_to_transform: got 7; allowed: 0 or 1, layers of the base with such modules"),
    ({"lora": {"target_modules": ["q_proj"], "layers_to_transform": -1}}, "lora.layers_to_transform: got -1"),
    ({"lora": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["layers", "h"]}}, "lora.layers_pattern: got 'h'"),
    ({"lora": {"trainable_token_indices": [1, 49_152]}}, "lora.trainable_token_indices: got 49152; allowed: 0 to 49151, the rows of the embedding"),
    ({"lora": {"trainable_token_indices": {"embed_token": [1]}}}, "lora.trainable_token_indices: got 'embed_token'"),
    ({"train": {"optim": "galore_adamw", "optim_target_modules": ["mlp", "atn"]}, "lora": None}, "train.optim_target_modules: got 'atn'; allowed: names that match a linear layer of the base"),
    ({"train": {"optim": "galore_adamw", "optim_target_modules": ".*norm"}, "lora": None}, "train.optim_target_modules: got '.*norm'"),
    ({"resources": {"strategy": "fsdp", "fsdp": {"transformer_layer_cls_to_wrap": ["LlamaLayer"]}}}, "resources.fsdp.transformer_layer_cls_to_wrap: got 'LlamaLayer'; allowed: classes of the base, such as LlamaDecoderLayer; did you mean"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tree(tiny_model_dir: Path):
    return without_weights(AutoConfig.from_pretrained(tiny_model_dir))


def without_weights(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def spec_of(sections: dict[str, Any]) -> SweepSpec:
    required = {"name": "n", "model": {"name": "org/base"}, "data": {"path": "org/rows"}, "lora": {"r": 4}}
    required |= {"space": RATE, "budget": {"trials": 1, "tokens_per_trial": 9}}
    return SweepSpec.model_validate(required | sections)


@pytest.mark.parametrize(("sections", "message"), WRONG, ids=[message.partition(";")[0] for _, message in WRONG])
def test_a_name_that_matches_nothing_is_refused(sections, message, tree):
    [problem] = unmatched_names(spec_of(sections), tree)
    assert str(problem).startswith(message)


RIGHT: list[dict[str, Any]] = [
    {},
    {"lora": {"target_modules": ["q_proj", "self_attn.v_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2}}},
    {"lora": {"target_modules": r".*\.(q_proj|v_proj)", "alpha_pattern": {"[qv]_proj": 2}}},
    {"lora": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}},
    {"lora": {"target_modules": "ALL-LINEAR", "exclude_modules": ["o_proj"], "rank_pattern": {"up_proj": 2}}},
    {"lora": {"modules_to_save": ["tokens"], "target_parameters": ["mlp.up_proj.weight"]}},
    {"lora": {"target_modules": None, "target_parameters": ["up_proj.weight"], "rank_pattern": {"up_proj": 2}}},
    {"lora": {"trainable_token_indices": {"embed_tokens": [0, 49_151]}}},
    {"train": {"optim_target_modules": ["attn", "mlp"]}},
    {"train": {"optim_target_modules": r"base_model\.model\..*q_proj\.lora_A\.default"}},
    {"train": {"optim_target_modules": "all-linear"}, "lora": None},
    {"resources": {"strategy": "fsdp", "fsdp": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer,LlamaMLP"}}},
]


@pytest.mark.parametrize("sections", RIGHT, ids=str)
def test_names_that_match_as_the_libraries_match_are_taken(sections, tree):
    assert unmatched_names(spec_of(sections), tree) == []


def test_all_problems_are_told_at_once_and_before_the_rows_are_read(tiny_model_dir: Path, tmp_path: Path):
    lora = {"target_modules": ["q_proj", "v_prj"], "modules_to_save": ["embed_token"]}
    spec = spec_for(tiny_model_dir, tmp_path, lora=lora)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(SpecError) as caught:
        prepare_sweep(spec, lambda *event: None)
    assert [problem.got for problem in caught.value.problems] == ["'v_prj'", "'embed_token'"]


def test_layers_without_such_a_module_are_no_layers_for_it():
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    config = AutoConfig.for_model("lfm2", num_hidden_layers=4, layer_types=kinds, **sizes)
    lora = {"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}
    [problem] = unmatched_names(spec_of({"lora": lora}), without_weights(config))
    assert "got 2; allowed: 1 or 3, layers of the base with such modules" in str(problem)


def base_of(folder: Path, tokenizer: Any, **sizes: Any) -> Path:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_token_ids_beyond_the_embedding_are_refused_with_both_numbers(tiny_model_dir: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = base_of(tmp_path / "gpt2", tokenizer, vocab_size=40)
    with pytest.raises(SpecError) as caught:
        prepare_sweep(spec_for(base, tmp_path, train={"max_length": 64}), lambda *event: None)
    [ids] = caught.value.problems
    assert re.match(r"data.path: got rows with the token id \d+; allowed: token ids from 0 to 39, for which", str(ids))
    tokenizer.pad_token = "user"
    [problem] = rows_that_do_not_fit(
        without_weights(AutoConfig.from_pretrained(base)), None, [], tokenizer.pad_token_id
    )
    assert str(problem).startswith(f"model.name: got a tokenizer that pads with the token id {tokenizer.pad_token_id};")


@pytest.mark.parametrize(("odd", "key"), [([39, 40], "data.path"), ([5] * 64, "train.max_length")])
def test_tokenised_rows_that_do_not_fit_are_refused_with_both_numbers(odd, key, tiny_model_dir: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = base_of(tmp_path / "gpt2", tokenizer, vocab_size=40)
    rows = tmp_path / "ids.jsonl"
    rows.write_text("\n".join(json.dumps({"input_ids": [one % 7, *odd]}) for one in range(20)))
    spec = spec_for(base, tmp_path, data={"path": str(rows)}, train={"max_length": None}, space=RATE)
    with pytest.raises(SpecError) as caught:
        prepare_sweep(spec, lambda *event: None)
    [problem] = caught.value.problems
    assert (problem.key, "got rows with the token id 40" in str(problem)) == (key, key == "data.path")
    assert key == "data.path" or "a row of 65 tokens; allowed: at most 64" in str(problem)


def test_a_quantised_base_from_the_hub_is_refused_by_its_config_in_preparation(tiny_model_dir: Path):
    config = AutoConfig.from_pretrained(tiny_model_dir)
    base = Structure(config, without_weights(config))
    refuse_other_structure(spec_of({}), base)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(SpecError, match=r"model\.name: got 'org/base', whose config\.json says gptq"):
        refuse_other_structure(spec_of({}), base)
    assert base.positions is None
