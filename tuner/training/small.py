"""A small random model of a base's own architecture, on which something can be tried in a moment."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 256


def small_model(config: PreTrainedConfig, vocabulary: int = VOCABULARY, trust_remote_code: bool = False) -> Any:
    """A float32 model of this config with two layers, or one of each kind that it has, and few tokens.

    Norms and biases, which a new model has at one and zero, are random as well: where they stand at those values,
    leaving them out would change nothing. Raises whatever the model's own code does where there is no such model.
    """
    small = copy.deepcopy(config)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    text = small.get_text_config()
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = (list(dict.fromkeys(kinds)) * 2)[: max(2, len(set(kinds)))]
    text.num_hidden_layers = len(text.layer_types) if kinds else 2
    text.vocab_size = vocabulary
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        small, dtype=torch.float32, trust_remote_code=trust_remote_code
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()
