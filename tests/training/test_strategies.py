"""Whatever shares a trial among workers, it trains the same, and what was asked for is what ran."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from datasets import load_from_disk
from peft import PeftModel
from safetensors.torch import load_file
from test_trial import spec_for
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, TrainingArguments

from tests.made_by_hand import plant
from tuner.errors import InfeasibleError
from tuner.promotion.adapter import check_adapter
from tuner.spec.batch import share_of_batch
from tuner.spec.checks.strategies import AUTO_ONLY, DEEPSPEED_KEYS, FSDP_KEYS, FSDP_OWNED, ZERO_KEYS
from tuner.spec.space import resolve
from tuner.spec.sweep import SweepSpec
from tuner.training.baseline import Preparation, prepare_rows, prepare_sweep
from tuner.training.evaluation import score
from tuner.training.memory import choose_strategy, estimate, largest_trial
from tuner.training.strategy import DEEPSPEED
from tuner.training.trial import run_trial

pytestmark = pytest.mark.timeout(200)

SHARED = ("ddp", "zero2", "zero3", "fsdp")


class Workbench:
    """One spec, its data and one trial of it, trained by whatever shares it."""

    def __init__(self, context: Any, model: Path, folder: Path):
        self.context, self.model, self.folder = context, model, folder
        self.sweep: Preparation = prepare_sweep(self.spec("ddp", 1), lambda stage, done, total: None)
        self._trained: dict[str, ranks.Trained] = {}

    def spec(self, strategy: str, workers: int, **changes: Any) -> SweepSpec:
        resources = {"strategy": strategy, "workers_per_trial": workers, **changes.pop("resources", {})}
        return spec_for(self.model, self.folder, resources=resources, **changes)

    def config(self, spec: SweepSpec) -> Any:
        return resolve(spec, 0, {"train.packing": "none"})

    def train(self, name: str, strategy: str, workers: int = 2, shim: bool = True, **changes: Any) -> ranks.Trained:
        spec = self.spec(strategy, workers, **changes)
        folder, shim = self.folder / name, shim and strategy == "fsdp"
        return ranks.train(self.context, spec, self.config(spec), self.sweep, folder, shim)

    def shared(self, strategy: str) -> ranks.Trained:
        """A trial of two workers, trained once for all tests."""
        if strategy not in self._trained:
            self._trained[strategy] = self.train(strategy, strategy)
        return self._trained[strategy]

    def alone(self) -> ranks.Trained:
        """The same trial as a stock SFTTrainer in this process."""
        if "alone" not in self._trained:
            spec, folder, reports = self.spec("auto", 1), self.folder / "alone", []

            def emit(report: Any, save: Any) -> None:
                reports.append(report)
                save(folder / f"tokens-{report.tokens}")

            run_trial(spec, self.config(spec), self.sweep, folder / "checkpoints", emit)
            self._trained["alone"] = ranks.Trained(reports, folder, None)
        return self._trained["alone"]


@pytest.fixture(scope="module")
def bench(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    with ranks.processes() as context:
        yield Workbench(context, tiny_model_dir, tmp_path_factory.mktemp("strategies"))


# Equal math


@pytest.mark.parametrize("strategy", SHARED)
def test_two_workers_train_the_same_steps_and_reach_the_same_loss_as_one(strategy, bench):
    """38 rows in steps of 4: each epoch ends with a step that is not full, which two workers must not fill up."""
    alone, shared = bench.alone(), bench.shared(strategy)
    assert shared.error is None
    assert bench.sweep.data["sequences"] % 4
    facts = [(report.step, report.tokens, report.trained_tokens) for report in alone.reports]
    assert [(report.step, report.tokens, report.trained_tokens) for report in shared.reports] == facts
    for figure, close in (("eval_loss", 1e-4), ("train_loss", 1e-4), ("grad_norm", 1e-3)):
        expected = [getattr(report, figure) for report in alone.reports]
        assert [getattr(report, figure) for report in shared.reports] == pytest.approx(expected, abs=close)
    assert alone.reports[-1].eval_loss < alone.reports[0].eval_loss - 0.1  # there was something to differ in


@pytest.mark.parametrize("strategy", ["zero3", "fsdp"])
def test_a_sharded_adapter_is_saved_whole_scores_what_was_reported_and_merges(strategy, bench):
    shared = bench.shared(strategy)
    report = shared.reports[-1]
    folder = shared.folder / f"tokens-{report.tokens}"
    check_adapter(folder, AutoConfig.from_pretrained(bench.model), str(bench.model))  # keys, shapes, no zero B
    expected = load_file(bench.alone().folder / folder.name / "adapter_model.safetensors")
    stored = load_file(folder / "adapter_model.safetensors")
    assert stored.keys() == expected.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=0)
    base = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
    rows = prepare_rows(bench.spec("ddp", 1), {"max_length": 48}, AutoTokenizer.from_pretrained(bench.model)).eval
    assert score(merged, load_from_disk(str(rows))).eval_loss == pytest.approx(report.eval_loss, abs=1e-4)


@pytest.mark.parametrize("strategy", ["zero2", "fsdp"])
def test_a_shared_trial_goes_on_from_its_last_evaluation(strategy, bench):
    """What is in its folder is the checkpoint of the evaluation before the last; what was reported is, again."""
    first = bench.shared(strategy)
    adapters = [first.folder / f"tokens-{report.tokens}" for report in first.reports]
    for adapter in adapters[:-1]:
        shutil.rmtree(adapter)
    again = bench.train(strategy, strategy)
    assert [report.step for report in again.reports] == [report.step for report in first.reports]
    assert [adapter.exists() for adapter in adapters] == [False] * (len(adapters) - 2) + [True, True]
    assert again.reports[-1].eval_loss == pytest.approx(first.reports[-1].eval_loss, abs=1e-6)


def test_a_pickle_in_a_sharded_checkpoint_runs_nothing(bench, tmp_path):
    bench.train("bomb", "zero2")
    (states,) = (bench.folder / "bomb" / "checkpoints").glob("checkpoint-*/global_step*/mp_rank_00_model_states.pt")
    plant(states, tmp_path / "mark")
    assert bench.train("bomb", "zero2").error is not None
    assert not (tmp_path / "mark").exists()


def test_one_worker_may_offload_what_zero_3_shards(bench):
    trained = bench.train("offload", "zero3", workers=1, resources={"offload": True})
    assert trained.error is None
    expected = [report.eval_loss for report in bench.alone().reports]
    assert [report.eval_loss for report in trained.reports] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("strategy", ["zero2", "fsdp"])
def test_a_four_bit_base_is_trained_by_two_workers(strategy, bench):
    model = {"name": str(bench.model), "dtype": "bfloat16", "quantization": "nf4"}
    trained = bench.train(f"nf4-{strategy}", strategy, model=model)
    assert trained.error is None
    expected = [report.eval_loss for report in bench.alone().reports]  # four bits of a tiny random base cost little
    assert [report.eval_loss for report in trained.reports] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("batch", "accumulation", "workers", "share"),
    [(4, 1, 1, (4, 1)), (4, 1, 2, (2, 1)), (4, 2, 2, (4, 1)), (1, 8, 4, (1, 2)), (3, 4, 2, (3, 2)), (3, 2, 2, (3, 1))],
)
def test_the_rows_of_a_step_stay_the_same_and_no_worker_holds_more(batch, accumulation, workers, share):
    assert share_of_batch(batch, accumulation, workers) == share
    assert share[0] * share[1] * workers == batch * accumulation


def test_rows_that_workers_cannot_divide_are_no_trial():
    with pytest.raises(InfeasibleError, match="3 x 1 rows cannot be divided among 2 workers"):
        share_of_batch(3, 1, 2)


# What ran is what was asked


def test_fsdp_that_became_ddp_is_infeasible_and_says_so(bench):
    trained = bench.train("fallback", "fsdp", shim=False)
    assert trained.reports == []
    assert trained.error is not None
    kind, text = trained.error
    assert kind == "InfeasibleError"
    assert re.match(r"fsdp with 2 workers was asked for, but 48 parameters are on every worker whole", text)


def test_fewer_workers_than_asked_for_are_infeasible(bench):
    spec = bench.spec("ddp", 2)
    with pytest.raises(InfeasibleError, match="ddp with 2 workers was asked for, but the trainer found 1") as caught:
        run_trial(spec, bench.config(spec), bench.sweep, bench.folder / "fewer", lambda report, save: None)
    assert caught.value.cause == "strategy"


def test_a_base_that_was_not_quantised_is_infeasible(bench, monkeypatch):
    """As when a library drops what it cannot do: here the loader is told of no quantisation."""
    model = {"name": str(bench.model), "dtype": "bfloat16", "quantization": "nf4"}
    spec = bench.spec("ddp", 1, model=model)
    monkeypatch.setattr("tuner.training.model.quantization_config", lambda *arguments: None)
    with pytest.raises(InfeasibleError, match=r"of model\.quantization nf4 the layers are not quantised"):
        run_trial(spec, bench.config(spec), bench.sweep, bench.folder / "plain", lambda report, save: None)


# The estimate


def test_the_estimate_of_the_base_is_its_size_in_memory(tiny_model_dir, tmp_path):
    spec = spec_for(tiny_model_dir, tmp_path)
    found = estimate(largest_trial(spec, tmp_path), spec.resources, tmp_path)
    weights = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    assert found.base == sum(weight.numel() * 4 for weight in weights.parameters())
    assert found.total == sum(dataclasses.asdict(found).values())


def a_large_model(folder: Path) -> Path:
    """7.6 billion weights, as a config alone."""
    LlamaConfig(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder


class Device:
    total_memory = 0


@pytest.mark.parametrize(
    ("gib", "quantization", "workers", "chosen"),
    [
        (80, "none", 2, r"ddp: a worker needs 15\.\d GiB of 72\.0 GiB$"),
        (16, "none", 4, r"fsdp: a worker needs \d\.\d GiB of 14\.4 GiB, 15\.\d GiB with ddp$"),
        (4, "none", 2, r"fsdp: .* of 3\.6 GiB, 15\.\d GiB with ddp, likely too much: use more workers, or offload$"),
        (16, "nf4", 2, r"ddp: a worker needs 6\.\d GiB of 14\.4 GiB$"),
        (8, "int8", 2, r"ddp: .* of 7\.2 GiB: too much, but int8 weights of a bfloat16 model cannot be sharded$"),
        (None, "none", 2, r"ddp: a worker needs 15\.\d GiB; without a GPU auto shards nothing$"),
    ],
)
def test_auto_is_ddp_where_a_worker_fits_onto_the_device_and_fsdp_elsewhere(
    gib, quantization, workers, chosen, tmp_path, monkeypatch
):
    model = {"name": str(a_large_model(tmp_path)), "quantization": quantization}
    spec = spec_for(tmp_path, tmp_path, model=model, lora={"r": 16}, resources={"workers_per_trial": workers})
    if gib is not None:  # this machine has none to ask
        monkeypatch.setattr(Device, "total_memory", gib * 2**30)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Device)
    found = choose_strategy(spec, tmp_path)
    assert re.match(chosen, found.reason)
    assert found.reason.startswith(f"{found.name}:")


# The settings


@pytest.mark.parametrize("name", sorted(DEEPSPEED))
def test_the_files_of_the_cluster_folder_are_the_defaults(name):
    file = Path(__file__).parents[2] / "cluster" / "deepspeed" / f"{name}.json"
    assert json.loads(file.read_text()) == DEEPSPEED[name]
    assert DEEPSPEED[name]["zero_optimization"]["stage"] == int(name[-1])


def test_the_names_that_settings_may_have_are_the_libraries_own():
    from deepspeed.runtime import config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    assert set(ZERO_KEYS) <= {*fields, *(field.alias for field in fields.values())}
    read = inspect.getsource(config) + inspect.getsource(inspect.getmodule(DeepSpeedZeroConfig))
    from deepspeed.runtime import constants

    words = {value for value in vars(constants).values() if isinstance(value, str)}
    unknown = [key for key in DEEPSPEED_KEYS if key not in words and f'"{key}"' not in read]
    assert set(unknown) <= {"activation_checkpointing", "comms_logger", "flops_profiler", "aio"}  # modules of their own
    assert {key.partition(".")[0] for key in AUTO_ONLY} <= set(DEEPSPEED_KEYS)
    processed = inspect.getsource(TrainingArguments._process_fsdp_args)
    assert all(f'"{key}"' in processed for key in [*FSDP_KEYS, *FSDP_OWNED])
