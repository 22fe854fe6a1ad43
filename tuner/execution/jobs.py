"""A cluster from outside, by Ray's Jobs API: a sweep submitted as a job, and commands run there as short ones."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tuner.errors import JobError, MachineError, TunerError
from tuner.execution.dashboard import Dashboard
from tuner.execution.events import BEGUN
from tuner.spec.layout import absolute_root
from tuner.spec.load import dump_spec
from tuner.spec.sweep import SweepSpec

SPEC_FILE = "spec.yaml"
RESULT = "tuner-result:"
"""What the line of a job's log begins with that holds, in base64, the stdout of a command called there."""

# How long `ray job stop` lets a sweep end in good order before it kills. Ray's own 3 s are too short for a step.
_STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "300"}
_ENTRY = "Running entrypoint for job "  # Ray's line in the log before the job's own
_CHARACTERS_PER_S = 50_000
_NO_SUCH_COMMAND = 127
_LOOKED_AFTER_S = 2.5
"""How long Ray still looks after a job that is over, once a second: one that is deleted meanwhile it calls FAILED."""


@dataclass(frozen=True)
class Job:
    """A sweep that runs on a cluster, as its submitter knows it."""

    sweep: str
    id: str
    """Ray's submission id."""
    root: str
    """The sweep's storage root, as the cluster sees it."""
    dashboard: Dashboard

    @property
    def address(self) -> str:
        return self.dashboard.address

    def follow(self, say: Callable[[str], None] = print) -> int:
        """Pass on the job's log from its start, line by line, until the job is over; return its exit code."""
        for line in _log(self.dashboard, self.id):
            say(line)
        return _exit_code(self.dashboard, self.id)


def submit_sweep(dashboard: Dashboard, spec: SweepSpec, root: str | Path | None = None, join: bool = False) -> Job:
    """Run a sweep on the cluster: returns when it has begun there, or raises what `tuner run` said there (JobError).

    `root` overrules the cluster's TUNER_ROOT, which overrules the spec's. While the same sweep runs, it is refused
    (TunerError), or with `join` it is the job returned.
    """
    words = ["run", SPEC_FILE, *_root_option(root)]
    return _start(dashboard, spec.name, words, {SPEC_FILE: dump_spec(spec)}, join)


def resume_sweep(
    dashboard: Dashboard,
    name: str,
    overrides: Sequence[str] = (),
    root: str | Path | None = None,
    join: bool = False,
) -> Job:
    """Continue a sweep on the cluster; returns and raises as `submit_sweep` does."""
    words = ["resume", *(f"--set={override}" for override in overrides), *_root_option(root), "--", name]
    return _start(dashboard, name, words, {}, join)


def _root_option(root: str | Path | None) -> list[str]:
    return [f"--root={absolute_root(root)}"] if root else []


@contextmanager
def called(dashboard: Dashboard, words: Sequence[str], say: Callable[[str], None]) -> Iterator[tuple[int, bytes]]:
    """Run a command of `tuner` on the cluster's head; yields its exit code and stdout, its stderr goes to `say`.

    A question and its answer are no work that the cluster's list of jobs should name: afterwards the job is deleted.
    """
    job = _submit(dashboard, words, runtime_env={"env_vars": _STOP_WAIT})
    stdout = b""
    try:
        for line in _log(dashboard, job, wait_s=0.3):
            if line.startswith(RESULT):
                stdout = base64.b64decode(line.removeprefix(RESULT))
            else:
                say(line)
    except KeyboardInterrupt:
        dashboard.ask("stop_job", job)
        raise
    code = _exit_code(dashboard, job)
    try:
        yield code, stdout
    finally:
        time.sleep(_LOOKED_AFTER_S)
        with suppress(MachineError):  # the answer is there
            dashboard.ask("delete_job", job)


