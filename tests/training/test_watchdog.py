"""What ends a process that stands still, and what does not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tuner.training.watchdog import longest_move

pytestmark = pytest.mark.timeout(60)

PROCESS = """
import ctypes, os, signal, subprocess, sys, time
from tuner.training.watchdog import LOOK_S, Watch

watch = Watch(1.0, lambda reason: print("last words:", reason, flush=True))
with watch.working():
    {}
print("lived on")
"""
MOVES = "[watch.moved() for _ in range(3)]; "
CONTINUE = "subprocess.Popen(['sh', '-c', f'sleep {8 * LOOK_S}; kill -CONT {os.getpid()}'])"
LIVE_ON = {
    "before the first move": "time.sleep(3)",
    "as slow as it has been": "watch.moved(); time.sleep(0.3); watch.moved(); time.sleep(3)",
    "while somebody else has his turn": f"{MOVES}\n    with watch.waiting(): time.sleep(3)",
    "when watched no longer": f"{MOVES} watch.close(); time.sleep(3)",
    "stopped by a signal and woken again": f"{MOVES} {CONTINUE}; os.kill(os.getpid(), signal.SIGSTOP); time.sleep(0.7)",
}
END = {
    "asleep": f"{MOVES} time.sleep(1000)",
    "Python itself stands still": f"{MOVES} ctypes.PyDLL(None).sleep(1000)",
}


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All at once: each takes seconds, and does nothing."""
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = {
        name: subprocess.Popen([sys.executable, "-c", PROCESS.format(does)], **pipe)
        for name, does in {**LIVE_ON, **END}.items()
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait(10)


def test_the_limit_follows_the_slowest_move_and_is_long_before_the_first():
    assert longest_move(600, None) == 3600
    assert longest_move(600, 0.1) == 600
    assert longest_move(600, 45.0) == 900


def test_a_thread_that_stands_still_ends_its_process_which_says_where_it_stood(processes):
    said, log = processes["asleep"].communicate(timeout=30)
    assert processes["asleep"].returncode == 1
    assert said == "last words: no step for 1 s; the slowest before took 0.0 s\n"
    assert log.startswith("stuck: no step for 1 s; the slowest before took 0.0 s\nThread watch:")
    assert log.rstrip().splitlines()[-2:] == ["Thread MainThread:", '  File "<string>", line 7, in <module>']


def test_where_python_itself_stands_still_the_process_ends_as_well(processes):
    _, log = processes["Python itself stands still"].communicate(timeout=30)
    assert processes["Python itself stands still"].returncode == 1
    assert "Timeout (0:00:06)!" in log
    assert 'File "<string>", line 7' in log


@pytest.mark.parametrize("name", LIVE_ON)
def test_who_has_reason_not_to_move_lives_on(processes, name):
    said, log = processes[name].communicate(timeout=30)
    assert (processes[name].returncode, said) == (0, "lived on\n"), log


def test_being_watched_costs_less_than_20_microseconds_a_step():
    code = """
import time
from tuner.training.watchdog import Watch
watch = Watch(600.0, print)
with watch.working():
    started = time.perf_counter()
    for _ in range(100_000): watch.moved()
    print((time.perf_counter() - started) / 100_000)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40, check=True)
    assert float(ended.stdout) < 20e-6
