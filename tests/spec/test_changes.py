"""What differs between two specs, and what a sweep that has begun may still be told."""

from __future__ import annotations

import pytest

from tests.made_by_hand import make_spec, make_sweep
from tuner.errors import SpecError, TunerError
from tuner.results.store import Store
from tuner.spec.changes import differences, with_more_budget
from tuner.spec.load import load_spec


def test_differences_are_named_by_their_dotted_keys(good):
    changed = load_spec(
        good, ["budget.trials=9", "search.startup_trials=3", "lora=null", "space.lora.r=null", "train.seed=1"]
    )
    assert differences(load_spec(good), changed) == {
        "budget.trials": (6, 9),
        "space.lora.r.type": ("choice", None),
        "space.lora.r.values": ([4, 8], None),
        "train.seed": (None, 1),
        "lora": ({}, None),
    }


def test_every_budget_of_a_whole_sweep_may_grow(good):
    limits = ["budget.time_limit=1h", "budget.tokens=100000", "budget.gpu_hours=1", "budget.disk=1GB"]
    spec = load_spec(good, limits)
    assert with_more_budget(spec, []) == spec
    more = [
        "budget.trials=7",
        "budget.time_limit=2h",
        "budget.tokens=200000",
        "budget.gpu_hours=null",
        "budget.disk=2GB",
    ]
    assert differences(spec, with_more_budget(spec, more)) == {
        "budget.trials": (6, 7),
        "budget.time_limit": (3600, 7200),
        "budget.tokens": (100_000, 200_000),
        "budget.gpu_hours": (1.0, None),
        "budget.disk": (10**9, 2 * 10**9),
    }


def test_files_that_are_not_on_this_machine_are_no_obstacle(good, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a row"}\n')
    spec = load_spec(good, [f"data.path={rows}"])
    rows.unlink()
    assert with_more_budget(spec, ["budget.trials=7"]).budget.trials == 7


def test_where_new_sweeps_would_be_kept_changes_nothing_of_one_that_is_there(good, monkeypatch):
    spec = load_spec(good)
    monkeypatch.setenv("TUNER_ROOT", "/somewhere/else")
    assert differences(spec, with_more_budget(spec, ["budget.trials=7"])) == {"budget.trials": (6, 7)}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("budget.trials=5", "budget.trials: got 5; allowed: 6, as the sweep began: only budget.trials, "),
        ("train.seed=1", "train.seed: got 1; allowed: null, as the sweep began: only budget.trials, "),
        ("budget.time_limit=1h", "budget.time_limit: got 3600.0; allowed: null, as the sweep began"),
        ("budget.evals_per_trial=9", "budget.evals_per_trial: got 9; allowed: "),
        ("budget.trails=9", "budget.trails: got an unknown key"),
        ("trials", "--set trials: got 'trials'; allowed: key=value"),
    ],
)
def test_any_other_change_is_refused_with_what_the_sweep_began_with(override, said, good):
    with pytest.raises(SpecError) as refused:
        with_more_budget(load_spec(good), [override])
    assert said in str(refused.value)


def test_a_sweep_that_is_there_is_refused_with_what_differs(tmp_path):
    make_sweep(tmp_path)
    with pytest.raises(TunerError) as refused:
        Store.refuse_existing(make_spec(tmp_path, train={"max_length": 512, "seed": 0}))
    assert "with another spec (train.max_length is 256, not 512)" in str(refused.value)
    with pytest.raises(TunerError) as refused:
        Store.refuse_existing(make_spec(tmp_path))
    assert "another spec" not in str(refused.value)