def _submit(dashboard: Dashboard, words: Sequence[str], **job: Any) -> str:
    """Have the cluster run a command of its own `tuner`, which refuses another version; return the job's id.

    Raises MachineError when the cluster takes no job, such as a second one of the same id.
    """
    command = shlex.join(["tuner", "--client", version("tuner"), dashboard.address, *words])
    return str(dashboard.ask("submit_job", entrypoint=f"exec {command}", **job))  # Ray hands it to a shell


def _start(dashboard: Dashboard, sweep: str, words: Sequence[str], files: Mapping[str, str], join: bool) -> Job:
    """Submit a job under an id that says what it does: the cluster itself refuses the same a second time."""
    content = json.dumps([words, files])
    name = f"{sweep}-{words[0]}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    same = [job for job in dashboard.ask("list_jobs") if _is_attempt(job.submission_id, name)]
    running = [str(job.submission_id) for job in same if not job.status.is_terminal()]
    if running and not join:
        raise TunerError(f"{sweep!r} runs on this cluster already, as job {running[0]}: add --follow to watch it")
    job_id = running[0] if running else f"{name}-{len(same) + 1}"
    if not running:
        with _packed(files) as runtime_env:
            _submit(dashboard, words, submission_id=job_id, runtime_env=runtime_env)
    return Job(sweep, job_id, _root_where_it_began(dashboard, job_id), dashboard)


def _is_attempt(job_id: str | None, name: str) -> bool:
    return job_id is not None and job_id.rpartition("-")[0] == name


@contextmanager
def _packed(files: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The job's runtime environment. Anybody who may list jobs reads it: no variable of this process goes there."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        yield {"env_vars": _STOP_WAIT, **({"working_dir": folder} if files else {})}


def _root_where_it_began(dashboard: Dashboard, job_id: str) -> str:
    """Wait until the sweep has begun; return its storage root. Raises what its command said if it ended before."""
    said = []
    for line in _log(dashboard, job_id, wait_s=0.3):
        if BEGUN in line:
            return line.partition(BEGUN)[2]
        said.append(line)
    code = _exit_code(dashboard, job_id)
    first = max((at for at, line in enumerate(said) if line.startswith("tuner: ")), default=len(said) - 20)
    raise JobError("\n".join(said[max(first, 0) :]).removeprefix("tuner: ") or f"job {job_id} has said nothing", code)


def _log(dashboard: Dashboard, job_id: str, wait_s: float = 1.0) -> Iterator[str]:
    """The lines that a job's own command writes, until it is over. Raises MachineError when nobody answers any more.

    Ray gives its log as a whole only, or to coroutines: it is asked for anew, the more seldom the longer it is.
    """
    shown = 0
    while True:
        try:
            # The status first: when the job is over, all that it has written is in the log that is read after it.
            over = dashboard.ask("get_job_info", job_id).status.is_terminal()
            text = dashboard.ask("get_job_logs", job_id) or ""
        except MachineError as error:
            raise MachineError(f"{error}; if the cluster lasts, so does job {job_id}") from None
        entry = text.find(_ENTRY)
        begin = (entry >= 0 and text.find("\n", entry) + 1) or len(text)
        end = len(text) if over else text.rfind("\n") + 1
        yield from text[max(shown, begin) : end].splitlines()
        shown = max(shown, end)
        if over:
            return
        time.sleep(wait_s + len(text) / _CHARACTERS_PER_S)


def _exit_code(dashboard: Dashboard, job_id: str) -> int:
    """Of a job that is over. Raises MachineError when its command never ran, or not to its end."""
    info = dashboard.ask("get_job_info", job_id)
    if info.driver_exit_code == _NO_SUCH_COMMAND:
        raise MachineError(f"the cluster has no command `tuner`: its image needs tuner {version('tuner')}")
    if info.status == "STOPPED":
        return 130
    if info.driver_exit_code is None:
        raise MachineError(f"job {job_id} has not run to its end: {info.message}")
    return info.driver_exit_code
