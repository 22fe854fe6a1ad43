"""Commands whose streams are closed, lead to a full disk, or to a program that has ended."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from real_sweeps import TUNER, write_spec

from tuner.cli.output import deliver
from tuner.errors import DiskFullError

pytestmark = pytest.mark.timeout(60)
FULL = Path("/dev/full")


def shell(words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What sh says of `tuner` and these words, redirections included."""
    return subprocess.run(["sh", "-c", f"{TUNER} {words}"], cwd=folder, capture_output=True, text=True, timeout=50)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("ls --root . >&-", 0),
        ("--help >&-", 0),
        ("check wanting.yaml >&-", 2),
        ("check wanting.yaml 2>&-", 2),
        ("ls --root . <&- >&- 2>&-", 0),
        ("check wanting.yaml <&- >&- 2>&-", 2),
    ],
)
def test_a_stream_that_is_closed_takes_what_is_said_and_the_exit_code_stays(tmp_path, words, code):
    done = shell(words, tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_does_not_get_the_number_of_a_closed_stream(tmp_path):
    write_spec(tmp_path, tmp_path, "some")
    (tmp_path / "model.safetensors").touch()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "Traceback" not in shell("check some.yaml <&- >&- 2>&-; true", tmp_path).stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", ["--version", "--help", "ls --root . --json"])
def test_a_full_disk_behind_stdout_is_said(tmp_path, words):
    done = shell(f"{words} >{FULL}", tmp_path)
    assert (done.returncode, done.stderr) == (1, "tuner: cannot write what was found: the disk is full\n")
    assert shell(f"{words} >{FULL} 2>{FULL}", tmp_path).returncode == 1


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("content", ["a line\n", b"\0" * 10_000_000])
def test_a_full_disk_under_output_is_said(content):
    with pytest.raises(DiskFullError, match=f"cannot write all of {FULL}: its disk is full"):
        deliver(content, FULL)


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([TUNER, "--help"], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True, timeout=50)
    os.close(write)
    assert (done.returncode, done.stderr) in [(0, ""), (1, "")]
