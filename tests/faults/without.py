"""What the tests of the matrix say when a defence is missing: each is taken away in a copy of the code, one at a time.

    python -m tests.faults.without                       # all, half an hour
    python -m tests.faults.without "NaN at step 3" ...   # those of these rows

What they say is written to results/without.txt. A test that passes without its defence proves nothing of it: then this
ends with exit code 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "without.txt"
MARK = "TUNER_TEST_WITHOUT"
"""Variable that all processes of a run inherit."""
LONGEST_S = 420.0
"""A test that is not over by then hangs without its defence, and has failed."""


@dataclass(frozen=True)
class Defence:
    """Something that a row of the matrix is there for, and how it is taken away."""

    row: str
    missing: str
    file: str
    """In tests/faults, of the test that must fail."""
    chosen: str
    """Of that file's tests, as `pytest -k` takes it."""
    edits: tuple[tuple[str, str, str], ...]
    """A file in tuner/, a text that stands in it once, and what stands there instead."""
    longest_s: float = LONGEST_S

    @property
    def title(self) -> str:
        return f"{self.row}\n  without: {self.missing}"


RETRIES = (
    "execution/retries.py",
    'TIMES = {"worker-lost": 2, "preempted": 5, "stuck": 1}',
    "TIMES: dict[str, int] = {}",
)
UNFINISHED = ("search/study.py", "[trial for trial in trials if trial.state == TrialState.RUNNING]", "[]")
PERSISTENCE = ("results/database.py", "if not _is_away(error) or time.monotonic() > end:", "if True:")
PATIENCE = ("results/database.py", "BUSY_TIMEOUT_S = 60\n", "BUSY_TIMEOUT_S = 0\n")
RESERVE = ("spec/layout.py", "if free - size < LEFT_TO_RECORDS:", "if free - size < 0:")
TUNES_OWN = (
    ("execution/on_tune.py", 'name=f"run-{time.time_ns()}",', 'name="run",'),
    (
        "execution/on_tune.py",
        "    scheduler = StudyScheduler(take)\n",
        """    scheduler = StudyScheduler(take)
    if (store.folder.ray / "run").exists():
        trainable = tune.with_resources(tune.with_parameters(dedicated_trial, job=job), coordinator)
        tune.Tuner.restore(str(store.folder.ray / "run"), trainable).fit()
        return
""",
    ),
)

