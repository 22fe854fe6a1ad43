"""The hub, before it is asked for files: its own client waits for each of them, several times over."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

from tuner.errors import MachineError
from tuner.spec.in_time import in_time

ANSWER_S = 20.0
"""How long the hub may take for its first answer in a process."""


def refuse_silent_hub() -> None:
    """Raise MachineError when the hub does not answer in time; a refusal and an error are answers.

    Where it cannot be reached at all, its client says so at once, and takes what is in the cache.
    """
    if silence := _silence():
        raise MachineError(f"{silence}; HF_HUB_OFFLINE=1 takes what is in the cache")


@cache
def _silence() -> str | None:
    """What is to be said of a hub that does not answer; it is asked once in a process."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return None

    def ask() -> None:
        with suppress(Exception):  # the border to a network: that somebody answers is all that is asked
            get_session().get(f"{constants.ENDPOINT}/api/models", params={"limit": 1}, timeout=2 * ANSWER_S)

    try:
        in_time(ANSWER_S, f"the hub {constants.ENDPOINT}", ask)
    except MachineError as error:
        return str(error)
    return None
