"""Where every file lies: on this node, and of a root in an object store what lasts there.

No other module joins a path below the storage root.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import NotFoundError
from tuner.spec.objects import Objects, objects_at
from tuner.spec.sweep import NAME, SweepSpec

CHECKPOINT_REPORT = "report.json"
"""The last file of a trainer's checkpoint: one that has it is whole."""


def default_root() -> str:
    """The storage root when neither the spec nor the command names one."""
    return absolute_root(os.environ.get("TUNER_ROOT", "runs"))


def absolute_root(root: str | Path) -> str:
    """A storage root as it means the same everywhere: an absolute path, or the URL of an object store."""
    if is_object_store(str(root)):
        return str(root).rstrip("/")
    return os.path.abspath(os.path.expanduser(root))


def is_object_store(root: str) -> bool:
    return "://" in root


def check_name(name: str, what: str) -> str:
    """Return a name that is safe as a folder, or raise `NotFoundError`."""
    if not NAME.fullmatch(name):
        raise NotFoundError(f"{what} {name!r}: allowed are 1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first")
    return name


@dataclass(frozen=True)
class Root:
    """Everything below one storage root.

    Of a root in an object store each node has a folder of its own, to work in. What is to last is put into the store
    with `keep` and is then no longer in that folder; who needs it takes it back with `fetch`. Where the root is a
    folder, both are the same and nothing is copied.
    """

    path: Path
    """On this node."""
    url: str | None = None
    """Of an object store, such as s3://bucket/runs."""

    @classmethod
    def at(cls, place: str) -> Root:
        """The root at an absolute path, or in an object store; TUNER_CACHE is then the folder to work in."""
        if not is_object_store(place):
            return cls(Path(place))
        cache = os.environ.get("TUNER_CACHE") or os.path.expanduser("~/.cache/tuner")
        return cls(Path(cache) / place.partition("://")[2], place)

    @classmethod
    def of(cls, spec: SweepSpec) -> Root:
        return cls.at(spec.storage.root)

    @property
    def place(self) -> str:
        """As `storage.root` names it."""
        return self.url or str(self.path)

    @property
    def sweeps(self) -> Path:
        return self.path / "sweeps"

    @property
    def models(self) -> Path:
        """Promoted models: models/ALIAS/v1, v2, ... and the link models/ALIAS/current."""
        return self.path / "models"

    @property
    def cache(self) -> Path:
        """Tokenised data and converted base models, content-addressed; safe to delete, and never put elsewhere."""
        return self.path / "cache"

    def sweep(self, name: str) -> SweepFolder:
        return SweepFolder(self.sweeps / check_name(name, "sweep"), self)

    def alias(self, name: str) -> Path:
        return self.models / check_name(name, "alias")

    # What lasts

    def address(self, path: Path) -> str:
        """How everybody names what lasts of a path below the root: the path itself, or its URL."""
        return str(path) if self.url is None else f"{self.url}/{self._key(path)}"

    def here(self, address: str) -> Path:
        """The path on this node of what has an address."""
        return Path(address) if self.url is None else self.path / address.removeprefix(f"{self.url}/")

    def keep(self, path: Path, stays: bool = False) -> str:
        """Have a finished file or folder last, and return its address; with `stays` it is still here afterwards."""
        if self.url is not None:
            self.objects.put(path, self._key(path))
            if not stays:
                _remove(path)
        return self.address(path)

    def fetch(self, path: Path) -> Path:
        """The same path, with what lasts of it there now. Raises FileNotFoundError where nothing whole does."""
        if self.url is not None:
            self.objects.get(self._key(path), path)
        elif not path.exists():
            raise FileNotFoundError(path)
        return path

    def exists(self, path: Path) -> bool:
        """Whether a file or folder lasts; in an object store, whether it is whole."""
        return path.exists() if self.url is None else self.objects.exists(self._key(path))

    def read(self, path: Path) -> str:
        """The text of a file that lasts. Raises FileNotFoundError."""
        return path.read_text(encoding="utf-8") if self.url is None else self.objects.read(self._key(path))

    def create(self, path: Path, text: str) -> None:
        """Write a file that must not be there yet: of several different texts, one is. Raises FileExistsError."""
        if self.url is not None:
            self.objects.create(self._key(path), text)
        else:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)

    def names(self, path: Path) -> list[str]:
        """What lies in a folder, sorted; nothing where there is none."""
        if self.url is not None:
            return self.objects.names(self._key(path))
        return sorted(os.listdir(path)) if path.is_dir() else []

    def forget(self, path: Path) -> None:
        """Remove a file or folder, here and where it lasts, if it is there."""
        if self.url is not None:
            self.objects.delete(self._key(path))
        _remove(path)

    @property
    def objects(self) -> Objects:
        """The object store of a root that is one."""
        assert self.url is not None
        return objects_at(self.url)

    def _key(self, path: Path) -> str:
        return "" if path == self.path else path.relative_to(self.path).as_posix()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class SweepFolder:
    """Everything of one sweep."""

    path: Path
    root: Root

    @classmethod
    def of(cls, spec: SweepSpec) -> SweepFolder:
        return Root.of(spec).sweep(spec.name)

    @property
    def address(self) -> str:
        return self.root.address(self.path)

    def exists(self) -> bool:
        """Whether the name is taken."""
        return self.root.exists(self.path if self.root.url is None else self.spec)

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
    def promotion_log(self) -> Path:
        """What the libraries said in the processes that merged."""
        return self.path / "promotion.log"

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
        return self.trial(number) / f"tokens-{tokens:012d}"

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

    def last_words(self, number: int) -> Path:
        """What a process that was stuck in the trial, and ended itself, says of it."""
        return self.trial(number) / "last-words.json"
