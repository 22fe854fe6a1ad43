"""A cache entry is whole or not there, whoever is killed while making it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.made_by_hand import fill
from tuner.errors import DataError, DiskFullError
from tuner.spec.layout import LEFT_TO_RECORDS
from tuner.training.cache import make_once, read_complete

APPENDING_BUILD = """
import sys, time
from pathlib import Path
from tuner.training.cache import make_once
def build(folder):
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    time.sleep(0.2)
    (folder / "rows").write_text("all of it")
    return {"rows": 1}
print(make_once(Path(sys.argv[1]), build))
"""


def test_of_several_processes_one_builds_and_the_others_wait(tmp_path: Path) -> None:
    command = [sys.executable, "-c", APPENDING_BUILD, str(tmp_path / "entry"), str(tmp_path / "log")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["{'rows': 1}\n"] * 4
    assert (tmp_path / "log").read_text() == "built\n"


SLOW_BUILD = """
import sys, time
from pathlib import Path
from tuner.training.cache import make_once
def build(folder):
    (folder / "half").write_text("half of it")
    Path(sys.argv[2]).touch()
    time.sleep(60)
    return {}
make_once(Path(sys.argv[1]), build)
"""


def test_a_killed_builder_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    entry, building = tmp_path / "cache" / "entry", tmp_path / "building"
    process = subprocess.Popen([sys.executable, "-c", SLOW_BUILD, str(entry), str(building)])
    wait_for(building.exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_complete(entry) is None

    def build(folder: Path) -> dict[str, Any]:
        (folder / "all").write_text("all of it")
        return {"rows": 1}

    assert make_once(entry, build) == {"rows": 1}
    assert sorted(path.name for path in entry.parent.iterdir()) == ["entry", "entry.lock"]
    assert sorted(path.name for path in entry.iterdir()) == ["all", "complete.json"]


def test_a_build_that_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("half of it")
        raise DataError("no")

    with pytest.raises(DataError):
        make_once(tmp_path / "entry", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["entry.lock"]
    assert make_once(tmp_path / "entry", lambda folder: {"made": True}) == {"made": True}
    assert make_once(tmp_path / "entry", fail) == {"made": True}


@pytest.mark.parametrize("fills", ["before", "while it is built"])
def test_an_entry_leaves_the_last_of_a_disk_to_the_records(disk: Path, fills: str) -> None:
    def build(folder: Path) -> dict[str, Any]:
        assert fills == "while it is built"
        (folder / "rows").write_bytes(bytes(20 * 2**20))
        return {"rows": 1}

    filler = fill(disk, LEFT_TO_RECORDS + (-1 if fills == "before" else 10) * 2**20)
    with pytest.raises(DiskFullError, match="67 MB are left to the records"):
        make_once(disk / "entry", build)
    assert [path.name for path in disk.iterdir() if path != filler] == ["entry.lock"]


def test_an_entry_that_is_a_link_is_made_anew_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    make_once(tmp_path / "elsewhere", lambda folder: {"made": "there"})
    (tmp_path / "entry").symlink_to(tmp_path / "elsewhere")
    assert make_once(tmp_path / "entry", lambda folder: {"made": "here"}) == {"made": "here"}
    assert read_complete(tmp_path / "elsewhere") == {"made": "there"}


def test_an_entry_is_made_anew_when_a_figure_of_its_summary_has_changed(tmp_path: Path) -> None:
    assert make_once(tmp_path / "entry", lambda folder: {"tokens": 1200}) == {"tokens": 1200}
    record = tmp_path / "entry" / "complete.json"
    record.write_text(record.read_text().replace("1200", "1000"))
    assert make_once(tmp_path / "entry", lambda folder: {"tokens": 1200}) == {"tokens": 1200}


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
