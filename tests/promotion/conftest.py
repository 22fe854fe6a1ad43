"""Adapters with a non-zero B on the tiny model, rows to score them on, and everything `promote` is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tuner.spec.layout import Root, SweepFolder
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report

MakeAdapter = Callable[..., Path]


@dataclass(frozen=True)
class Trial:
    """The part of a trial's record that promotion reads."""

    number: int
    config: dict[str, Any]


@pytest.fixture(scope="session")
def make_adapter(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """A function that saves a LoRA adapter of the tiny model; `size` is the spread of what starts at zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def make(size: float = 0.02, seed: int = 0, base: Path = tiny_model_dir, **fields: Any) -> Path:
        torch.manual_seed(seed)
        config = LoraConfig(
            **{"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 4, "lora_alpha": 8, **fields}
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                torch.nn.init.normal_(parameter, std=size) if size else torch.nn.init.zeros_(parameter)
            elif "trainable_tokens" in name or "modules_to_save" in name:
                parameter.data += torch.randn_like(parameter) * size
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def eval_rows(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight tokenised questions and answers; the question is no target."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = []
    for number in range(8):
        question = tokenizer(f"What does function {number} return?").input_ids
        answer = tokenizer(f" The square of {number}, and nothing else.").input_ids
        rows.append({"input_ids": question + answer, "labels": [-100] * len(question) + answer})
    folder = tmp_path_factory.mktemp("eval") / "rows"
    Dataset.from_list(rows).save_to_disk(folder)
    return folder


@pytest.fixture(scope="session")
def measure(tiny_model_dir: Path, eval_rows: Path) -> Callable[..., dict[str, float]]:
    """A function that scores an adapter on its base, or the base alone, as a trial does."""
    from datasets import load_from_disk
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tuner.training.evaluation import score

    def scores(adapter: Path | None, base: Path = tiny_model_dir) -> dict[str, float]:
        model = AutoModelForCausalLM.from_pretrained(base)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        return score(model, load_from_disk(str(eval_rows))).as_dict()

    return scores


def make_spec(model: Path, root: Path, dtype: str = "float32", **promotion: Any) -> SweepSpec:
    return SweepSpec.model_validate(
        {
            "name": "tiny",
            "model": {"name": str(model), "dtype": dtype},
            "data": {"path": "/data/questions.jsonl"},
            "train": {"per_device_eval_batch_size": 4, "hub_token": "hf_secret"},
            "space": {"train.learning_rate": {"type": "log_uniform", "low": 1e-5, "high": 1e-3}},
            "budget": {"trials": 1, "tokens_per_trial": 100},
            "promotion": {"alias": "production", **promotion},
            "storage": {"root": str(root), "study": "postgresql://me:secret@host/studies"},
        }
    )


def make_trial(spec: SweepSpec, lora: dict[str, Any] | None, **train: Any) -> Trial:
    return Trial(
        number=3,
        config={
            "number": 3,
            "point": {"train.learning_rate": 2e-4},
            "model": spec.model.model_dump(),
            "train": {**spec.train, "learning_rate": 2e-4, **train},
            "lora": lora,
        },
    )


def make_report(checkpoint: Path, eval_loss: float, mean_token_accuracy: float = 0.0) -> Report:
    return Report(
        tokens=100,
        trained_tokens=104,
        step=5,
        epoch=0.5,
        train_loss=4.0,
        eval_loss=eval_loss,
        mean_token_accuracy=mean_token_accuracy,
        learning_rate=2e-4,
        grad_norm=1.0,
        tokens_per_s=100.0,
        peak_memory_bytes=1,
        duration_s=1.0,
        adapter_path=str(checkpoint),
    )


def sweep_folder(root: Path) -> SweepFolder:
    return Root(root).sweep("tiny")
