"""Files that Ray keeps of a sweep, or that are kept for the next one, are cut short or overwritten between two runs."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

import tuner
from tests.faults.matrix import Figures, difference_alone, measure, recovery_s
from tests.real_sweeps import write_spec
from tuner.results.record import utc_now
from tuner.spec.load import load_spec
from tuner.training.cache import COMPLETE

NAME, BUDGET = "damaged", 12_000


def overwrite(files: list[Path]) -> int:
    """Leave half of each, and that is nonsense."""
    for file in files:
        file.write_bytes(b"\x80\x04nonsense" * (file.stat().st_size // 20 + 1))
    return len(files)


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_sweep_goes_on_whatever_has_become_of_tunes_files_and_of_the_cache(
    tiny_model_dir, tmp_path, start, note, monkeypatch
):
    """The trial has two workers, so that Ray Tune keeps a snapshot and the searcher's state: nobody reads them."""
    root = tmp_path / "runs"
    budget = {"trials": 1, "tokens_per_trial": BUDGET, "evals_per_trial": 4}
    sections: dict[str, Any] = {"resources": {"workers_per_trial": 2}, "promotion": None, "storage": {"root": "runs"}}
    file = write_spec(tmp_path, tiny_model_dir, NAME, budget=budget, **sections)
    running = start("run", file, cwd=tmp_path, TUNE_GLOBAL_CHECKPOINT_S="0")
    running.wait_for(f"trial 0 at {BUDGET // 4:,} tokens")
    fault = utc_now()
    running.kill_driver()
    sweep = tuner.open(NAME, root)
    before = sweep.records()
    kept = [path for path in sweep.folder.ray.rglob("*") if path.is_file()]
    searcher = overwrite([path for path in kept if "search" in path.name])
    snapshot = overwrite([path for path in kept if "search" not in path.name])
    assert searcher > 0, kept
    assert snapshot > 0, kept
    entries = [path for path in (root / "cache" / "data").rglob("*") if path.name != COMPLETE]
    cached = [path for path in entries if path.suffix in (".arrow", ".json")]
    for path in cached:
        os.truncate(path, path.stat().st_size // 2)
    resumed = start("resume", NAME, "--root", root, cwd=tmp_path)
    assert resumed.end() == 0, resumed.lines
    sweep = tuner.open(NAME, root)
    said = sweep.folder.log.read_text(errors="replace")
    assert "trial 0 goes on from its last evaluation" in said + sweep.folder.trial_log(0).read_text(errors="replace")
    assert difference_alone(sweep, [0], tmp_path) <= 1e-4  # two workers add up in another order than one
    recover_s = [recovery_s(sweep, fault)]

    def figures(injected: int) -> Figures:
        return measure(sweep, injected, recover_s, before=[before])

    note("a truncated Tune snapshot", figures(snapshot))
    note("truncated searcher state", figures(searcher))
    note("a truncated cache file", figures(len(cached)))
    assert (sweep.status, figures(1).lost, figures(1).duplicated) == ("finished", 0, 0)


def prepare(file: Path, root: Path, both_there: Any) -> dict[str, Any]:
    """Prepare the data, and note what is built on the way, which takes so long that the other must come to it."""
    from tuner.training import cache
    from tuner.training.dataset import prepare as prepare_data
    from tuner.training.model import load_tokenizer

    build = cache._build

    def slowly(folder: Path, make: Any) -> dict[str, Any]:
        with (root / "built").open("a") as built:
            built.write(f"{folder.name}\n")
        time.sleep(1)
        return build(folder, make)

    cache._build = slowly
    spec = load_spec(file, root=root)
    model = spec.model.model_dump()
    tokenizer = load_tokenizer(model, root / "cache")
    both_there.wait(60)
    made = prepare_data(spec.data.model_dump(), spec.train, tokenizer, root / "cache", 64)
    return {**made.summary, "train": str(made.train), "eval": str(made.eval)}


@pytest.mark.timeout(120)
def test_two_processes_that_fill_one_cache_at_once_get_the_same_and_make_it_once(tiny_model_dir, tmp_path, note):
    file = write_spec(tmp_path, tiny_model_dir, NAME, budget={"trials": 1, "tokens_per_trial": BUDGET})
    root, processes = tmp_path / "runs", multiprocessing.get_context("spawn")
    root.mkdir()
    with processes.Manager() as manager, processes.Pool(2) as pool:
        one, other = pool.starmap(prepare, [(file, root, manager.Barrier(2))] * 2, chunksize=1)
    assert one == other
    entries = [path.name for path in (root / "cache" / "data").iterdir() if path.is_dir()]
    assert sorted(name.partition("-")[0] for name in entries) == ["eval", "rows", "tokens", "train"]
    built = (root / "built").read_text().splitlines()
    figures = Figures(injected=1, asked=0, lost=4 - len(entries), duplicated=len(built) - len(set(built)))
    note("two processes filling one cache", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)
