"""Which sweeps share a base, which of their trials train apart, and what `tuner check` says of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuner.cli.screens import show_spec
from tuner.spec.load import parse_spec
from tuner.spec.sharing import trials_apart, why_apart, why_not_shared
from tuner.spec.space import resolve
from tuner.spec.sweep import SweepSpec


def spec_of(tmp_path: Path, **changes: Any) -> SweepSpec:
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n' * 8)
    values: dict[str, Any] = {
        "name": "sharing",
        "model": {"name": "org/model"},
        "data": {"path": "rows.jsonl"},
        "space": {"train.learning_rate": {"type": "log_uniform", "low": 1e-4, "high": 1e-2}},
        "budget": {"trials": 4, "tokens_per_trial": 1000},
    }
    return parse_spec(values | changes, tmp_path)


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
        {"space": {"train.optim": choice("adamw_torch", "sgd", "rmsprop", "adagrad")}},
        {"space": {"lora.init_lora_weights": choice(True, "gaussian", "orthogonal")}},
        {
            "train": {
                "tf32": True,
                "dataloader_drop_last": True,
                "pad_to_multiple_of": 8,
                "packing": "bfd",
                "padding_free": True,
            },
            "resources": {"gpus_per_worker": 1},
        },
    ],
    ids=str,
)
def test_lora_sweeps_share_a_base(changes, tmp_path):
    spec = spec_of(tmp_path, **changes)
    assert why_not_shared(spec) == trials_apart(spec) == []
    assert why_apart(resolve(spec, 0, {})) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora": None}, "full fine-tuning changes every weight of the base"),
        ({"lora": {"use_dora": True}}, "lora.use_dora: DoRA rescales the base's own columns"),
        ({"space": {"lora.use_dora": choice(True)}}, "lora.use_dora: DoRA rescales the base's own columns"),
        ({"lora": {"init_lora_weights": "mica"}}, "lora.init_lora_weights: this init is a variant of LoRA"),
        ({"train": {"optim": "adafactor"}}, "train.optim: the optimizer is not elementwise"),
        (
            {"train": {"gradient_checkpointing_kwargs": {"use_reentrant": True}}},
            "train.gradient_checkpointing_kwargs: the joint step checkpoints whole layers",
        ),
        ({"space": {"train.optim": choice("lion_8bit", "adafactor")}}, "train.optim: the optimizer is not elementwise"),
        ({"train": {"torch_compile_mode": "default"}}, "train.torch_compile_mode: the joint step is not compiled"),
        ({"train": {"full_determinism": True}}, "train.full_determinism: full_determinism changes the whole process"),
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
        ({"resources": {"memory_per_worker": "2GB"}}, "resources.memory_per_worker bounds each trial's own process"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_share_is_named(changes, reason, tmp_path):
    assert why_not_shared(spec_of(tmp_path, **changes)) == [reason]


RATE = {"train.learning_rate": {"type": "log_uniform", "low": 1e-4, "high": 1e-2}}


@pytest.mark.parametrize(
    ("space", "sentence", "apart", "shares"),
    [
        (
            {"lora.use_dora": choice(True, False)},
            "trials with lora.use_dora true train apart: DoRA rescales the base's own columns",
            {"lora.use_dora": True},
            {"lora.use_dora": False},
        ),
        (
            {"train.optim": choice("adamw_torch", "adafactor", "lion_8bit")},
            "trials with train.optim adafactor or lion_8bit train apart: the optimizer is not elementwise",
            {"train.optim": "lion_8bit"},
            {"train.optim": "adamw_torch"},
        ),
        (
            {"lora.use_dora": choice(True) | {"when": {"lora.r": [8]}}, "lora.r": choice(8, 16)},
            "trials with lora.use_dora true train apart: DoRA rescales the base's own columns",
            {"lora.use_dora": True, "lora.r": 8},
            {"lora.r": 16},
        ),
        (
            {"train.label_smoothing_factor": {"type": "uniform", "low": 0, "high": 0.2}},
            "trials with train.label_smoothing_factor 0 to 0.2 train apart: the joint loss is not smoothed",
            {"train.label_smoothing_factor": 0.1},
            {"train.label_smoothing_factor": 0.0},
        ),
        (
            {"train.tf32": choice(True, False)},
            "trials with train.tf32 true train apart: tf32 is switched for a whole process",
            {"train.tf32": True},
            {"train.tf32": False},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_only_some_trials_have_sends_only_those_apart(space, sentence, apart, shares, tmp_path, capsys):
    spec = spec_of(tmp_path, space=RATE | space, resources={"gpus_per_worker": 1})
    assert why_not_shared(spec) == []
    assert trials_apart(spec) == [sentence]
    (reason,) = why_apart(resolve(spec, 0, apart))
    assert reason.split(": ")[1] == sentence.split(": ")[1]
    assert why_apart(resolve(spec, 0, shares)) == []
    show_spec(spec)
    assert f"shared by the trials; {sentence}" in capsys.readouterr().out
