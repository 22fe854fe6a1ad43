"""What answers at a cluster's address, when it is not a dashboard, not all of one, or too slow to be one."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from real_sweeps import TUNER

from tuner.errors import MachineError
from tuner.execution import dashboard, jobs

pytestmark = pytest.mark.timeout(60)

VERSION = json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "c", "session_name": "s"})
Answer = Callable[[BaseHTTPRequestHandler], None]


def says(text: str, status: int = 200, **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(text.encode())

    return answer


def drips(request: BaseHTTPRequestHandler) -> None:
    """A byte now and then: no read of it ever takes long."""
    request.send_response(200)
    request.send_header("Content-Length", "100000")
    request.end_headers()
    try:
        while True:
            request.wfile.write(b" ")
            time.sleep(0.1)
    except OSError:
        return


def drips_headers(request: BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    drips(request)


def says_nothing(request: BaseHTTPRequestHandler) -> None:
    time.sleep(30)


@contextmanager
def served(others: Answer, version: Answer | None = None) -> Iterator[str]:
    """A server that says its version as Ray's dashboard does, unless told another answer, and `others` to all else."""
    says_version = version or says(VERSION)

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            (says_version if self.path == "/api/version" else others)(self)

        do_GET = do_POST = do_PUT = do_DELETE = answer

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "FIRST_ANSWER_S", 1.0)
    monkeypatch.setattr(dashboard, "ANSWER_S", 1.0)


@pytest.mark.parametrize("answer", [says_nothing, drips, drips_headers])
def test_a_dashboard_that_does_not_answer_in_time_is_given_up(soon, answer):
    began = time.monotonic()
    with served(says("{}"), version=answer) as address, pytest.raises(MachineError, match=r"answer"):
        dashboard.connect(address)
    with served(answer) as address:
        there = dashboard.connect(address)
        with pytest.raises(MachineError, match=r"has not answered within 1 s"):
            there.ask("list_jobs")
        with pytest.raises(MachineError, match=r"has not answered within 1 s; if the cluster lasts, so does job some"):
            jobs.Job("some", "some-run-1", "/runs", there).follow()
    assert time.monotonic() - began < 15


def test_an_address_where_nobody_takes_the_connection_up_is_given_up(soon):
    with socket.create_server(("127.0.0.1", 0), backlog=1) as server, pytest.raises(MachineError, match="answer"):
        dashboard.connect(f"http://127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize(
    ("version", "why"),
    [
        (says("<html>Welcome to nginx</html>"), "no dashboard of Ray: it does not say a version"),
        (says("{}"), "no dashboard of Ray: it does not say a version"),
        (says("[]"), "no dashboard of Ray: it does not say a version"),
        (says('{"ray_version": 2}'), "no dashboard of Ray: it does not say a version"),
        (says("\xff" * 9), "no dashboard of Ray: it does not say a version"),
        (says("", 404), "no dashboard of Ray: it answers 404 Not Found"),
        (says("", 500), "no dashboard of Ray: it answers 500 Internal Server Error"),
        (says("", 302, Location="https://login.example/"), "which leads to https://login.example/: give the address"),
        (says("", 401), "(?i)demands its token"),
        (says("", 403), "(?i)demands its token"),
        (lambda request: request.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n"), "no Ray dashboard answers"),
        (lambda request: request.connection.close(), "no Ray dashboard answers"),
    ],
)
def test_an_address_of_something_else_is_refused_in_words(version, why):
    with served(says("{}"), version) as address, pytest.raises(MachineError, match=why):
        dashboard.connect(address)


def test_a_scheme_that_the_server_does_not_speak_is_refused_in_words():
    with served(says("{}")) as address, pytest.raises(MachineError, match="no Ray dashboard answers at https"):
        dashboard.connect(address.replace("http:", "https:"))


@pytest.mark.parametrize(
    "method", ["list_jobs", "get_job_info", "get_job_logs", "submit_job", "stop_job", "delete_job"]
)
@pytest.mark.parametrize(
    "answer",
    [says("<html>"), says("[3]"), says('{"a": 1}'), says("", 500), says("<html>" * 999, 503), says("", 401)],
)
def test_whatever_else_comes_back_is_said_in_words(method, answer):
    with served(answer) as address:
        there = dashboard.connect(address)
        options = {"entrypoint": "true"} if method == "submit_job" else {}
        with pytest.raises(MachineError) as refused:
            there.ask(method, *([] if method in ("list_jobs", "submit_job") else ["job"]), **options)
    assert address in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("words", [["ls"], ["status", "some"], ["resume", "some"], ["cancel", "some"]])
def test_a_command_ends_with_code_3_and_a_sentence(tmp_path: Path, words: list[str]):
    with served(says("<html>")) as address:
        command = [TUNER, *words, "--address", address]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"tuner: {address} does not answer as a dashboard of Ray does")
    assert "Traceback" not in done.stderr
