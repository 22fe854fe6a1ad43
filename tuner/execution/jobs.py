"""A cluster from outside, by Ray's Jobs API: a sweep submitted as a job, and commands run there as short ones."""

from __future__ import annotations

import base64
import hashlib
import http
import ipaddress
import json
import logging
import os
import shlex
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.errors import JobError, MachineError, TunerError
from tuner.execution.events import BEGUN
from tuner.spec.layout import absolute_root
from tuner.spec.load import dump_spec
from tuner.spec.sweep import SweepSpec

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

SPEC_FILE = "spec.yaml"
RESULT = "tuner-result:"
"""What the line of a job's log begins with that holds, in base64, the stdout of a command called there."""

# How long `ray job stop` lets a sweep end in good order before it kills. Ray's own 3 s are too short for a step.
_STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "300"}
_RAYS_OWN_ADDRESS = "RAY_API_SERVER_ADDRESS"
_ENTRY = "Running entrypoint for job "  # Ray's line in the log before the job's own
_CHARACTERS_PER_S = 50_000
_NO_SUCH_COMMAND = 127


@dataclass(frozen=True)
class Job:
    """A sweep that runs on a cluster, as its submitter knows it."""

    sweep: str
    id: str
    """Ray's submission id."""
    address: str
    root: str
    """The sweep's storage root, as the cluster sees it."""
    client: JobSubmissionClient

    def follow(self, say: Callable[[str], None] = print) -> int:
        """Pass on the job's log from its start, line by line, until the job is over; return its exit code."""
        for line in _log(self.client, self.id):
            say(line)
        return _exit_code(self.client, self.id)


def submit_sweep(
    client: JobSubmissionClient, address: str, spec: SweepSpec, root: str | Path | None = None, join: bool = False
) -> Job:
    """Run a sweep on the cluster: returns when it has begun there, or raises what `tuner run` said there (JobError).

    `root` overrules the cluster's TUNER_ROOT, which overrules the spec's. While the same sweep runs, it is refused
    (TunerError), or with `join` it is the job returned.
    """
    words = ["run", SPEC_FILE, *_root_option(root)]
    return _start(client, address, spec.name, words, {SPEC_FILE: dump_spec(spec)}, join)


def resume_sweep(
    client: JobSubmissionClient,
    address: str,
    name: str,
    overrides: Sequence[str] = (),
    root: str | Path | None = None,
    join: bool = False,
) -> Job:
    """Continue a sweep on the cluster; returns and raises as `submit_sweep` does."""
    words = ["resume", *(f"--set={override}" for override in overrides), *_root_option(root), "--", name]
    return _start(client, address, name, words, {}, join)


def _root_option(root: str | Path | None) -> list[str]:
    return [f"--root={absolute_root(root)}"] if root else []


def call(
    client: JobSubmissionClient, address: str, words: Sequence[str], say: Callable[[str], None]
) -> tuple[int, bytes]:
    """Run a command of `tuner` on the cluster's head; return its exit code and stdout, its stderr goes to `say`."""
    job = _submit(client, address, words, runtime_env={"env_vars": _STOP_WAIT})
    stdout = b""
    try:
        for line in _log(client, job, wait_s=0.3):
            if line.startswith(RESULT):
                stdout = base64.b64decode(line.removeprefix(RESULT))
            else:
                say(line)
    except KeyboardInterrupt:
        client.stop_job(job)
        raise
    code = _exit_code(client, job)
    client.delete_job(job)  # a question and its answer are no work that the cluster's list of jobs should name
    return code, stdout


def connect(address: str, allow_unauthenticated: bool = False) -> JobSubmissionClient:
    """A client for the dashboard at `http://HOST:PORT`.

    Raises MachineError when nothing answers there, when it demands a token that this process has not, and when it
    demands none though others than this machine reach it, unless that is allowed: whoever reaches it runs code on it.
    """
    host = _host(address)
    if not (_demands_token(address) or allow_unauthenticated or _is_loopback(host)):
        raise MachineError(
            f"{address} takes jobs from everybody who reaches it: start the cluster with RAY_AUTH_MODE=token, "
            "or accept that with --allow-unauthenticated-cluster"
        )
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for teller in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(teller).setLevel(logging.WARNING)  # of every upload
    before = os.environ.get(_RAYS_OWN_ADDRESS)
    os.environ[_RAYS_OWN_ADDRESS] = address  # or RAY_ADDRESS would overrule what was asked for
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise MachineError(
            f"{address} demands its token ({str(error).splitlines()[0]}): set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH as on the cluster"
        ) from None
    finally:
        if before is None:
            os.environ.pop(_RAYS_OWN_ADDRESS)
        else:
            os.environ[_RAYS_OWN_ADDRESS] = before


