"""Servers that take a question and never answer it, and the port that Ray takes for itself."""

from __future__ import annotations

import subprocess
import time

import pytest

from tests.faults.matrix import Figures
from tests.real_sweeps import TUNER
from tests.silent import silent
from tuner.execution import session
from tuner.execution.machine import ray_cluster

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

VERSION = b'{"version": "4", "ray_version": "2.60.0", "ray_commit": "c", "session_name": "s"}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"


@pytest.mark.parametrize("begins", [b"", HEAD, HEAD + VERSION], ids=["silent", "a byte at a time", "half an answer"])
def test_a_command_ends_when_a_dashboard_never_answers(tmp_path, note, begins):
    began = time.monotonic()
    with silent(begins) as port:
        command = [TUNER, "status", "some", "--address", f"http://127.0.0.1:{port}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("tuner: ")
    assert f"http://127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 40
    note("a dashboard that never answers", Figures(injected=1, asked=0, lost=0, duplicated=0))


def test_a_cluster_starts_whatever_port_is_drawn(monkeypatch, note):
    rays_own = 44227

    def sample(ports: range, count: int) -> list[int]:
        return sorted(ports, key=lambda port: port != rays_own)[:count]

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session.random, "sample", sample)
    began = time.monotonic()
    with ray_cluster() as nodes:
        assert len(nodes) == 1
    assert time.monotonic() - began < 50
    note("a port drawn that Ray takes for itself", Figures(injected=1, asked=0, lost=0, duplicated=0))
