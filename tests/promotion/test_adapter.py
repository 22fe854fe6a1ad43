"""A checkpoint is refused before it is loaded, with the reason, whenever it is not what its config says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tuner.errors import PromotionRefused
from tuner.promotion.adapter import check_adapter, check_full_model

Q_PROJ_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def base(tiny_model_dir: Path) -> Any:
    return AutoConfig.from_pretrained(tiny_model_dir)


def refusal(check: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(PromotionRefused) as refused:
        check(*arguments)
    return " | ".join(refused.value.reasons)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 3}},
        {"use_dora": True},
        {"use_rslora": True, "lora_bias": True},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [5, 7]},
        {"bias": "lora_only"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_a_whole_adapter_of_every_kind_passes(make_adapter, base, fields):
    facts = check_adapter(make_adapter(**fields), base)
    assert facts["rank"] == 4
    assert facts["parameters"] > 0


def test_the_facts_count_what_is_there(make_adapter, base):
    facts = check_adapter(make_adapter(target_modules=["q_proj"]), base)
    assert facts == {"rank": 4, "tensors": 4, "parameters": 2 * 4 * (64 + 64)}


@pytest.mark.parametrize("kept", [0, 4, 200, 0.5, 0.999])
def test_a_truncated_file_is_refused(make_adapter, base, kept):
    folder = make_adapter()
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert "damaged or cut short" in refusal(check_adapter, folder, base)


def test_an_adapter_without_tensors_is_refused(make_adapter, base):
    assert "holds no tensors" in refusal(check_adapter, rewrite(make_adapter(), dict.clear), base)


def test_an_adapter_that_is_a_pickle_is_refused(make_adapter, base):
    folder = make_adapter()
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert "never pickles" in refusal(check_adapter, folder, base)


def test_missing_tensors_are_counted_and_named(make_adapter, base):
    folder = rewrite(make_adapter(), lambda tensors: tensors.pop(Q_PROJ_A))
    assert refusal(check_adapter, folder, base) == f"1 of 28 tensors are missing: {Q_PROJ_A}"


def test_a_layer_of_another_rank_than_the_config_says_is_refused(make_adapter, base):
    folder = make_adapter(rank_pattern={"layers.0.self_attn.q_proj": 3})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {}}))
    said = refusal(check_adapter, folder, base)
    assert "2 of 28 tensors have the wrong shape" in said
    assert f"{Q_PROJ_A} is (3, 64), ought to be (4, 64)" in said


def test_empty_shards_as_zero_3_leaves_them_are_refused(make_adapter, base):
    def empty(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: torch.zeros(0) for name in tensors})

    assert "28 of 28 tensors have the wrong shape" in refusal(check_adapter, rewrite(make_adapter(), empty), base)


def test_values_that_are_not_finite_are_refused(make_adapter, base):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_PROJ_A][0, 0] = float("nan")

    assert "1 of 28 tensors hold values that are not finite" in refusal(
        check_adapter, rewrite(make_adapter(), spoil), base
    )


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}], ids=str)
def test_an_adapter_whose_every_b_is_zero_is_refused(make_adapter, base, fields):
    """Of an embedding it is A that starts at zero."""
    assert "every B is zero" in refusal(check_adapter, make_adapter(size=0, **fields), base)


def test_one_b_that_is_not_zero_is_enough(make_adapter, base):
    def touch(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_PROJ_A.replace("lora_A", "lora_B")][0, 0] = 1e-6

    assert check_adapter(rewrite(make_adapter(size=0), touch), base)["tensors"] == 28


def test_an_adapter_of_a_base_of_other_sizes_is_refused(make_adapter):
    wider = LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    assert "have the wrong shape" in refusal(check_adapter, make_adapter(), wider)


def test_an_adapter_of_a_deeper_base_is_refused(make_adapter, base, tmp_path):
    deeper = LlamaConfig(**{**base.to_dict(), "num_hidden_layers": 3})
    LlamaForCausalLM(deeper).save_pretrained(tmp_path)
    adapter = make_adapter(base=tmp_path, target_modules=["q_proj"])
    assert "2 tensors fit no module of the base: base_model.model.model.layers.2" in refusal(
        check_adapter, adapter, base
    )


def test_an_adapter_for_modules_the_base_does_not_have_is_refused(make_adapter, base):
    folder = make_adapter(target_modules=["q_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["query_key_value"]}))
    assert "does not fit the base" in refusal(check_adapter, folder, base)


def test_an_adapter_that_names_another_base_is_refused(make_adapter, base, tiny_model_dir):
    adapter = make_adapter()
    assert "not on Qwen/Qwen2.5-0.5B" in refusal(check_adapter, adapter, base, "Qwen/Qwen2.5-0.5B")
    check_adapter(adapter, base, str(tiny_model_dir))
    check_adapter(adapter, base, f"/moved/{tiny_model_dir.name}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no adapter_config.json"),
        ('{"r": 4,', "is not JSON"),
        ('{"peft_type": "IA3"}', "not describe a LoRA"),
    ],
)
def test_a_config_that_is_missing_cut_short_or_of_another_kind_is_refused(make_adapter, base, content, said):
    folder = make_adapter()
    path = folder / "adapter_config.json"
    path.unlink() if content is None else path.write_text(content)
    assert said in refusal(check_adapter, folder, base)


def test_a_full_model_passes_whole_and_is_refused_cut_short_broken_or_of_another_base(tiny_model_dir, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert check_full_model(tmp_path, base)["parameters"] == sum(weight.numel() for weight in model.parameters())
    deeper = LlamaConfig(**{**base.to_dict(), "num_hidden_layers": 3})
    assert "num_hidden_layers is 2, the base's is 3" in refusal(check_full_model, tmp_path, deeper)
    model.model.norm.weight.data[0] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    assert "model.norm.weight holds values that are not finite" in refusal(check_full_model, tmp_path / "broken", base)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    assert "damaged or cut short" in refusal(check_full_model, tmp_path, base)
    shard.unlink()
    assert f"{shard.name} is missing" in refusal(check_full_model, tmp_path, base)
    assert "holds no config.json" in refusal(check_full_model, tmp_path / "nothing", base)