DEFENCES = (
    Defence(
        "a worker killed mid-step", "what is lost is tried again", "test_workers.py", "alone and in_a_step", (RETRIES,)
    ),
    Defence(
        "a worker killed mid-evaluation",
        "a checkpoint at every evaluation",
        "test_workers.py",
        "alone and in_an_evaluation",
        (("training/trial.py", "more and can_go_on(args) and report.is_finite()", "False"),),
    ),
    Defence(
        "a worker killed mid-save",
        "half a checkpoint is none",
        "test_workers.py",
        "alone and in_a_save",
        (("training/checkpoint.py", " if root.exists(folder / name / CHECKPOINT_REPORT)]", "]"),),
    ),
    Defence(
        "the driver killed at 20 random moments",
        "unfinished trials are asked for again",
        "test_driver.py",
        "2-1",
        (UNFINISHED,),
    ),
    Defence(
        "the driver killed between training's end and the store's commit",
        "unfinished trials are asked for again",
        "test_cut_off.py",
        "before_it_wrote_down",
        (UNFINISHED,),
    ),
    Defence(
        "an engine killed with 4 slots in it", "what is lost is tried again", "test_workers.py", "four", (RETRIES,)
    ),
    Defence(
        "an engine killed with 4 slots in it",
        "a slot's state at every evaluation",
        "test_workers.py",
        "four",
        (("training/shared/slot.py", "new.replace(state)", "new.unlink()"),),
    ),
    Defence("a raylet removed", "what is lost is tried again", "test_nodes.py", "on_another and alone", (RETRIES,)),
    Defence(
        "the head killed and restarted",
        "a watch over the head",
        "test_nodes.py",
        "own_records",
        (("execution/head.py", "if not ray.is_initialized() or threading", "if True or threading"),),
    ),
    Defence(
        "the head killed and restarted",
        "a checkpoint has all reports",
        "test_nodes.py",
        "own_records",
        (("training/trial.py", "for earlier in self._reports[:-1]:", "for earlier in ():"),),
    ),
    Defence(
        "rank 0 raising while rank 1 waits in a collective",
        "the error of the worker that failed",
        "test_standstill.py",
        "fails_while",
        (("execution/trial.py", "failures = list(error.worker_failures.values())", "pass"),),
    ),
    Defence(
        "a train loop that sleeps for ever",
        "the watchdog",
        "test_standstill.py",
        "alone and sleeps",
        (
            (
                "training/watchdog.py",
                "elif now - since > longest_move(self._stuck_after, self._slowest):",
                "elif False:",
            ),
        ),
        longest_s=120,
    ),
    Defence(
        "a train loop that sleeps for ever",
        "what is stuck is tried again",
        "test_standstill.py",
        "lane and sleeps",
        (RETRIES,),
    ),
    Defence(
        "NaN at step 3",
        "no score that is no number",
        "test_workers.py",
        "diverges",
        (
            ("search/study.py", "if not report.is_finite() or report.eval_loss > self._hopeless:", "if False:"),
            ("training/trial.py", "    if not report.is_finite():\n        raise", "    if False:\n        raise"),
        ),
    ),
    Defence(
        "an error after the best score",
        "only who completed may win",
        "test_outcomes.py",
        "does_not_win",
        (
            (
                "results/ranking.py",
                'if record.outcome == "COMPLETED"\n        and (report :=',
                "if (report :=",
            ),
            (
                "results/ranking.py",
                "and (record.cause == NO_IMPROVEMENT or record.reached >= (tokens_per_trial or 0))",
                "",
            ),
        ),
    ),
    Defence(
        "all trials failing",
        "no success is a failure",
        "test_outcomes.py",
        "all_fail",
        (("execution/sweep.py", 'store.set_status("failed", "no trial', 'store.set_status("finished", "no trial'),),
    ),
    Defence(
        "a store locked by another process",
        "waiting for who holds the database",
        "test_database.py",
        "who_has_locked",
        (PERSISTENCE, PATIENCE),
    ),
    Defence("a PostgreSQL restart mid-sweep", "writing again", "test_database.py", "comes_back", (PERSISTENCE,)),
    Defence(
        "a truncated adapter",
        "a damaged file is refused before it is merged",
        "test_cut_off.py",
        "adapter_that_was_cut_short",
        (("promotion/adapter.py", "except SafetensorError as error:", "except KeyError as error:"),),
    ),
    Defence(
        "a truncated checkpoint",
        "a damaged state is left aside",
        "test_cut_off.py",
        "checkpoint_was_cut_short",
        (("training/shared/slot.py", "except SafetensorError as damage:", "except KeyError as damage:"),),
    ),
    Defence("a truncated Tune snapshot", "going on from our own records", "test_damaged.py", "tunes_files", TUNES_OWN),
    Defence("truncated searcher state", "going on from our own records", "test_damaged.py", "tunes_files", TUNES_OWN),
    Defence(
        "a truncated cache file",
        "checksums",
        "test_damaged.py",
        "tunes_files",
        (("training/cache.py", 'record["files"] == checksums(folder)', "True"),),
    ),
    Defence(
        "two processes filling one cache",
        "one builds at a time",
        "test_damaged.py",
        "fill_one_cache",
        (("training/cache.py", 'with FileLock(f"{folder}.lock"):', "if True:"),),
    ),
    Defence("disk full in a checkpoint", "the records' reserve", "test_disk.py", "fails_trials", (RESERVE,)),
    Defence("disk full in promotion", "the records' reserve", "test_disk.py", "promotion_without", (RESERVE,)),
    Defence(
        "a kill between promotion's write and rename",
        "what a killed promotion left is removed",
        "test_cut_off.py",
        "before_its_rename",
        (("promotion/registry.py", 'for leftover in home.glob(f"{_INCOMING}*"):', "for leftover in ():"),),
    ),
    Defence(
        "a second Ray cluster on the host",
        "a second one is refused",
        "test_database.py",
        "who_has_locked",
        (("execution/machine.py", 'if address == "local" and running:', "if False:"),),
    ),
    Defence(
        "a dashboard that never answers",
        "an end to waiting",
        "test_network.py",
        "never_answers",
        (("spec/in_time.py", "thread.join(seconds)", "thread.join()"),),
        longest_s=120,
    ),
    Defence(
        "a port drawn that Ray takes for itself",
        "ports that nobody else takes",
        "test_network.py",
        "port",
        (("execution/session.py", "PORTS = range(20_000, 32_768)", "PORTS = range(20_000, 65_536)"),),
    ),
    Defence(
        "two drivers resuming one sweep",
        "one of several takes it over",
        "test_cut_off.py",
        "one_does",
        (
            (
                "results/store.py",
                "if not self._update(values, unchanged):",
                "if not self._update(values):",
            ),
            ("results/store.py", "        self.refuse_driven(seen)\n", ""),
        ),
    ),
    Defence(
        "a clock that jumps",
        "a driver may live whose heartbeat is of another hour",
        "test_clock.py",
        "clock",
        (("results/store.py", "if may_live(seen):", "if False:"),),
    ),
    Defence(
        "200 trials each reporting 50 times with a reader polling",
        "a reader that holds up no writer",
        "test_database.py",
        "200",
        (("results/database.py", "PRAGMA journal_mode=WAL", "PRAGMA journal_mode=DELETE"), PERSISTENCE, PATIENCE),
    ),
)


