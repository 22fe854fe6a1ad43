"""All of a sweep has one base: the commit that a branch stood for, and files that are still the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.made_by_hand import make_spec
from tests.training.test_trial import spec_for
from tuner.errors import TunerError
from tuner.training.baseline import prepare_sweep
from tuner.training.identity import identify, with_commit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, which knows `main` of org/model and can ask nobody."""
    from huggingface_hub import constants

    model = tmp_path / "hub" / "models--org--model"
    (model / "snapshots" / COMMIT).mkdir(parents=True)
    (model / "snapshots" / COMMIT / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return model


def test_a_branch_of_the_hub_becomes_the_commit_it_stands_for(hub_cache, tmp_path):
    spec = with_commit(make_spec(tmp_path, model={"name": "org/model"}))
    assert spec.model.revision == COMMIT
    (hub_cache / "refs" / "main").write_text("f" * 40)
    assert with_commit(spec) == spec
    assert identify(spec.model.model_dump()) == {"commit": COMMIT}


def test_a_model_that_cannot_be_had_is_refused_before_anything_begins(hub_cache, tmp_path):
    with pytest.raises(TunerError, match="org/other at main cannot be had from the hub"):
        with_commit(make_spec(tmp_path, model={"name": "org/other"}))


@pytest.fixture
def base(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))


def _change(base: Path) -> None:
    """One bit of the weights, their size and time as before; and what nobody loads."""
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (base / "README.md").write_text("new")


def test_a_sweep_whose_base_has_changed_is_not_gone_on_with(base, tmp_path):
    spec = spec_for(base, tmp_path)
    known = prepare_sweep(spec, lambda stage, done, total: None)
    assert prepare_sweep(spec, lambda stage, done, total: None, known) == known
    _change(base)
    with pytest.raises(TunerError, match=r"has changed since the sweep began: model\.safetensors$"):
        prepare_sweep(spec, lambda stage, done, total: None, known)
