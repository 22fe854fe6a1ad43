"""Which values are places on this disk, which are names on the hub, and whether the former are there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from tuner.errors import Problem
from tuner.spec.checks.words import any_of, nearest, show
from tuner.spec.layout import absolute_root, is_object_store
from tuner.spec.sweep import ModelSpec, StorageSpec, SweepSpec

PACKAGE = "package:"
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_FILE = re.compile(
    r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow|feather|txt|ya?ml|jinja2?|gguf|safetensors|bin|pt|gz|zst|zip)$", re.I
)


def is_hub_id(text: str) -> bool:
    """Whether text that names nothing on this disk can be a hub id: `name` or `org/name`, without a file suffix."""
    return _HUB_ID.fullmatch(text) is not None and _FILE.search(text) is None


def make_absolute(spec: SweepSpec, base: Path, root: str | None) -> SweepSpec:
    """Return the spec with its paths absolute: those of the spec from `base`, the storage from the current folder.

    The storage root is `root`, else TUNER_ROOT, else what the spec says.
    """
    model, data, storage = spec.model, spec.data, spec.storage
    if not model.name.startswith(PACKAGE):
        model = model.model_copy(update={"name": _absolute(model.name, base)})
    data = data.model_copy(
        update={"path": _absolute(data.path, base), "eval_path": data.eval_path and _absolute(data.eval_path, base)}
    )
    train = dict(spec.train)
    if isinstance(template := train.get("chat_template_path"), str):
        train["chat_template_path"] = _absolute(template, base)
    place = absolute_root(root or os.environ.get("TUNER_ROOT") or storage.root)
    storage = storage.model_copy(update={"root": place, "study": _absolute_study(storage.study)})
    resources = spec.resources.model_copy(update={"deepspeed": _read_settings(spec.resources.deepspeed, base)})
    return spec.model_copy(
        update={"model": model, "data": data, "train": train, "storage": storage, "resources": resources}
    )


def _read_settings(settings: str | dict[str, Any] | None, base: Path) -> str | dict[str, Any] | None:
    """What stands in a JSON file of DeepSpeed's settings, so that workers need no file; its path if it is none."""
    if not isinstance(settings, str):
        return settings
    path = Path(_absolute(settings, base))
    try:
        if not is_small_file(path):
            return str(path)
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return str(path)  # `check_strategy` says what is wrong with it
    return found if isinstance(found, dict) else str(path)


def is_small_file(path: Path) -> bool:
    """Whether it can be read whole: no device, and no file that is large for settings."""
    return path.is_file() and path.stat().st_size <= 1_000_000


def _absolute(text: str, base: Path) -> str:
    path = os.path.normpath(base / os.path.expanduser(text))
    return text if is_hub_id(text) and not os.path.exists(path) else path


def _absolute_study(url: str | None) -> str | None:
    """SQLite's three slashes mean a relative file; workers do not share the driver's current folder."""
    if url is None or not url.startswith("sqlite:///") or url.startswith(("sqlite:////", "sqlite:///$", "sqlite:///:")):
        return url
    return f"sqlite:///{Path(url.removeprefix('sqlite:///')).absolute()}"


def check_paths(spec: SweepSpec) -> list[Problem]:
    """Find every path of the spec that is not there."""
    places = {"model.name": spec.model.name, "data.path": spec.data.path, "data.eval_path": spec.data.eval_path}
    places["train.chat_template_path"] = spec.train.get("chat_template_path")
    missing = [_missing(key, place) for key, place in places.items() if isinstance(place, str) and _is_missing(place)]
    return [*missing, *_check_model(spec.model), *_check_root(spec.storage.root), *_check_installed(spec.storage)]


def _is_missing(place: str) -> bool:
    return os.path.isabs(place) and not os.path.exists(place)


def _missing(key: str, place: str) -> Problem:
    path = Path(place)
    siblings = sorted(os.listdir(path.parent)) if os.path.isdir(path.parent) else []
    return Problem(key, show(place), "a path that exists, or a hub id", nearest(path.name, siblings))


def package_folder(name: str) -> Path | None:
    """Where an installed package lies; None where there is none of this name. It is not imported."""
    package = importlib.util.find_spec(name) if re.fullmatch(r"[A-Za-z]\w*", name) else None
    places = package.submodule_search_locations if package is not None else None
    return Path(places[0]) if places else None


def _check_model(model: ModelSpec) -> list[Problem]:
    folder = Path(model.name)
    if model.name.startswith(PACKAGE):
        name = model.name.removeprefix(PACKAGE)
        found = package_folder(name)
        if found is None:
            return [Problem("model.name", show(model.name), f"an installed package (pip install {name})")]
        folder = found
    elif os.path.isabs(folder) and os.path.isfile(folder):
        return [Problem("model.name", show(model.name), "a folder; a GGUF file in it goes to model.gguf_file")]
    if not (os.path.isabs(folder) and os.path.isdir(folder)):
        return []
    if (folder / "adapter_config.json").is_file():
        return [Problem("model.name", f"{show(model.name)}, an adapter", _base_of(folder / "adapter_config.json"))]
    if model.gguf_file is None:
        if (folder / "config.json").is_file():
            return [] if any(folder.glob("*.safetensors")) else [_no_safetensors(model)]
        files = sorted(file.name for file in folder.glob("*.gguf"))
        if files:
            return [Problem("model.gguf_file", "nothing", f"{any_of(files)}, since {folder.name} has no config.json")]
        return [Problem("model.name", show(model.name), "a folder with a config.json, or with a GGUF file")]
    if model.gguf_file in os.listdir(folder):
        return []
    files = sorted(file.name for file in folder.glob("*.gguf"))
    allowed = any_of(files) if files else "a file in the model's folder, which holds no GGUF file"
    return [Problem("model.gguf_file", show(model.gguf_file), allowed, nearest(model.gguf_file, files))]


