"""The sweeps of a root: their names, and the specs that they began with."""

from __future__ import annotations

from difflib import get_close_matches

from pydantic import ValidationError

from tuner.errors import NotFoundError, SpecError, TunerError
from tuner.spec.changes import differences
from tuner.spec.checks.shape import check_shape
from tuner.spec.checks.words import show
from tuner.spec.layout import Root, SweepFolder
from tuner.spec.sweep import NAME, SweepSpec
from tuner.spec.text import parse_yaml


def spec_of(folder: SweepFolder) -> SweepSpec:
    """The spec that a sweep began with. Raises `NotFoundError`, and `TunerError` where it is none of this version."""
    try:  # a border: the file may be anything by now
        text = folder.root.read(folder.spec)
    except FileNotFoundError:
        raise NotFoundError(_no_such_sweep(folder)) from None
    except (OSError, UnicodeError) as error:
        raise TunerError(f"the spec of sweep {folder.name!r} cannot be read: {error}") from error
    place = folder.root.address(folder.spec)
    asked = parse_yaml(text, place)
    if not isinstance(asked, dict) or not isinstance(asked.get("storage"), dict):
        raise TunerError(f"{place} holds no spec any more: sweep {folder.name!r} cannot be read")
    asked["storage"]["root"] = folder.root.place  # it may have moved since
    try:
        return SweepSpec.model_validate(asked)
    except ValidationError as error:
        raise SpecError(check_shape(asked)[1], f"{place}, by another version of tuner or changed since") from error


def already_there(folder: SweepFolder, spec: SweepSpec) -> TunerError:
    """What to raise where the name of a new sweep is taken."""
    if not folder.root.exists(folder.spec):
        return TunerError(f"{folder.path} exists but is no sweep (it has no spec.yaml): move it away")
    changes = [
        f"{key} is {show(there)}, not {show(here)}" for key, (there, here) in differences(spec_of(folder), spec).items()
    ]
    another = f" with another spec ({'; '.join(changes[:5])}{'; ...' if changes[5:] else ''})" if changes else ""
    return TunerError(
        f"sweep {folder.name!r} exists already in {folder.address}{another}: `tuner results {folder.name}` shows it, "
        f"`tuner resume {folder.name}` continues it if it was cut off, `--set name=...` gives this one another name"
    )


def _no_such_sweep(folder: SweepFolder) -> str:
    names = sweep_names(folder.root)
    near = get_close_matches(folder.name, names, n=3, cutoff=0.5)
    there = f"there: {', '.join(names[:10])}" if names else "there is none (--root or TUNER_ROOT say where to look)"
    hint = f"did you mean {' or '.join(near)}?" if near else there
    return f"no sweep {folder.name!r} in {folder.root.address(folder.root.sweeps)}; {hint}"


def sweep_names(root: Root) -> list[str]:
    """The names of a root's sweeps, sorted; also of those that cannot be read."""
    return [name for name in root.names(root.sweeps) if NAME.fullmatch(name) and _is_sweep(root, name)]


def _is_sweep(root: Root, name: str) -> bool:
    try:  # a border: links and permissions are anybody's
        folder = root.sweep(name)
        return root.exists(folder.spec) or folder.spec.is_symlink() or folder.path.is_symlink()
    except (TunerError, OSError):
        return True  # what is wrong with it is said when it is opened
