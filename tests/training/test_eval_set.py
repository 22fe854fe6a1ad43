"""Trials are scored on the rows that the sweep began with, or not at all: a damaged evaluation set is made again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, load_from_disk

from tests.training.test_trial import spec_for
from tuner.errors import DataError
from tuner.execution.engine import EngineActor
from tuner.spec.layout import SweepFolder
from tuner.spec.sweep import SweepSpec
from tuner.training.baseline import Preparation, load_base, prepare_sweep, score_base, whole_eval_set
from tuner.training.eval_set import fingerprint


def cut_to_two_rows(folder: Path) -> None:
    replace(folder, load_from_disk(str(folder)).select(range(2)))


def change_one_label(folder: Path) -> None:
    rows = load_from_disk(str(folder)).to_list()
    rows[0]["labels"][-1] += 1
    replace(folder, Dataset.from_list(rows))


def replace(folder: Path, rows: Dataset) -> None:
    rows.save_to_disk(str(folder.with_name("other")))
    shutil.rmtree(folder)
    folder.with_name("other").rename(folder)


def truncate(folder: Path) -> None:
    (file,) = folder.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:700])


def flip_bits(folder: Path) -> None:
    (file,) = folder.glob("*.arrow")
    content = bytearray(file.read_bytes())
    content[-900:-400] = bytes(byte ^ 0x55 for byte in content[-900:-400])
    file.write_bytes(content)


def put_a_file_in_its_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


DAMAGES = [
    cut_to_two_rows,
    change_one_label,
    truncate,
    flip_bits,
    put_a_file_in_its_place,
    shutil.rmtree,
    lambda folder: (folder / "state.json").write_text('{"_data_files": '),
    lambda folder: replace(folder, Dataset.from_list([{"text": "other columns"}])),
]


@pytest.fixture(scope="module")
def begun(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepSpec, Preparation]:
    """A sweep that is prepared, and what was found."""
    spec = spec_for(tiny_model_dir, tmp_path_factory.mktemp("begun"))
    return spec, prepare_sweep(spec, lambda stage, done, total: None)


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_evaluation_set_that_is_not_what_it_was_is_made_again_before_it_is_used(
    begun, damage: Callable[[Path], None]
):
    spec, known = begun
    expected = known.data["fingerprints"]["eval"]
    folder = SweepFolder.of(spec).eval_rows
    damage(folder)
    assert whole_eval_set(spec, expected) == folder
    assert fingerprint(load_from_disk(str(folder))) == expected
    assert sorted(folder.parent.iterdir()) == [folder]


def test_it_is_held_against_its_fingerprint_by_resume_by_the_base_s_score_and_by_an_engine(begun, monkeypatch):
    spec, known = begun
    folder = SweepFolder.of(spec).eval_rows
    cut_to_two_rows(folder)
    assert prepare_sweep(spec, lambda stage, done, total: None, known) == known
    assert len(load_from_disk(str(folder))) == known.data["rows_eval"] > 2
    cut_to_two_rows(folder)
    assert score_base(spec, load_base(spec), known).as_dict() == pytest.approx(known.baseline)
    cut_to_two_rows(folder)
    for variable in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(variable, "2")
    actor = EngineActor(spec.model_dump(mode="json"), 2, load=True)
    assert actor._serving(known.as_dict()).score_base().as_dict() == pytest.approx(known.baseline, abs=1e-5)


def test_where_the_data_give_other_rows_or_are_gone_it_is_refused_and_left_as_it_is(begun, tmp_path):
    spec, known = begun
    expected = known.data["fingerprints"]["eval"]
    folder = SweepFolder.of(spec).eval_rows
    shutil.copytree(folder, tmp_path / "whole")
    cut_to_two_rows(folder)
    gone = spec.model_copy(update={"data": spec.data.model_copy(update={"path": str(tmp_path / "gone.jsonl")})})
    other = spec.model_copy(update={"data": spec.data.model_copy(update={"seed": 99})})
    for changed in (gone, other):
        with pytest.raises(DataError, match=r"its 2 rows are not those that the sweep began with; nor can it be made"):
            whole_eval_set(changed, expected)
        assert len(load_from_disk(str(folder))) == 2
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="eval: it is gone; nor can it be made again from"):
        whole_eval_set(gone, expected)
    shutil.copytree(tmp_path / "whole", folder)


def test_in_an_object_store_too(tiny_model_dir, tmp_path, s3_root):
    spec = spec_for(tiny_model_dir, tmp_path)
    spec = spec.model_copy(update={"storage": spec.storage.model_copy(update={"root": s3_root})})
    known = prepare_sweep(spec, lambda stage, done, total: None)
    expected, sweep = known.data["fingerprints"]["eval"], SweepFolder.of(spec)
    folder = sweep.root.fetch(sweep.eval_rows)
    cut_to_two_rows(folder)
    sweep.root.forget(folder.with_name("other"))
    sweep.root.objects.put(folder, sweep.root._key(folder))
    for damage in (lambda: None, lambda: sweep.root.forget(sweep.eval_rows)):
        damage()
        assert fingerprint(load_from_disk(str(whole_eval_set(spec, expected)))) == expected
        assert fingerprint(load_from_disk(str(sweep.root.fetch(sweep.eval_rows)))) == expected
