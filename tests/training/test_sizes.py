"""How many tokens a base can take is found from its structure; what exceeds it fails in its forward, and is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tuner.spec.checks import base
from tuner.training.sizes import learned_positions

SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "dff", "n_inner"), 32),
    **{"vocab_size": 50, "rotary_dim": 8, "pad_token_id": 1},
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), 24),
}
KINDS = sorted((base._OF_TABLES | base._AFTER_PADDING) - {"xmod"})  # which wants to know the language as well


def config_of(kind: str) -> Any:
    config = AutoConfig.for_model(kind)
    for name, value in SMALL.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, value)
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_the_learned_positions_are_what_the_config_the_structure_and_the_forward_say(kind):
    config = config_of(kind)
    with torch.device("meta"):
        tree = AutoModelForCausalLM.from_config(config)
    positions = learned_positions(tree, config)
    assert positions == base.learned_positions(config.to_dict()) in (22, 24)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model(input_ids=torch.full((1, positions), 5), use_cache=False)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, positions + 1), 5), use_cache=False)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "phi", "bloom", "mistral"])
def test_a_base_that_computes_positions_has_no_end(kind):
    config = config_of(kind)
    config.num_key_value_heads = 4
    with torch.device("meta"):
        tree = AutoModelForCausalLM.from_config(config)
    assert learned_positions(tree, config) is None
