"""Which architectures the joint step computes as they compute themselves: those that do not are found, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from real_sweeps import write_spec
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tuner.execution.engine import EngineActor
from tuner.spec.load import load_spec
from tuner.training.shared.joint import JointModel
from tuner.training.shared.proof import why_not_equal

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EQUAL = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "mistral",
    "gpt_neox",
    "olmo2",
    "biogpt",
    "granite",
    "smollm3",
    "phi3",
)
DIFFERENT = {
    "bloom": r"a document scores [\d.]+ beside another and [\d.]+ alone",
    "xglm": r"a document scores [\d.]+ beside another and [\d.]+ alone",
    "cohere": r"a document scores [\d.]+ beside another and [\d.]+ alone",  # scales its logits
    "phi": r"a document scores [\d.]+ beside another and [\d.]+ alone",  # has a bias in its head
    "stablelm": r"the joint step fails on the model: TypeError: _attend\(\) missing",
    "nemotron": r"the joint step fails on the model: TypeError",
    "falcon": r"the joint step fails on the model: TypeError",
    "opt": r"the joint step fails on the model: RuntimeError",
    "gpt2": r"the model has no linear layer that an adapter could be beside",
}


def base_of(kind: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """A tiny random model; what is one or zero in a new model is random as well."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **{**SIZES, **sizes})
    if kind == "opt":
        config.word_embed_proj_dim, config.ffn_dim = 32, 48
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", EQUAL)
def test_an_architecture_that_computes_each_document_by_itself_is_joined(kind, dtype):
    base = base_of(kind, dtype)
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    attention, random = base.config._attn_implementation, torch.random.get_rng_state()
    assert why_not_equal(base) is None
    assert torch.equal(torch.random.get_rng_state(), random)
    assert base.config._attn_implementation == attention
    assert all(torch.equal(weight, before[name]) for name, weight in base.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", DIFFERENT)
def test_one_that_does_not_is_found(kind, dtype):
    found = why_not_equal(base_of(kind, dtype))
    expected = DIFFERENT[kind] if dtype == torch.float32 else f"{DIFFERENT[kind]}|the gradient of a document is another"
    import re

    assert re.match(expected, str(found)), found


def test_a_base_of_few_positions_can_be_joined():
    assert why_not_equal(base_of("biogpt", max_position_embeddings=5)) is None


def test_a_joint_step_that_goes_wrong_is_found(monkeypatch):
    """Whatever the cause: here the gradient alone."""
    step = JointModel.step

    def wrong(self: JointModel, batches: Any) -> list[float]:
        losses = step(self, batches)
        batches[0].adapter.grad.mul_(1.01)
        return losses

    monkeypatch.setattr(JointModel, "step", wrong)
    assert why_not_equal(base_of("llama")) == "the gradient of a document is another beside a second one (by 1.0e-02)"


def test_an_engine_gives_the_trials_of_such_a_base_bases_of_their_own_and_says_why(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base_of("bloom", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    file = write_spec(
        tmp_path,
        tmp_path / "bloom",
        "joint",
        budget={"trials": 2, "tokens_per_trial": 1000},
        resources={"share_base": 2},
        storage={"root": str(tmp_path / "runs")},
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    threads = torch.get_num_threads()
    try:
        slots, lanes, reason = EngineActor(load_spec(file).model_dump(mode="json"), 1, True).plan({}, 1)
    finally:
        torch.set_num_threads(threads)
    assert (slots, lanes) == (0, 0)
    assert "beside another and" in reason
