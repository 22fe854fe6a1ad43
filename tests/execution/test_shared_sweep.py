"""A real sweep whose trials are slots on a shared base: every outcome, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.trial import TrialState

import tuner
from tests.execution.test_sweep import BAD, DIVERGING, GOOD, spec_for
from tuner.spec.load import parse_spec

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuner.Sweep:
    """The sweep of the dedicated suite, three slots wide, its second trial first so that it is worth stopping."""
    folder = tmp_path_factory.mktemp("shared")
    asked = spec_for(tiny_model_dir, folder).model_dump(mode="json")
    asked["name"] = "slots"
    asked["resources"] |= {"share_base": 3, "max_concurrent_trials": None}
    asked["budget"]["trials"] = 6
    return tuner.run(parse_spec(asked, folder))


def test_every_outcome_is_the_same_as_on_bases_of_their_own(finished):
    by_rate = {record.number: record for record in finished.records()}
    assert finished.status == "finished"
    assert by_rate[0].point["train.learning_rate"] == GOOD
    assert by_rate[0].outcome == "COMPLETED"
    assert by_rate[1].point["train.learning_rate"] == BAD
    assert by_rate[1].outcome == "STOPPED"
    assert by_rate[2].point["train.learning_rate"] == DIVERGING
    assert (by_rate[2].outcome, by_rate[2].cause) == ("INFEASIBLE", "diverged")
    assert (by_rate[3].outcome, by_rate[3].cause) == ("FAILED", "bug")
    assert "lomo" in (by_rate[3].reason or "")
    assert "Traceback" in (by_rate[3].log_tail or "")
    assert len(by_rate) == 6
    states = [trial.state for trial in finished.store.study.trials]
    assert TrialState.RUNNING not in states
    assert states[:4] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED, TrialState.FAIL]


def test_the_record_says_how_the_trials_shared(finished):
    sharing = finished.state().sharing
    assert sharing == {"slots": 3, "engines": 1, "reason": "resources.share_base is 3"}


def test_the_promoted_model_scores_as_the_slot_did(finished):
    promoted = finished.state().promoted
    assert promoted["trial"] == finished.best.number
    assert promoted["score_after"] == pytest.approx(finished.best.eval_loss, abs=1e-4)


def test_only_the_best_adapter_is_left(finished):
    left = {str(path.parent) for path in finished.folder.path.glob("trials/*/*/adapter_model.safetensors")}
    assert left == {finished.best.adapter_path}
