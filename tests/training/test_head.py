"""A score is that of the model's own logits, or the base is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk
from test_shared import Sweep
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tuner.errors import TunerError
from tuner.spec.layout import SweepFolder
from tuner.spec.space import resolve
from tuner.training.evaluation import refuse_other_head, score
from tuner.training.model import load_model
from tuner.training.trial import build_trainer, sft_config

SIZES: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
ROWS = Dataset.from_list([{"input_ids": row, "labels": row} for row in ([3, 9, 4, 7, 88, 5], [8, 3, 2])])


def base_of(kind: str) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES), dtype=torch.float32)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model


def by_logits(model: Any) -> float:
    """A loop of its own over plain logits."""
    sums = [0.0, 0]
    for row in ROWS["input_ids"]:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([row])).logits[0]
        for position, target in enumerate(row[1:]):
            sums[0] -= logits[position].log_softmax(0)[target].item()
            sums[1] += 1
    return sums[0] / sums[1]


@pytest.mark.parametrize("kind", ["llama", "phi", "gemma2", "granite", "cohere", "bloom", "gpt2"])
def test_a_score_is_that_of_the_model_s_own_logits(kind):
    """Heads with a bias, scaled and capped logits, and the plain one."""
    model = base_of(kind)
    refuse_other_head(model, ROWS)
    assert score(model, ROWS).eval_loss == pytest.approx(by_logits(model), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_base_whose_head_is_more_than_a_matrix_is_refused(dtype):
    model = base_of("modernbert-decoder").to(dtype)
    with pytest.raises(
        TunerError, match=r"has an eval_loss of [\d.]+ by its head's weight, .* and of [\d.]+ by its own"
    ):
        refuse_other_head(model, ROWS)


def test_an_adapter_that_a_pattern_puts_on_the_head_is_refused(tiny_model_dir: Path, tmp_path: Path):
    sweep = Sweep(tiny_model_dir, tmp_path, lora={"r": 4, "target_modules": r".*(q_proj|lm_head)"})
    config = resolve(sweep.spec, 0, {})
    base = load_model(sweep.spec.model.model_dump(), tmp_path / "cache")
    rows = load_from_disk(str(SweepFolder.of(sweep.spec).eval_rows))
    with pytest.raises(ValueError, match="`lm_head` is not supported"):  # by TRL, in its own words
        build_trainer(
            config, base, AutoTokenizer.from_pretrained(tiny_model_dir), rows, sft_config(config, tmp_path / "out")
        )