def copy(folder: Path) -> None:
    """The checkout as it is, but for what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def without(defence: Defence, scratch: Path) -> str | None:
    """What the defence's test says when it is missing; None when it passes."""
    checkout = scratch / "checkout"
    copy(checkout)
    for file, text, instead in defence.edits:
        code = checkout / "tuner" / file
        code.write_text(code.read_text(encoding="utf-8").replace(text, instead), encoding="utf-8")
    mark = uuid.uuid4().hex
    paths = {"PYTHONPATH": str(checkout), "TMPDIR": str(scratch)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "", "-k", defence.chosen]
    command.append(f"tests/faults/{defence.file}")
    said = scratch / "said.txt"
    with said.open("w") as file:
        running = subprocess.Popen(
            command,
            cwd=checkout,
            env=os.environ | paths | {MARK: mark},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            code = running.wait(defence.longest_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(mark)
    if code == 0:
        return None
    assert code in (1, None), said.read_text()  # that is no test that failed
    errors = [line[1:].strip() for line in said.read_text().splitlines() if line.startswith("E  ")]
    return errors[0][:160] if errors else f"nothing in {defence.longest_s:.0f} s"


def end(mark: str) -> None:
    """Kill whatever a run has started and not ended."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                process.kill()


def read() -> dict[str, str]:
    """What tests have said, by the title of the defence that was missing."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    return {title: said for title, _, said in (block.rpartition("\n") for block in text.strip().split("\n\n"))}


def main(rows: Collection[str]) -> int:
    known, in_vain = read(), False
    for defence in DEFENCES:
        if rows and defence.row not in rows:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="w", dir="/tmp", ignore_cleanup_errors=True) as scratch:
            said = without(defence, Path(scratch))
        in_vain |= said is None
        known[defence.title] = "  " + (said or "passed").replace(scratch, "...")
        print(f"{defence.title}\n{known[defence.title]}\n  {time.monotonic() - began:.0f} s", flush=True)
        blocks = [f"{one.title}\n{known[one.title]}" for one in DEFENCES if one.title in known]
        RESULTS.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return int(in_vain)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
