"""Which sweeps share a base, and what `tuner check` says of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuner.spec.load import parse_spec
from tuner.spec.sharing import why_not_shared


def reasons(tmp_path: Path, **changes: Any) -> list[str]:
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n')
    values: dict[str, Any] = {
        "name": "sharing",
        "model": {"name": "org/model"},
        "data": {"path": "rows.jsonl"},
        "space": {"train.learning_rate": {"type": "log_uniform", "low": 1e-4, "high": 1e-2}},
        "budget": {"trials": 4, "tokens_per_trial": 1000},
    }
    return why_not_shared(parse_spec(values | changes, tmp_path))


def choice(*values: object) -> dict[str, Any]:
    return {"type": "choice", "values": list(values)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": {"use_rslora": True, "lora_dropout": 0.1, "target_modules": ["q_proj"]}},
        {"model": {"name": "org/model", "quantization": "nf4"}},
        {"train": {"gradient_checkpointing": True, "neftune_noise_alpha": 5, "packing": "bfd"}},
        {"resources": {"share_base": 4}},
    ],
    ids=str,
)
def test_lora_sweeps_share_a_base(changes, tmp_path):
    assert reasons(tmp_path, **changes) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora": None}, "full fine-tuning changes every weight of the base"),
        ({"lora": {"use_dora": True}}, "lora.use_dora: DoRA rescales the base's own columns"),
        ({"space": {"lora.use_dora": choice(True, False)}}, "lora.use_dora: DoRA rescales the base's own columns"),
        (
            {"lora": {"modules_to_save": ["embed_tokens"]}},
            "lora.modules_to_save: modules_to_save trains whole modules of the base",
        ),
        (
            {"space": {"model.quantization": choice("none", "nf4")}},
            "model.quantization is searched: the trials have different bases",
        ),
        (
            {"model": {"name": "org/model", "dtype": "float16"}},
            "model.dtype: float16 scales each trial's loss by itself",
        ),
        ({"train": {"loss_type": "dft"}}, "train.loss_type: the joint loss is nll"),
        ({"resources": {"workers_per_trial": 2}}, "a trial has 2 workers"),
        ({"resources": {"share_base": "off"}}, "resources.share_base is off"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_share_is_named(changes, reason, tmp_path):
    assert reasons(tmp_path, **changes) == [reason]