def address_of(asked: str | None) -> str:
    """The address that was asked for, or the one of Ray's own variables. Raises MachineError where there is none."""
    for address in (asked, os.environ.get(_RAYS_OWN_ADDRESS), os.environ.get("RAY_ADDRESS")):
        if address and (asked or address.startswith(("http://", "https://"))):
            _host(address)
            return address.rstrip("/")
    raise MachineError("no cluster is named: --address http://HEAD:8265, or RAY_ADDRESS")


def _host(address: str) -> str:
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise MachineError(f"the address of a cluster is that of its dashboard, http://HEAD:8265; got {address!r}")
    return parts.hostname


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _demands_token(address: str) -> bool:
    """Whether a request without a token is turned away: what the cluster does counts, not what it says."""
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=10).close()
        return False
    except urllib.error.HTTPError as error:
        if error.code in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
            return True
        raise MachineError(f"{address} is no dashboard of Ray: it answers {error.code} {error.reason}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise MachineError(f"no Ray dashboard answers at {address}: {reason}") from None


def _submit(client: JobSubmissionClient, address: str, words: Sequence[str], **job: Any) -> str:
    """Have the cluster run a command of its own `tuner`, which refuses another version; return the job's id.

    Raises MachineError when the cluster takes no job, such as a second one of the same id.
    """
    command = shlex.join(["tuner", "--client", version("tuner"), address, *words])
    try:
        return client.submit_job(entrypoint=f"exec {command}", **job)  # Ray hands it to a shell
    except RuntimeError as error:
        raise MachineError(f"{address} has not taken the job: {error}") from None


def _start(
    client: JobSubmissionClient, address: str, sweep: str, words: Sequence[str], files: Mapping[str, str], join: bool
) -> Job:
    """Submit a job under an id that says what it does: the cluster itself refuses the same a second time."""
    content = json.dumps([words, files])
    name = f"{sweep}-{words[0]}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    same = [job for job in client.list_jobs() if _is_attempt(job.submission_id, name)]
    running = [str(job.submission_id) for job in same if not job.status.is_terminal()]
    if running and not join:
        raise TunerError(f"{sweep!r} runs on this cluster already, as job {running[0]}: add --follow to watch it")
    job_id = running[0] if running else f"{name}-{len(same) + 1}"
    if not running:
        with _packed(files) as runtime_env:
            _submit(client, address, words, submission_id=job_id, runtime_env=runtime_env)
    return Job(sweep, job_id, address, _root_where_it_began(client, job_id), client)


def _is_attempt(job_id: str | None, name: str) -> bool:
    return job_id is not None and job_id.rpartition("-")[0] == name


@contextmanager
def _packed(files: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The job's runtime environment. Anybody who may list jobs reads it: no variable of this process goes there."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        yield {"env_vars": _STOP_WAIT, **({"working_dir": folder} if files else {})}


def _root_where_it_began(client: JobSubmissionClient, job_id: str) -> str:
    """Wait until the sweep has begun; return its storage root. Raises what its command said if it ended before."""
    said = []
    for line in _log(client, job_id, wait_s=0.3):
        if BEGUN in line:
            return line.partition(BEGUN)[2]
        said.append(line)
    code = _exit_code(client, job_id)
    first = max((at for at, line in enumerate(said) if line.startswith("tuner: ")), default=len(said) - 20)
    raise JobError("\n".join(said[max(first, 0) :]).removeprefix("tuner: ") or f"job {job_id} has said nothing", code)


def _log(client: JobSubmissionClient, job_id: str, wait_s: float = 1.0) -> Iterator[str]:
    """The lines that a job's own command writes, until it is over. Raises MachineError when nobody answers any more.

    Ray gives its log as a whole only, or to coroutines: it is asked for anew, the more seldom the longer it is.
    """
    shown = 0
    while True:
        try:
            over = client.get_job_info(job_id).status.is_terminal()  # first: all that it has written is then in the log
            text = client.get_job_logs(job_id)
        except OSError:  # as requests' own are
            raise MachineError(f"the cluster does not answer any more; if it lasts, so does job {job_id}") from None
        entry = text.find(_ENTRY)
        begin = (entry >= 0 and text.find("\n", entry) + 1) or len(text)
        end = len(text) if over else text.rfind("\n") + 1
        yield from text[max(shown, begin) : end].splitlines()
        shown = max(shown, end)
        if over:
            return
        time.sleep(wait_s + len(text) / _CHARACTERS_PER_S)


def _exit_code(client: JobSubmissionClient, job_id: str) -> int:
    """Of a job that is over. Raises MachineError when its command never ran, or not to its end."""
    info = client.get_job_info(job_id)
    if info.driver_exit_code == _NO_SUCH_COMMAND:
        raise MachineError(f"the cluster has no command `tuner`: its image needs tuner {version('tuner')}")
    if info.status == "STOPPED":
        return 130
    if info.driver_exit_code is None:
        raise MachineError(f"job {job_id} has not run to its end: {info.message}")
    return info.driver_exit_code