def _base_of(adapter: Path) -> str:
    """What is allowed instead of an adapter's folder, with the base that it says it was made on."""
    try:
        said = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        said = None
    of = f", such as this one's, {show(said)}" if isinstance(said, str) else ""
    return f"a whole model: a base{of}, or what merging the adapter into it gives"


def _no_safetensors(model: ModelSpec) -> Problem:
    return Problem("model.name", show(model.name), "a folder with weights in safetensors: pickles are never read")


def _check_root(root: str) -> list[Problem]:
    """Find a storage root that is, or would lie in, what is no folder."""
    there = next((place for place in (Path(root), *Path(root).parents) if os.path.lexists(place)), Path("/"))
    if is_object_store(root) or there.is_dir():
        return []
    return [Problem("storage.root", show(root), f"a folder, which {there} is not")]


def _check_installed(storage: StorageSpec) -> list[Problem]:
    """Find a place of the storage that only an extra of this package reaches, which is not installed."""
    needs = {
        "storage.root": (storage.root, "s3://", "obstore", "s3"),
        "storage.study": (storage.study or "", "postgres", "psycopg", "postgres"),
    }
    return [
        Problem(key, f"{start}...", f"what is installed here (pip install 'tuner[{extra}]')")
        for key, (place, start, module, extra) in needs.items()
        if place.startswith(start) and importlib.util.find_spec(module) is None
    ]


_EXAMPLE = "postgresql://tuner:${TUNER_DB_PASSWORD}@host/tuner"


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _why_no_database(url: str) -> str | None:
    """What an URL must be instead, where no sweep could be recorded in it; None where one could."""
    kind, _, place = url.partition("://")
    if kind.startswith("${"):
        return None  # the whole URL is a variable's
    if kind.partition("+")[0] not in ("sqlite", "postgresql"):
        return f"sqlite or postgresql, such as {_EXAMPLE}"
    if kind.startswith("sqlite"):
        file = place.partition("?")[0].lstrip("/")
        if not file or ":memory:" in place or "mode=memory" in place:
            return "a file, such as sqlite:////srv/tuner/study.db: what is in memory no other process can read"
        path = Path(f"/{file}")
        if place.startswith("//") and path.is_file() and _first_bytes(path) not in (b"", b"SQLite format 3\0"):
            return "a file of SQLite's, or one that is not there yet"
        return None
    host = place.rpartition("@")[2].partition("/")[0].partition("?")[0]
    if "${" in host:
        return f"a host in words, such as {_EXAMPLE}: a variable stands for a name or a password before the @"
    if not place.rpartition("@")[2].strip("/") and "host=" not in place:
        return f"a host and a database, such as {_EXAMPLE}"
    return None


def check_storage(spec: SweepSpec) -> list[Problem]:
    """Find a `storage` that no sweep can be kept in: places of an unknown kind, or a secret in what is kept."""
    root, url = spec.storage.root, spec.storage.study
    problems = []
    if "\0" in root:
        problems.append(Problem("storage.root", show(root), "a folder, or s3://BUCKET/PREFIX"))
    elif is_object_store(root):
        if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]*(/[\w.=-]+)*", root):
            problems.append(Problem("storage.root", show(root), "a folder, or s3://BUCKET/PREFIX"))
        if url is None or url.startswith("sqlite"):
            got = "null, SQLite" if url is None else "SQLite"
            problems.append(Problem("storage.study", got, f"a database beside an object store, such as {_EXAMPLE}"))
    if url is None:
        return problems
    if not re.match(r"[a-z][a-z0-9]*(\+[a-z0-9]+)?://|\$\{", url):
        got = "something with an @ in it" if "@" in url else show(url)  # maybe a password
        return [*problems, Problem("storage.study", got, f"an SQLAlchemy URL, such as {_EXAMPLE}, or null")]
    if allowed := _why_no_database(url):
        got = "something with an @ in it" if "@" in url else show(url)
        return [*problems, Problem("storage.study", got, allowed)]
    passwords = re.findall(r"^[^/]+//[^:/@]*:(.*)@|[?&]password=([^&]*)", url)
    if any(not re.fullmatch(r"\$\{\w+\}", one or other) for one, other in passwords):
        # The spec is copied into the sweep's folder: what stands in it is no secret.
        allowed = f"the password as a variable, such as {_EXAMPLE}"
        problems.append(Problem("storage.study", "a URL with a password in it", allowed))
    return problems
