"""The gate as a table: when it agrees, and what it says when it does not."""

from __future__ import annotations

import math

import pytest

from tuner.promotion.gate import decide


def test_a_merged_model_better_than_base_and_incumbent_passes():
    assert decide("eval_loss", "minimize", 2.0, 2.01, 3.0, 2.5, 0.01) == []
    assert decide("mean_token_accuracy", "maximize", 0.5, 0.496, 0.3, None, 0.01) == []


@pytest.mark.parametrize(
    ("metric", "goal", "trial", "merged", "base", "incumbent", "said"),
    [
        ("eval_loss", "minimize", 2.0, 2.03, 3.0, None, "the merge made it worse: eval_loss 2.0300 after, 2.0000"),
        ("eval_loss", "minimize", 3.0, 3.0, 3.0, None, "not better than the base: eval_loss 3.0000 against 3.0000"),
        ("eval_loss", "minimize", 2.0, 2.0, 3.0, 1.9, "not better than what is promoted now: eval_loss 2.0000"),
        ("eval_loss", "minimize", 2.0, 2.0, 3.0, 2.0, "not better than what is promoted now"),
        (
            "mean_token_accuracy",
            "maximize",
            0.5,
            0.49,
            0.3,
            None,
            "the merge made it worse: mean_token_accuracy 0.4900",
        ),
        ("mean_token_accuracy", "maximize", 0.5, 0.5, 0.6, None, "not better than the base"),
        ("mean_token_accuracy", "maximize", 0.5, 0.5, 0.3, 0.6, "not better than what is promoted now"),
        ("eval_loss", "minimize", 2.0, math.nan, 3.0, None, "eval_loss of the merged model is nan"),
        ("eval_loss", "minimize", math.inf, 2.0, 3.0, None, "eval_loss of the trial is inf"),
        ("eval_loss", "minimize", 2.0, 2.0, math.nan, None, "eval_loss of the base is nan"),
        ("eval_loss", "minimize", 2.0, 2.0, 3.0, math.nan, "eval_loss of the promoted model is nan"),
    ],
)
def test_each_reason_is_given_with_its_figures(metric, goal, trial, merged, base, incumbent, said):
    reasons = decide(metric, goal, trial, merged, base, incumbent, 0.01)
    assert len(reasons) == 1
    assert said in reasons[0]


def test_every_reason_is_given_at_once():
    assert len(decide("eval_loss", "minimize", 2.0, 4.0, 3.0, 1.0, 0.01)) == 3


def test_the_allowed_regression_is_relative_to_the_size_of_the_score():
    assert decide("eval_loss", "minimize", 0.10, 0.105, 1.0, None, 0.01) != []
    assert decide("eval_loss", "minimize", 0.10, 0.105, 1.0, None, 0.06) == []
