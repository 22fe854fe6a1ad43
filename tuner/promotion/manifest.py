"""The record that lies beside promoted weights: where they come from and how they scored. JSON, no secrets."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from tuner.spec.sweep import SweepSpec
from tuner.training.identity import sha256

MANIFEST = "manifest.json"
LIBRARIES = ("tuner", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "optuna", "ray")

_SECRET_KEYS = ("hub_token", "push_to_hub_token")


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write `content`, with time, library versions and the hash of every weights file in `folder`."""
    manifest = {
        **content,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "libraries": library_versions(),
        "sha256": weight_hashes(folder),
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def public_spec(spec: SweepSpec) -> dict[str, Any]:
    """The whole spec but for what may hold a password: the study's URL and hub tokens."""
    dumped = spec.model_dump(mode="json", exclude={"storage": {"study"}})
    dumped["train"] = public_fields(dumped["train"])
    return dumped


def public_fields(train: dict[str, Any]) -> dict[str, Any]:
    """`train` without hub tokens."""
    return {key: value for key, value in train.items() if key not in _SECRET_KEYS}


def library_versions() -> dict[str, str]:
    """Version of Python and of every library that has a say in the result; those not installed are left out."""
    installed = {package.name: package.version for package in distributions()}
    return {"python": platform.python_version(), **{name: installed[name] for name in LIBRARIES if name in installed}}


def weight_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every safetensors file, by name."""
    files = sorted(folder.glob("*.safetensors"))
    return {path.name: sha256(path, path.stat().st_mtime_ns).hexdigest() for path in files}
