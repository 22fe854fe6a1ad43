"""What takes a GPU is refused by `tuner check` where trials have none."""

from __future__ import annotations

import pytest

from tuner.spec.checks import needs
from tuner.spec.checks.needs import why_gpu
from tuner.spec.load import check_file, load_spec

TAKES_A_GPU = {
    "train.optim=paged_adamw_8bit": "train.optim: got 'paged_adamw_8bit'; allowed: others: it keeps its state",
    "train.optim=galore_adamw_8bit train.optim_target_modules=all-linear": "train.optim: got 'galore_adamw_8bit'",
    "train.optim=galore_adamw_8bit_layerwise train.optim_target_modules=all-linear": "train.optim: got",
    "train.optim=adalomo": "train.optim: got 'adalomo'; allowed: others: it is written for GPUs, and no trial has one",
    "train.tf32=true": "train.tf32: got true; allowed: others: it is a number format of GPUs",
    "train.activation_offloading=true": "train.activation_offloading: got true",
    "model.attn_implementation=flash_attention_2": "model.attn_implementation: got 'flash_attention_2'",
    "space.train.tf32={type: choice, values: [true, false]}": "space.train.tf32: got true",
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine that has GPUs or not, whatever this one has."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(needs, "GPU_DEVICES", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.setattr(needs.importlib.util, "find_spec", lambda name: object())  # every package is there

    def has(gpus: int) -> None:
        for number in range(gpus):
            (tmp_path / f"nvidia{number}").touch()

    return has


@pytest.mark.parametrize("overrides", TAKES_A_GPU)
def test_what_takes_a_gpu_is_refused_where_there_is_none(overrides, machine, good):
    changes = _split(overrides)
    said = [str(problem) for problem in check_file(good, changes)[1]]
    assert len(said) == 1
    assert said[0].startswith(TAKES_A_GPU[overrides])
    assert [str(problem) for problem in check_file(good, [*changes, "resources.gpus_per_worker=0"])[1]] == said


@pytest.mark.parametrize("overrides", TAKES_A_GPU)
def test_it_is_taken_where_trials_may_have_one(overrides, machine, good, monkeypatch):
    changes = _split(overrides)
    assert why_gpu(load_spec(good, [*changes, "resources.gpus_per_worker=1"]))
    assert check_file(good, changes, elsewhere=True)[0] is not None
    machine(2)
    assert check_file(good, changes)[0] is not None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check_file(good, changes)[0] is None
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # its nodes have what they have
    assert check_file(good, changes)[0] is not None


def test_no_other_optimizer_is_refused_for_want_of_a_gpu(machine, good):
    """Each of these took three steps on a CPU, with the package that it needs."""
    for optim in ("adamw_torch_8bit", "ademamix_8bit", "lion_32bit", "rmsprop_bnb_8bit", "stable_adamw", "grokadamw"):
        assert check_file(good, [f"train.optim={optim}"])[0] is not None, optim


def _split(overrides: str) -> list[str]:
    return [overrides] if overrides.startswith("space") else overrides.split()
