"""The merged model is the trained model: on plain bases exactly, on quantised ones as closely as it can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuner.promotion.merge import dequantized, load_saved, merge
from tuner.promotion.samples import pick_prompts, prompt_text
from tuner.spec.sweep import ModelSpec
from tuner.training.model import load_model

TOKENS = torch.arange(2, 42).reshape(2, 20)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.float()


def adapted(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "use_rslora": True},
        {"use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5, 7]},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_merged_logits_equal_base_plus_adapter(make_adapter, tiny_model_dir, tmp_path, fields):
    adapter = make_adapter(**fields)
    trained = logits(adapted(tiny_model_dir, adapter))
    untouched = logits(AutoModelForCausalLM.from_pretrained(tiny_model_dir))
    merged = merge(AutoModelForCausalLM.from_pretrained(tiny_model_dir), adapter, torch.float32)
    merged.save_pretrained(tmp_path)
    reloaded = logits(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert (trained - untouched).abs().max() > 1e-3, "the adapter does nothing: the test would prove nothing"
    assert (reloaded - trained).abs().max() < 1e-5


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=str)
def test_a_bfloat16_merge_rounds_each_weight_once(make_adapter, tiny_model_dir, fields):
    adapter = make_adapter(**fields)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    exact = merge(base.float(), adapter, torch.float32).state_dict()
    merged = merge(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16), adapter, torch.bfloat16)
    assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16}
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, exact[name].to(torch.bfloat16)), name


# LLM.int8 rounds activations too, which no merge can bring back: there the two differ by less.
@pytest.mark.parametrize(("quantization", "at_most"), [("nf4", 0.2), ("int8", 0.95)])
def test_merging_into_the_dequantised_base_is_closer_to_what_was_trained(
    make_adapter, tiny_model_dir, tmp_path, quantization, at_most
):
    model = ModelSpec(name=str(tiny_model_dir), dtype="bfloat16", quantization=quantization).model_dump()
    adapter = make_adapter(size=0.05)
    saved = {}
    for into, loaded in (("dequantized", model), ("original", {**model, "quantization": "none"})):
        base = load_model(loaded, tmp_path)
        if into == "dequantized":
            base = dequantized(base, torch.bfloat16)
        merge(base, adapter, torch.float32).save_pretrained(tmp_path / into)
        saved[into] = logits(load_saved(tmp_path / into, model))
        assert "quantization_config" not in (tmp_path / into / "config.json").read_text()
    trained = logits(PeftModel.from_pretrained(load_model(model, tmp_path), adapter))
    errors = {into: float((values - trained).square().mean().sqrt()) for into, values in saved.items()}
    assert errors["dequantized"] < at_most * errors["original"], errors


def test_the_prompt_is_what_stands_before_the_first_target_or_half_of_plain_text(
    rows_of: Callable[..., Any], tiny_model_dir: Path
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = rows_of(([1, 2, 3, 4], [-100, -100, 3, 4]), ([5, 6, 7, 8], [5, 6, 7, 8]), ([5, 6, 7, 8], [-100, 6, 7, 8]))
    assert pick_prompts(rows, 3, tokenizer) == [[1, 2], [5, 6], [5, 6]]
    assert pick_prompts(rows, 1, tokenizer) == [[1, 2]]
    assert len(pick_prompts(rows, 9, tokenizer)) == 3


@pytest.fixture
def rows_of() -> Callable[..., Any]:
    from datasets import Dataset

    return lambda *rows: Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in rows])


def test_a_prompt_is_shown_as_it_was_asked(tiny_model_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    asked = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    asked += [{"role": "user", "content": "user of what?\nTell me."}]
    chat = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert prompt_text(tokenizer, chat) == "user of what?\nTell me."
    assert prompt_text(tokenizer, tokenizer("Add 2 and 3.")["input_ids"]) == "Add 2 and 3."


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_base_that_is_stored_quantised_is_loaded_merged_and_saved_as_one_that_is_quantised_when_loaded(
    make_adapter, tiny_model_dir, tmp_path, quantization
):
    fresh = ModelSpec(name=str(tiny_model_dir), dtype="bfloat16", quantization=quantization).model_dump()
    stored = {**fresh, "name": str(tmp_path / "stored")}
    load_model(fresh, tmp_path).save_pretrained(tmp_path / "stored")
    adapter, found = make_adapter(size=0.05), {}
    for name, model in (("fresh", fresh), ("stored", stored)):
        trained = logits(PeftModel.from_pretrained(load_model(model, tmp_path), adapter))
        merge(dequantized(load_model(model, tmp_path), torch.bfloat16), adapter, torch.float32).save_pretrained(
            tmp_path / name / "merged"
        )
        assert "quantization_config" not in (tmp_path / name / "merged" / "config.json").read_text()
        found[name] = trained, logits(load_saved(tmp_path / name / "merged", model))
    for one, other in zip(found["fresh"], found["stored"], strict=True):
        assert torch.equal(one, other)
