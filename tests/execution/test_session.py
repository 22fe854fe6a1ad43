"""What a cluster that is started here takes of this machine, and what it gives back."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from tuner.errors import MachineError
from tuner.execution import machine, session
from tuner.execution.session import LONGEST_FOLDER, free_port, remove_dead_sessions, removed_afterwards, short_folder

RAYS_OWN = {6379, 8265, 10001, 44217, 44227, 52365}


@pytest.fixture
def folder() -> Path:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="s") as folder:
        yield Path(folder)


def test_a_port_is_drawn_that_neither_ray_nor_the_system_takes():
    taken = RAYS_OWN | set(range(10_002, 20_000))
    system = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if system.exists():
        first, last = map(int, system.read_text().split())
        taken |= set(range(first, last + 1))
    assert not {free_port() for _ in range(300)} & taken


def test_where_every_port_is_taken_it_is_said(monkeypatch):
    monkeypatch.setattr(session.socket, "create_server", lambda address: os.open("/nowhere", os.O_RDONLY))
    with pytest.raises(MachineError, match="no port from 20000 to 32767 is free"):
        free_port()


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_folder_is_called_by_a_short_link_meanwhile(folder, monkeypatch, variable):
    long = folder / ("a" * 60) / ("b" * 60)
    long.mkdir(parents=True)
    monkeypatch.setenv(variable, str(long))
    for _ in range(2):  # the link is there already, the second time
        with short_folder():
            assert len(os.environ[variable]) <= LONGEST_FOLDER
            Path(os.environ[variable], "here").touch()
            link = os.environ[variable]
        assert (long / "here").exists()
        assert os.environ[variable] == str(long)
    os.unlink(link)


def test_a_link_of_somebody_else_is_not_followed(folder, monkeypatch):
    long = folder / ("a" * 90)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    with short_folder():
        link = os.environ["TMPDIR"]
    os.unlink(link)
    os.symlink("/etc", link)
    try:
        with (
            pytest.raises(MachineError, match=f"TMPDIR: .* {link}, a short name for it, cannot be made"),
            short_folder(),
        ):
            pass
    finally:
        os.unlink(link)


@pytest.mark.parametrize("given", ["/nowhere/at/all", "/proc/version"])
def test_in_place_of_a_folder_that_is_none_the_usual_one_is_taken(monkeypatch, given):
    monkeypatch.setenv("TMPDIR", given)
    with short_folder():
        assert os.environ["TMPDIR"] == "/tmp"
    monkeypatch.setattr(session, "_SHORT", "/nowhere")
    with pytest.raises(MachineError, match=f"neither {given} nor /nowhere"), short_folder():
        pass


def test_a_session_s_folder_is_removed_unless_nobody_foresaw_its_end(folder):
    for error, stays in [
        (None, False),
        (MachineError("no room"), False),
        (KeyboardInterrupt(), False),
        (KeyError(), True),
    ]:
        session = folder / "session_1"
        session.mkdir()
        (folder / "session_latest").unlink(missing_ok=True)
        (folder / "session_latest").symlink_to(session)
        with suppress(MachineError, KeyboardInterrupt, KeyError), removed_afterwards(session):
            if error:
                raise error
        assert session.exists() is stays
        assert (folder / "session_latest").is_symlink() is stays


def test_of_killed_drivers_only_what_tuner_started_is_removed(folder, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    names = ("session_killed", "session_alive", "session_of_others")
    for name in names:
        (folder / "ray" / name / "logs").mkdir(parents=True)
    (folder / "ray" / "session_latest").symlink_to(folder / "ray" / "session_alive")
    kill = "import sys, os; from filelock import FileLock; FileLock(sys.argv[1]).acquire(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", kill, str(folder / "ray/session_killed/tuner.lock")], timeout=60)
    with FileLock(folder / "ray/session_alive/tuner.lock"):
        remove_dead_sessions()
    assert sorted(os.listdir(folder / "ray")) == ["session_alive", "session_latest", "session_of_others"]


STARTS = """
import os, ray
from tuner.execution.machine import ray_cluster
with ray_cluster(dashboard=True) as nodes:
    print(len(nodes), len(os.environ["TMPDIR"]) < 25, ray._private.worker._global_node.get_session_dir_path())
"""


@pytest.mark.timeout(120)
def test_a_cluster_starts_in_a_long_folder_and_leaves_nothing_there(folder):
    long = folder / ("a" * 60) / ("b" * 60)
    long.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"TMPDIR": str(long)}
    done = subprocess.run([sys.executable, "-c", STARTS], env=environment, capture_output=True, text=True, timeout=100)
    assert re.match(r"1 True /tmp/tuner-[0-9a-f]{8}/ray/session_", done.stdout), done.stderr
    assert [path.name for path in (long / "ray").iterdir() if path.name.startswith("session")] == []
    for link in Path("/tmp").glob("tuner-*"):
        if link.is_symlink() and os.readlink(link) == str(long):
            link.unlink()


@pytest.mark.timeout(120)
def test_a_cluster_that_cannot_be_started_is_refused_in_words_and_half_of_it_is_not_left(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = set(psutil.Process().children(recursive=True))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(machine, "free_port", lambda: taken.getsockname()[1])
        with pytest.raises(MachineError, match="Ray cannot be started here: Failed to bind"), machine.ray_cluster():
            pass
    psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=10)
    assert set(psutil.Process().children(recursive=True)) <= before
    assert machine.clusters_on_this_host() == set()
