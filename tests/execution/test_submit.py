"""Sweeps submitted to a Ray cluster through the Jobs API, token authentication on: by the command, with real Ray."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from raylets import RAY, Raylets, raylets
from real_sweeps import TUNER, write_spec

import tuner
from tuner.errors import MachineError
from tuner.execution import dashboard

pytestmark = pytest.mark.timeout(300)

SECRET = "a-secret-of-the-client"
PATH = f"{TUNER.parent}{os.pathsep}{os.environ['PATH']}"
TRAIN = {"max_length": 64, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short sweep whose records lie where a variable says, and one that would take minutes."""
    folder = tmp_path_factory.mktemp("submit")
    short = {"trials": 2, "epochs_per_trial": 2, "evals_per_trial": 2}
    common = {"train": TRAIN, "resources": {"share_base": 1}, "promotion": None}
    storage = {"study": "${TUNER_TEST_STUDY}"}
    write_spec(folder, tiny_model_dir, "short", budget=short, storage=storage, **common)
    write_spec(folder, tiny_model_dir, "long", budget=short | {"trials": 200}, **common)
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Raylets]:
    """A head without CPUs and one worker; `tuner` is on their PATH, and the records' place in their environment."""
    theirs = {
        "PATH": PATH,
        "TUNER_ROOT": str(folder / "runs"),
        "TUNER_TEST_STUDY": f"sqlite:///{folder}/records.db",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in theirs.items():
            patch.setenv(name, value)
        with raylets(2) as cluster:
            patch.undo()
            yield cluster


def mine(cluster: Raylets, **others: str) -> dict[str, str]:
    """The environment of somebody who has the cluster's token, and secrets that are no business of the cluster."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "TUNER_ROOT")}
    token = {name: cluster.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    return kept | token | {"PATH": PATH, "TUNER_TEST_STUDY": SECRET, "HF_TOKEN": SECRET} | others


def command(cluster: Raylets, folder: Path, *words: object, **others: str) -> Done:
    environment = mine(cluster, **others)
    told = [TUNER, *map(str, words)]
    return subprocess.run(told, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def ask(cluster: Raylets, folder: Path, *words: object) -> Done:
    return command(cluster, folder, *words, "--address", cluster.dashboard)


@pytest.fixture(scope="module")
def short(cluster: Raylets, folder: Path) -> Done:
    """The short sweep, submitted and followed to its end by somebody who names the cluster as Ray's own tools do."""
    return command(cluster, folder, "submit", "short.yaml", "--follow", RAY_ADDRESS=cluster.dashboard)


@pytest.fixture
def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuner.Sweep:
    monkeypatch.setenv("TUNER_TEST_STUDY", f"sqlite:///{folder}/records.db")
    return tuner.open("short", folder / "runs")


def test_a_sweep_is_submitted_and_followed_to_its_end(cluster, short, opened):
    said = short.stderr.splitlines()
    assert short.returncode == 0, said
    assert short.stdout == "short\n"
    assert any("trial 1 COMPLETED" in line for line in said), said
    assert said[-1] == f"tuner show short --address {cluster.dashboard}"
    assert opened.status == "finished"
    assert [trial.outcome for trial in opened.records()] == ["COMPLETED", "COMPLETED"]


def test_what_the_cluster_answers_is_what_its_store_holds(cluster, folder, short, opened, tmp_path):
    table = tmp_path / "trials.parquet"
    answer = ask(cluster, folder, "results", "short", "--json", "--sort", "-eval_loss", "--where", "lora.r>=8 and 1<2")
    assert (answer.returncode, answer.stdout) == (2, "")
    answer = ask(cluster, folder, "results", "short", "--json", "--sort", "-eval_loss")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == opened.results(sort="-eval_loss")
    assert answer.stderr == ""
    answer = ask(cluster, folder, "results", "short", "--format", "parquet", "--output", table)
    assert answer.returncode == 0, answer.stderr
    assert table.read_bytes().startswith(b"PAR1")
    answer = ask(cluster, folder, "show", "short", 7)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == "tuner: sweep 'short' has no trial 7\n"
    time.sleep(1.5)  # Ray looks after its jobs once a second
    listed = [RAY, "job", "list", "--address", cluster.dashboard]
    jobs = subprocess.run(listed, env=mine(cluster), check=True, capture_output=True, text=True, timeout=100).stdout
    assert "short-run-" in jobs
    assert "raysubmit_" not in jobs
    assert "FAILED" not in jobs


FROM_PYTHON = """
import sys, tuner
try:
    tuner.submit("short.yaml", address=sys.argv[1])
except tuner.TunerError as error:
    print(type(error).__name__, error.exit_code, error)
"""


def test_from_python_too_a_sweep_that_is_finished_is_refused_as_run_refuses_it(cluster, folder, short):
    script = [sys.executable, "-c", FROM_PYTHON, cluster.dashboard]
    done = subprocess.run(script, cwd=folder, env=mine(cluster), capture_output=True, text=True, timeout=100)
    assert done.stdout.startswith("JobError 1 sweep 'short' exists already"), done.stderr


@pytest.mark.parametrize(
    ("override", "code", "why"),
    [
        ("data.path=/only/on/the/laptop.jsonl", 2, "data.path: got '/only/on/the/laptop.jsonl'; allowed: a path that"),
        ("data.formatter=only_on_the_laptop:shape", 3, "lacks module only_on_the_laptop"),
    ],
)
def test_what_only_the_client_has_is_refused_and_no_sweep_begins(cluster, folder, override, code, why):
    refused = ask(cluster, folder, "submit", "short.yaml", "--set", "name=elsewhere", "--set", override)
    assert (refused.returncode, refused.stdout) == (code, "")
    assert why in refused.stderr
    assert not (folder / "runs/sweeps/elsewhere").exists()


def test_a_sweep_is_stopped_resumed_and_cancelled_through_jobs(cluster, folder):
    begun = ask(cluster, folder, "submit", "long.yaml")
    assert (begun.returncode, begun.stdout) == (0, "long\n"), begun.stderr
    *_, job, following = begun.stderr.splitlines()
    assert following == f"tuner status long --root {folder}/runs --address {cluster.dashboard}"
    again = ask(cluster, folder, "submit", "long.yaml")
    assert again.returncode == 1
    assert f"'long' runs on this cluster already, as {' '.join(job.split()[:2])}: add --follow" in again.stderr

    stop = [RAY, "job", "stop", "--address", cluster.dashboard, job.split()[1]]
    subprocess.run(stop, env=mine(cluster), check=True, capture_output=True, timeout=100)
    sweep = tuner.open("long", folder / "runs")
    assert (sweep.status, sweep.state().message) == ("interrupted", None)
    assert {trial.outcome for trial in sweep.records()} <= {"COMPLETED", "RUNNING", "INTERRUPTED"}

    resumed = ask(cluster, folder, "resume", "long")
    assert (resumed.returncode, resumed.stdout) == (0, "long\n"), resumed.stderr
    assert sweep.status in ("preparing", "running")
    cancelled = ask(cluster, folder, "cancel", "long")
    assert cancelled.returncode == 0, cancelled.stderr
    assert cancelled.stdout.splitlines() == ["long is cancelled", f"tuner resume long --address {cluster.dashboard}"]
    assert sweep.status == "cancelled"


def test_no_variable_of_the_client_is_in_a_job_a_log_or_a_file_of_the_cluster(cluster, folder, short):
    listed = [RAY, "job", "list", "--address", cluster.dashboard]
    jobs = subprocess.run(listed, env=mine(cluster), check=True, capture_output=True, text=True, timeout=100).stdout
    assert "short-run-" in jobs
    assert SECRET not in jobs
    logs = [
        file for file in Path(tempfile.gettempdir(), "ray", "session_latest").resolve().rglob("*") if file.is_file()
    ]
    assert any("job-driver-short-run-" in file.name for file in logs)
    assert [file for file in [*logs, *folder.rglob("*.yaml")] if SECRET.encode() in file.read_bytes()] == []


def test_without_the_token_nothing_is_submitted(cluster, folder):
    refused = command(cluster, folder, "submit", "short.yaml", "--address", cluster.dashboard, RAY_AUTH_TOKEN="wrong")
    assert refused.returncode == 3
    assert f"tuner: {cluster.dashboard} demands its token" in refused.stderr


def test_a_client_of_another_version_is_refused(tmp_path):
    words = ["--client", "0.0.9", "http://head:8265", "ls", "--root", tmp_path]
    done = subprocess.run([TUNER, *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(r"tuner: the cluster has tuner \S+, its client 0.0.9: install the same on both\n", done.stderr)


class TakesAnybody(BaseHTTPRequestHandler):
    """The dashboard of a cluster without authentication, as far as it is asked before it is trusted."""

    def do_GET(self) -> None:
        self.send_response(HTTPStatus.OK)
        self.end_headers()
        self.wfile.write(b'{"ray_version": "2.60.0"}')

    def log_message(self, *words: object) -> None: ...


@pytest.fixture
def open_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(dashboard, "_is_loopback", lambda host: False)
    with HTTPServer(("127.0.0.1", 0), TakesAnybody) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_cluster_that_takes_jobs_from_everybody_is_refused_unless_that_is_accepted(open_cluster):
    with pytest.raises(MachineError, match=r"takes jobs from everybody.*--allow-unauthenticated-cluster"):
        dashboard.connect(open_cluster)
    assert dashboard.connect(open_cluster, allow_unauthenticated=True)


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "http://me:secret@head:8265", "http://"])
def test_an_address_is_that_of_a_dashboard_without_a_secret_in_it(address):
    with pytest.raises(MachineError, match="the address of a cluster"):
        dashboard.address_of(address)


def test_what_is_asked_for_comes_before_the_variables_of_ray(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://theirs:8265")
    assert dashboard.address_of("http://mine:8265/") == "http://mine:8265"
    assert dashboard.address_of(None) == "http://theirs:8265"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(MachineError, match="no cluster is named"):
        dashboard.address_of(None)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("localhost", True), ("127.8.0.1", True), ("::1", True), ("10.0.0.1", False), ("head", False)],
)
def test_this_machine_is_known_by_its_addresses(host, loopback):
    assert dashboard._is_loopback(host) is loopback
