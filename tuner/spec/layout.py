"""Where every file lies. No other module joins a path below the storage root."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import NotFoundError
from tuner.spec.sweep import NAME


CHECKPOINT_REPORT = "report.json"
"""The last file of a trainer's checkpoint: one that has it is whole."""


def default_root() -> Path:
    """The storage root when neither the spec nor the command names one."""
    return Path(os.environ.get("TUNER_ROOT", "runs")).resolve()


def check_name(name: str, what: str) -> str:
    """Return a name that is safe as a folder, or raise `NotFoundError`."""
    if not NAME.fullmatch(name):
        raise NotFoundError(f"{what} {name!r}: allowed are 1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first")
    return name


@dataclass(frozen=True)
class Root:
    """Everything below one storage root."""

    path: Path

    @property
    def sweeps(self) -> Path:
        return self.path / "sweeps"

    @property
    def models(self) -> Path:
        """Promoted models: models/ALIAS/v1, v2, ... and the link models/ALIAS/current."""
        return self.path / "models"

    @property
    def cache(self) -> Path:
        """Tokenised data and converted base models, content-addressed; safe to delete."""
        return self.path / "cache"

    def sweep(self, name: str) -> SweepFolder:
        return SweepFolder(self.sweeps / check_name(name, "sweep"))

    def alias(self, name: str) -> Path:
        return self.models / check_name(name, "alias")


@dataclass(frozen=True)
class SweepFolder:
    """Everything of one sweep."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def spec(self) -> Path:
        """The spec as it ran: resolved, absolute, every default filled in."""
        return self.path / "spec.yaml"

    @property
    def study(self) -> Path:
        return self.path / "study.db"

    @property
    def log(self) -> Path:
        """What the libraries said in the driver."""
        return self.path / "sweep.log"

    @property
    def verify_log(self) -> Path:
        """What the libraries said while trials were rerun to verify them."""
        return self.path / "verify.log"

    @property
    def eval_rows(self) -> Path:
        """The tokenised evaluation set, kept so that a model can be measured again after the cache is gone."""
        return self.path / "eval"

    @property
    def ray(self) -> Path:
        """Ray Tune's own files; nothing here is ever read back."""
        return self.path / "ray"

    def trial(self, number: int) -> Path:
        return self.path / "trials" / f"{number:05d}"

    def trial_log(self, number: int) -> Path:
        return self.trial(number) / "trial.log"

    def adapter(self, number: int, tokens: int) -> Path:
        return self.trial(number) / self.adapter_name(tokens)

    def trial_state(self, number: int) -> Path:
        """What a slot on the shared base needs to go on from its last evaluation."""
        return self.trial(number) / "state.safetensors"

    def trial_checkpoints(self, number: int) -> Path:
        """Where the trainer of a trial that is not a slot keeps what it needs to go on from its last evaluation."""
        return self.trial(number) / "checkpoints"

    def goes_on(self, number: int) -> bool:
        """Whether the trial was cut off after an evaluation from which it can go on."""
        checkpoints = self.trial_checkpoints(number)
        states = [checkpoints / name / CHECKPOINT_REPORT for name in self.root.names(checkpoints)]
        return any(map(self.root.exists, [self.trial_state(number), *states]))

    @staticmethod
    def adapter_name(tokens: int) -> str:
        return f"tokens-{tokens:012d}"
