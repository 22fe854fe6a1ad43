"""Which values are places on this disk, which are names on the hub, and whether the former are there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tuner.errors import Problem
from tuner.spec.checks.words import nearest, show
from tuner.spec.sweep import SweepSpec

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|txt|ya?ml|jinja2?|gguf|safetensors|bin|pt|gz|zst|zip)$", re.I)


def is_hub_id(text: str) -> bool:
    """Whether text that names nothing on this disk can be a hub id: `name` or `org/name`, without a file suffix."""
    return _HUB_ID.fullmatch(text) is not None and _FILE.search(text) is None


def make_absolute(spec: SweepSpec, base: Path, root: Path | None) -> SweepSpec:
    """Return the spec with its paths absolute: those of the spec from `base`, the storage from the current folder.

    The storage root is `root`, else TUNER_ROOT, else what the spec says.
    """
    model, data, storage = spec.model, spec.data, spec.storage
    if not model.name.startswith("package:"):
        model = model.model_copy(update={"name": _absolute(model.name, base)})
    data = data.model_copy(
        update={"path": _absolute(data.path, base), "eval_path": data.eval_path and _absolute(data.eval_path, base)}
    )
    train = dict(spec.train)
    if isinstance(template := train.get("chat_template_path"), str):
        train["chat_template_path"] = _absolute(template, base)
    folder = Path(root or os.environ.get("TUNER_ROOT") or storage.root).expanduser()
    storage = storage.model_copy(update={"root": str(folder.absolute()), "study": _absolute_study(storage.study)})
    return spec.model_copy(update={"model": model, "data": data, "train": train, "storage": storage})


def _absolute(text: str, base: Path) -> str:
    path = Path(os.path.normpath(base / Path(text).expanduser()))
    return text if is_hub_id(text) and not path.exists() else str(path)


def _absolute_study(url: str | None) -> str | None:
    """SQLite's three slashes mean a relative file; workers do not share the driver's current folder."""
    if url is None or not url.startswith("sqlite:///") or url.startswith(("sqlite:////", "sqlite:///$", "sqlite:///:")):
        return url
    return f"sqlite:///{Path(url.removeprefix('sqlite:///')).absolute()}"


def check_paths(spec: SweepSpec) -> list[Problem]:
    """Find every path of the spec that is not there."""
    places = {"model.name": spec.model.name, "data.path": spec.data.path, "data.eval_path": spec.data.eval_path}
    places["train.chat_template_path"] = spec.train.get("chat_template_path")
    return [_missing(key, place) for key, place in places.items() if isinstance(place, str) and _is_missing(place)]


def _is_missing(place: str) -> bool:
    return os.path.isabs(place) and not os.path.exists(place)


def _missing(key: str, place: str) -> Problem:
    path = Path(place)
    siblings = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
    return Problem(key, show(place), "a path that exists, or a hub id", nearest(path.name, siblings))
