"""Which base exactly: its commit on the hub, or what its files hold. All of a sweep has the same one. Light."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tuner.errors import TunerError
from tuner.spec.checks import paths
from tuner.spec.sweep import SweepSpec
from tuner.training.hub import refuse_silent_hub

_LOADED = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")
"""Ends of the names of the files that loading a model and its tokenizer may read."""


def package_folder(package: str) -> Path:
    """Folder of an installed Python package, without importing it."""
    found = paths.package_folder(package)
    if found is None:
        raise TunerError(f"model.name: the Python package {package!r} is not installed")
    return found


def place_of_base(name: str) -> str:
    """The folder of a base, or its hub id."""
    return str(package_folder(name.removeprefix(paths.PACKAGE))) if name.startswith(paths.PACKAGE) else name


def with_commit(spec: SweepSpec) -> SweepSpec:
    """The spec with the commit that `model.revision` stands for now, so that no trial trains on a later one.

    Where there is no hub its cache answers. Raises TunerError where neither knows the model, or the hub is silent.
    """
    model = spec.model
    if os.path.isabs(place_of_base(model.name)) or re.fullmatch("[0-9a-f]{40}", model.revision):
        return spec
    from huggingface_hub import hf_hub_download

    refuse_silent_hub()
    try:
        config = hf_hub_download(model.name, "config.json", revision=model.revision)
    except Exception as error:  # the border to a network: whatever it is, the model cannot be had
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise TunerError(f"model.name: {model.name} at {model.revision} cannot be had from the hub: {said}") from error
    return spec.model_copy(update={"model": model.model_copy(update={"revision": Path(config).parent.name})})


def identify(model: Mapping[str, Any]) -> dict[str, str]:
    """What identifies the base beyond its name: the hub's `commit`, or the SHA-256 of its files, by name."""
    place = Path(place_of_base(model["name"]))
    if not place.is_dir():
        return {"commit": model["revision"]}
    names = [model["gguf_file"]] if model["gguf_file"] else sorted(os.listdir(place))
    files = [place / name for name in names if model["gguf_file"] or name.endswith(_LOADED)]
    return {file.name: sha256(file, file.stat().st_mtime_ns).hexdigest() for file in files if file.is_file()}


def changes_of_base(model: Mapping[str, Any], now: Mapping[str, str], known: Mapping[str, str]) -> list[str]:
    """What is no longer as it was `known` when the sweep began, in words; nothing where the base is the same."""
    changed = sorted(name for name in known.keys() | now.keys() if known.get(name) != now.get(name))
    return [f"the base {model['name']} has changed since the sweep began: {', '.join(changed)}"] if changed else []


@lru_cache
def sha256(file: Path, modified_ns: int) -> Any:
    """The hash of what a file holds, which is read once in a process; to be copied before it is updated."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256")
