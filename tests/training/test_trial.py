"""One trial, from its config to its reports, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuner.errors import DataError, InfeasibleError
from tuner.spec.layout import Save
from tuner.spec.load import parse_spec
from tuner.spec.space import resolve
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report
from tuner.training.baseline import prepare_rows, prepare_sweep, tokens_per_trial
from tuner.training.evaluation import score
from tuner.training.trial import run_trial

PACKING = {"type": "choice", "values": ["none", "bfd", "bfd_split", "wrapped"]}


def spec_for(tiny_model_dir: Path, tmp_path: Path, **changes: Any) -> SweepSpec:
    rows = [
        {"prompt": f"What is {i} plus {j}?", "completion": f" It is {i + j}, of course." * (1 + j % 3)}
        for i in range(8)
        for j in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    values: dict[str, Any] = {
        "name": "one-trial",
        "model": {"name": str(tiny_model_dir), "dtype": "float32"},
        "data": {"path": "rows.jsonl", "eval_fraction": 0.2},
        "train": {
            "max_length": 48,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
        },
        "lora": {"r": 4},
        "space": {"train.packing": PACKING},
        "budget": {"trials": 4, "tokens_per_trial": 1200, "evals_per_trial": 4},
        "stopping": {"type": "none"},
        "storage": {"root": str(tmp_path / "runs")},
    }
    return parse_spec(values | changes, tmp_path)


def run(spec: SweepSpec, tmp_path: Path, **point: Any) -> tuple[list[Report], list[Path]]:
    """The reports of one trial and the folders its adapters were saved to."""
    reports: list[Report] = []
    folders: list[Path] = []

    def emit(report: Report, save: Save | None) -> None:
        assert save is not None
        reports.append(report)
        folders.append(tmp_path / f"tokens-{report.tokens}")
        save(folders[-1])

    config = resolve(spec, 0, {"train.packing": "none", **point})
    sweep = prepare_sweep(spec, lambda stage, done, total: None)
    run_trial(spec, config, sweep, tmp_path / "out", emit)
    return reports, folders


@pytest.mark.parametrize("packing", ["none", "bfd", "bfd_split", "wrapped"])
def test_every_packing_reports_at_the_same_token_counts(packing, tiny_model_dir, tmp_path):
    reports, _ = run(spec_for(tiny_model_dir, tmp_path), tmp_path, **{"train.packing": packing})
    assert [report.tokens for report in reports] == [300, 600, 900, 1200]
    for report in reports:
        assert report.tokens <= report.trained_tokens < report.tokens + 4 * 48  # within one step
        assert report.is_finite()
        assert report.tokens_per_s > 0
        assert report.peak_memory_bytes > 1e6
    assert reports[-1].eval_loss < 10.7  # it learns: an untrained one is at ln(49152) = 10.8
    assert [r.step for r in reports] == sorted({r.step for r in reports})


def test_the_saved_adapter_is_the_one_that_was_scored(tiny_model_dir, tmp_path):
    spec = spec_for(tiny_model_dir, tmp_path)
    reports, folders = run(spec, tmp_path)
    eval_rows = load_from_disk(str(prepare_rows(spec, spec.train, AutoTokenizer.from_pretrained(tiny_model_dir)).eval))
    for report, folder in zip(reports, folders, strict=True):
        assert sorted(path.name for path in folder.iterdir() if path.suffix != ".md") == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        again = score(PeftModel.from_pretrained(base, folder), eval_rows)
        assert again.eval_loss == pytest.approx(report.eval_loss, abs=1e-6)


def test_the_same_config_gives_the_same_reports(tiny_model_dir, tmp_path):
    spec = spec_for(tiny_model_dir, tmp_path)
    first, second = (run(spec, tmp_path / name)[0] for name in ("a", "b"))
    assert [(r.train_loss, r.eval_loss, r.grad_norm) for r in first] == [
        (r.train_loss, r.eval_loss, r.grad_norm) for r in second
    ]


def test_full_fine_tuning_trains_and_saves_every_weight(tiny_model_dir, tmp_path):
    reports, folders = run(spec_for(tiny_model_dir, tmp_path, lora=None), tmp_path)
    before = load_file(tiny_model_dir / "model.safetensors")
    after = load_file(folders[-1] / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert reports[-1].eval_loss < reports[0].eval_loss


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_bfloat16_or_four_bit_base_trains_on_a_cpu(quantization, tiny_model_dir, tmp_path):
    model = {"name": str(tiny_model_dir), "dtype": "bfloat16", "quantization": quantization}
    reports, folders = run(spec_for(tiny_model_dir, tmp_path, model=model), tmp_path)
    assert reports[-1].eval_loss < reports[0].eval_loss
    assert any(
        tensor.abs().max() > 0
        for name, tensor in load_file(folders[-1] / "adapter_model.safetensors").items()
        if "lora_B" in name
    )


def test_evaluating_does_not_disturb_the_training_on_a_four_bit_base(tiny_model_dir, tmp_path):
    """On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights in evaluation mode, and cannot go back."""
    model = {"name": str(tiny_model_dir), "dtype": "bfloat16", "quantization": "nf4"}
    last = []
    for evals in (1, 4):
        budget = {"trials": 1, "tokens_per_trial": 1200, "evals_per_trial": evals}
        folder = tmp_path / f"{evals}-evaluations"
        folder.mkdir()
        last.append(run(spec_for(tiny_model_dir, folder, model=model, budget=budget), folder)[0][-1])
    assert last[0].step == last[1].step
    assert last[0].eval_loss == last[1].eval_loss


def test_a_trial_that_diverges_reports_it_and_is_infeasible(tiny_model_dir, tmp_path):
    spec = spec_for(tiny_model_dir, tmp_path)
    with pytest.raises(InfeasibleError, match="eval_loss is nan after") as caught:
        run(spec, tmp_path, **{"train.learning_rate": 1e30})
    assert caught.value.cause == "diverged"


def test_data_that_change_under_a_sweep_end_the_trial(tiny_model_dir, tmp_path):
    spec = spec_for(tiny_model_dir, tmp_path)
    sweep = prepare_sweep(spec, lambda stage, done, total: None)
    with (tmp_path / "rows.jsonl").open("a") as rows:
        rows.write('\n{"prompt": "One more?", "completion": " One more."}')
    with pytest.raises(DataError, match="has changed since the sweep began"):
        run_trial(spec, resolve(spec, 0, {}), sweep, tmp_path / "out", lambda report, save: None)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"tokens_per_trial": 1000}, 1000),
        ({"epochs_per_trial": 1.5}, 1500),
        ({"steps_per_trial": 10}, 10 * 4 * 2 * 1000 / 50),
    ],
)
def test_every_form_of_budget_becomes_tokens(budget, expected, tiny_model_dir, tmp_path):
    train = {"max_length": 48, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    spec = spec_for(tiny_model_dir, tmp_path, train=train, budget={"trials": 1, "evals_per_trial": 4, **budget})
    assert tokens_per_trial(spec, {"train_tokens": 1000, "sequences": 50}) == expected
