"""What differs between two specs, and what a sweep that has begun may still be told."""

from __future__ import annotations

import pytest

from tests.made_by_hand import make_spec, make_sweep
from tuner.errors import SpecError, TunerError
from tuner.results.store import Store
from tuner.spec.changes import differences, with_more_trials
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


def test_a_sweep_takes_more_trials_and_nothing_else(good):
    spec = load_spec(good)
    assert with_more_trials(spec, []) == spec
    assert differences(spec, with_more_trials(spec, ["budget.trials=7"])) == {"budget.trials": (6, 7)}


def test_where_new_sweeps_would_be_kept_changes_nothing_of_one_that_is_there(good, monkeypatch):
    spec = load_spec(good)
    monkeypatch.setenv("TUNER_ROOT", "/somewhere/else")
    assert differences(spec, with_more_trials(spec, ["budget.trials=7"])) == {"budget.trials": (6, 7)}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("budget.trials=5", "budget.trials: got 5; allowed: 6, as the sweep began: only budget.trials may grow"),
        ("train.seed=1", "train.seed: got 1; allowed: null, as the sweep began: only budget.trials may grow"),
        ("budget.trails=9", "budget.trails: got an unknown key"),
        ("trials", "--set trials: got 'trials'; allowed: key=value"),
    ],
)
def test_any_other_change_is_refused_with_what_the_sweep_began_with(override, said, good):
    with pytest.raises(SpecError) as refused:
        with_more_trials(load_spec(good), [override])
    assert said in str(refused.value)


def test_a_sweep_that_is_there_is_refused_with_what_differs(tmp_path):
    make_sweep(tmp_path)
    with pytest.raises(TunerError) as refused:
        Store.refuse_existing(make_spec(tmp_path, train={"max_length": 512, "seed": 0}))
    assert "with another spec (train.max_length is 256, not 512)" in str(refused.value)
    with pytest.raises(TunerError) as refused:
        Store.refuse_existing(make_spec(tmp_path))
    assert "another spec" not in str(refused.value)
