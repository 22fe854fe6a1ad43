"""A small spec without a fault, to break one value at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuner.spec.load import check_file

GOOD = """\
name: good
model: {name: org/model}
data: {path: org/rows}
space:
  train.learning_rate: {type: log_uniform, low: 1e-5, high: 1e-3}
  train.packing: {type: choice, values: [none, bfd]}
  lora.r: {type: choice, values: [4, 8]}
budget: {trials: 6, tokens_per_trial: 2_000}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A YAML file that is right."""
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)
    return file


@pytest.fixture
def messages_of(good: Path):
    """What is said of the good spec with `a.b=value` overrides laid over it."""

    def messages(*overrides: str) -> list[str]:
        return [str(problem) for problem in check_file(good, overrides)[1]]

    return messages
