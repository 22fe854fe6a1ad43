"""The dashboard of a Ray cluster, as it is reached from outside: who it lets in, and what it answers in time."""

from __future__ import annotations

import http
import ipaddress
import json
import logging
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, TypeVar

from tuner.errors import MachineError
from tuner.spec.in_time import in_time

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

FIRST_ANSWER_S = 15.0
"""How long a dashboard may take to say its version."""
ANSWER_S = 60.0
"""How long it may take for any other answer, to its last byte; a job is accepted only when an agent is found for it."""
RAYS_OWN_ADDRESS = "RAY_API_SERVER_ADDRESS"
_LONGEST_WORDS = 200

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Dashboard:
    """A dashboard that has let this process in."""

    address: str
    client: JobSubmissionClient

    def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """What this method of Ray's own client returns. Raises MachineError where no answer of Ray's comes in time."""
        return _answer(self.address, lambda: getattr(self.client, method)(*arguments, **options), ANSWER_S)


def connect(address: str, allow_unauthenticated: bool = False) -> Dashboard:
    """The dashboard at `http://HOST:PORT`.

    Raises MachineError when nothing answers there, when it demands a token that this process has not, and when it
    demands none though others than this machine reach it, unless that is allowed: whoever reaches it runs code on it.
    """
    host = _host(address)
    demands_token = in_time(FIRST_ANSWER_S, address, lambda: _demands_token(address))
    if not (demands_token or allow_unauthenticated or _is_loopback(host)):
        raise MachineError(
            f"{address} takes jobs from everybody who reaches it: start the cluster with RAY_AUTH_MODE=token, "
            "or accept that with --allow-unauthenticated-cluster"
        )
    from ray.job_submission import JobSubmissionClient

    for teller in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(teller).setLevel(logging.WARNING)  # of every upload
    before = os.environ.get(RAYS_OWN_ADDRESS)
    os.environ[RAYS_OWN_ADDRESS] = address  # or RAY_ADDRESS would overrule what was asked for
    try:
        return Dashboard(address, _answer(address, lambda: JobSubmissionClient(address), FIRST_ANSWER_S))
    finally:
        if before is None:
            os.environ.pop(RAYS_OWN_ADDRESS)
        else:
            os.environ[RAYS_OWN_ADDRESS] = before


def address_of(asked: str | None) -> str:
    """The address that was asked for, or the one of Ray's own variables. Raises MachineError where there is none."""
    for address in (asked, os.environ.get(RAYS_OWN_ADDRESS), os.environ.get("RAY_ADDRESS")):
        if address and (asked or address.startswith(("http://", "https://"))):
            _host(address)
            return address.rstrip("/")
    raise MachineError("no cluster is named: --address http://HEAD:8265, or RAY_ADDRESS")


def _host(address: str) -> str:
    try:
        parts = urllib.parse.urlsplit(address)
        named = parts.scheme in ("http", "https") and parts.port != 0 and parts.username is None
    except ValueError:  # half an IPv6 address, a port that is none
        named = False
    if not named or not parts.hostname or parts.query or parts.fragment:
        raise MachineError(f"the address of a cluster is that of its dashboard, http://HEAD:8265; got {address!r}")
    return parts.hostname


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _StayHere(urllib.request.HTTPRedirectHandler):
    """A redirect is the answer: what stands at another address must be asked for by its own name."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _demands_token(address: str) -> bool:
    """Whether a request without a token is turned away: what the cluster does counts, not what it says."""
    try:
        with urllib.request.build_opener(_StayHere).open(f"{address}/api/version", timeout=FIRST_ANSWER_S) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
            return True
        to = error.headers.get("Location")
        leads = f", which leads to {to}: give the address of the dashboard itself" if to else ""
        raise MachineError(f"{address} is no dashboard of Ray: it answers {error.code} {error.reason}{leads}") from None
    except (OSError, HTTPException) as error:
        raise MachineError(f"no Ray dashboard answers at {address}: {_reason(error)}") from None
    except ValueError:  # HTML, or another's protocol
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("ray_version"), str):
        raise MachineError(f"{address} is no dashboard of Ray: it does not say a version of Ray at /api/version")
    return False


def _answer(address: str, ask: Callable[[], _Answer], seconds: float) -> _Answer:
    """The border to Ray's client: it hangs where nobody answers, and fails anyhow at what is not Ray's."""
    from ray.exceptions import AuthenticationError

    try:
        return in_time(seconds, address, ask)
    except AuthenticationError as error:
        raise MachineError(
            f"{address} demands its token ({_reason(error)}): set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH as on the cluster"
        ) from None
    except RuntimeError as error:  # an answer other than 200
        raise MachineError(f"{address} has refused: {_reason(error)}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # no JSON, or other fields than a job has
        raise MachineError(
            f"{address} does not answer as a dashboard of Ray does: {type(error).__name__} in what came back"
        ) from error
    except (OSError, HTTPException) as error:  # as all of requests' own are
        raise MachineError(f"{address} does not answer: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    lines = str(getattr(error, "reason", None) or error).strip().splitlines() or [type(error).__name__]
    line = lines[-1 if "Traceback" in lines[0] else 0]  # Ray's own answer to what its server has not expected
    return line if len(line) <= _LONGEST_WORDS else f"{line[:_LONGEST_WORDS]}..."
