"""A real sweep whose trials are slots on a shared base: every outcome, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.trial import TrialState

import tuner
from tests.execution.test_sweep import BAD, DIVERGING, GOOD, spec_for
from tuner.spec.load import parse_spec

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("shared_ray")]


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuner.Sweep:
    """The sweep of the dedicated suite, two at a time, in an order that leaves no doubt who is compared with whom.

    The bad rate comes when the good one has reported: until then, that trial and those between hold both places.
    """
    folder = tmp_path_factory.mktemp("shared")
    asked = spec_for(tiny_model_dir, folder).model_dump(mode="json")
    asked["name"] = "slots"
    asked["resources"] |= {"share_base": 2, "max_concurrent_trials": None}
    asked["budget"]["trials"] = 6
    good, bad, diverging, galore, packed = asked["search"]["enqueue"]
    asked["search"]["enqueue"] = [good, diverging, galore, bad, packed]
    return tuner.run(parse_spec(asked, folder))


def test_every_outcome_is_the_same_as_on_bases_of_their_own(finished):
    records = finished.records()
    assert finished.status == "finished"
    assert [record.point["train.learning_rate"] for record in records[:4]] == [GOOD, DIVERGING, GOOD, BAD]
    assert [(record.outcome, record.cause) for record in records[:4]] == [
        ("COMPLETED", None),
        ("INFEASIBLE", "diverged"),
        ("FAILED", "bug"),
        ("STOPPED", "early stopping"),
    ]
    assert len(records) == 6
    states = [trial.state for trial in finished.store.study.trials]
    assert TrialState.RUNNING not in states
    assert states[:4] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.PRUNED]


def test_a_trial_that_trains_apart_fails_as_on_a_base_of_its_own(finished):
    failed = finished.trial(2)
    assert failed.point["train.optim"] == "galore_adamw"
    assert "'four'" in failed.reason
    assert "Traceback" in failed.log_tail
    assert failed.log_tail in finished.folder.trial_log(2).read_text()


def test_the_record_says_how_the_trials_shared(finished):
    sharing = finished.state().sharing
    assert (sharing["slots"], sharing["engines"]) == (2, 1)
    assert "resources.share_base is 2" in sharing["reason"]


def test_the_promoted_model_scores_as_the_slot_did(finished):
    promoted = finished.state().promoted
    assert promoted["trial"] == finished.best.number
    assert promoted["score_after"] == pytest.approx(finished.best.eval_loss, abs=1e-4)


def test_only_the_best_adapter_is_left(finished):
    left = {str(path.parent) for path in finished.folder.path.glob("trials/*/*/adapter_model.safetensors")}
    assert left == {finished.best.adapter_path}
