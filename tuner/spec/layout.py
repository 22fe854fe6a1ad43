"""Where every file lies: on this node, and of a root in an object store what lasts there.

No other module joins a path below the storage root.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import DiskFullError, NotFoundError, TunerError
from tuner.spec.objects import Objects, objects_at
from tuner.spec.sweep import NAME, SweepSpec

CHECKPOINT_REPORT = "report.json"
"""The last file of a trainer's checkpoint: one that has it is whole."""
LEFT_TO_RECORDS = 64 * 2**20
"""Bytes of a file system that only records may use: who writes anything else asks `refuse_full_disk` before."""


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


def refuse_full_disk(folder: Path, size: int = 0) -> None:
    """Raise DiskFullError when, after so many bytes more, the file system of a folder had too little for records."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free - size < LEFT_TO_RECORDS:
        raise DiskFullError(
            f"the disk of {there} is full: {free / 1e6:,.0f} MB are free, {size / 1e6:,.0f} MB were to be written, "
            f"and {LEFT_TO_RECORDS / 1e6:.0f} MB are left to the records"
        )


Save = Callable[[Path], None]
"""Writes an adapter, or a whole model, into a folder."""


def flush(path: Path) -> None:
    """Have a file, or a folder with all that is in it, outlive a power cut.

    A file gets the permissions that its folder has, which the umask gave: libraries make theirs for the owner alone.
    """
    for one in (*path.rglob("*"), path, path.parent):
        with suppress(FileNotFoundError):  # another worker's draft
            opened = os.open(one, os.O_RDONLY)
            try:
                if one.is_file():
                    os.fchmod(opened, one.parent.stat().st_mode & 0o666)
                os.fsync(opened)
            finally:
                os.close(opened)


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
        return self.inside(self.path / "sweeps")

    @property
    def models(self) -> Path:
        """Promoted models: models/ALIAS/v1, v2, ... and the link models/ALIAS/current."""
        return self.inside(self.path / "models")

    @property
    def cache(self) -> Path:
        """Tokenised data and converted base models, content-addressed; safe to delete, and never put elsewhere."""
        for kind in ("data", "models"):
            self.inside(self.path / "cache" / kind)
        return self.path / "cache"

    def sweep(self, name: str) -> SweepFolder:
        return SweepFolder(self.inside(self.sweeps / check_name(name, "sweep")), self)

    def alias(self, name: str) -> Path:
        return self.inside(self.models / check_name(name, "alias"))

    def leads_out(self, path: Path) -> bool:
        """Whether a path below the root is one, by a symbolic link, no longer. The root itself may be a link."""
        return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.path))

    def inside(self, path: Path) -> Path:
        """A path below the root. Raises TunerError where it leads out of it."""
        if self.leads_out(path):
            raise TunerError(f"{path} is, or lies behind, a symbolic link that leads out of {self.path}: move it away")
        return path

    # What lasts

    def address(self, path: Path) -> str:
        """How everybody names what lasts of a path below the root: the path itself, or its URL."""
        return str(path) if self.url is None else f"{self.url}/{self._key(path)}"

    def keep(self, path: Path, stays: bool = False) -> str:
        """Have a finished file or folder last, even through a power cut, and return its address.

        With `stays` it is still here afterwards.
        """
        if self.url is None:
            flush(path)
        else:
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
        for found in path.rglob("*"):
            self.inside(found)
        return self.inside(path)

    def exists(self, path: Path) -> bool:
        """Whether a file or folder lasts; in an object store, whether it is whole."""
        return path.exists() if self.url is None else self.objects.exists(self._key(path))

    def read(self, path: Path) -> str:
        """The text of a file that lasts. Raises FileNotFoundError."""
        return self.inside(path).read_text(encoding="utf-8") if self.url is None else self.objects.read(self._key(path))

    def create(self, path: Path, text: str) -> None:
        """Write a file that must not be there yet: of several different texts, one is. Raises FileExistsError."""
        if self.url is not None:
            self.objects.create(self._key(path), text)
        else:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
            flush(path)

    def names(self, path: Path) -> list[str]:
        """What lies in a folder, sorted; nothing where there is none."""
        if self.url is not None:
            return self.objects.names(self._key(path))
        return sorted(os.listdir(path)) if path.is_dir() else []

    def forget(self, path: Path) -> None:
        """Remove a file or folder, here and where it lasts, if it is there."""
        if self.url is not None:
            self.objects.delete(self._key(path))
        _remove(self.inside(path))

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
        return self._at("spec.yaml")

    @property
    def study(self) -> Path:
        return self._at("study.db")

    @property
    def log(self) -> Path:
        """What the libraries said in the driver."""
        return self._at("sweep.log")

    @property
    def promotion_log(self) -> Path:
        """What the libraries said in the processes that merged."""
        return self._at("promotion.log")

    @property
    def verify_log(self) -> Path:
        """What the libraries said while trials were rerun to verify them."""
        return self._at("verify.log")

    @property
    def eval_rows(self) -> Path:
        """The tokenised evaluation set, kept so that a model can be measured again after the cache is gone."""
        return self._at("eval")

    @property
    def ray(self) -> Path:
        """Ray Tune's own files; nothing here is ever read back."""
        return self._at("ray")

    def trial(self, number: int) -> Path:
        return self._at("trials", f"{number:05d}")

    def trial_log(self, number: int) -> Path:
        return self._at_trial(number, "trial.log")

    def adapter(self, number: int, tokens: int) -> Path:
        return self._at_trial(number, f"tokens-{tokens:012d}")

    def keep_adapter(self, number: int, tokens: int, save: Save | None) -> str | None:
        """Have a trial's adapter last, and return its address.

        Without `save`, the address of one that was kept before, if it was.
        """
        adapter = self.adapter(number, tokens)
        if save is not None:
            save(adapter)
            return self.root.keep(adapter)
        return self.root.address(adapter) if self.root.exists(adapter) else None

    def trial_state(self, number: int) -> Path:
        """What a slot on the shared base needs to go on from its last evaluation."""
        return self._at_trial(number, "state.safetensors")

    def trial_checkpoints(self, number: int) -> Path:
        """Where the trainer of a trial that is not a slot keeps what it needs to go on from its last evaluation."""
        return self._at_trial(number, "checkpoints")

    def last_words(self, number: int) -> Path:
        """What a process that was stuck in the trial, and ended itself, says of it."""
        return self._at_trial(number, "last-words.json")

    def goes_on(self, number: int) -> bool:
        """Whether the trial was cut off after an evaluation from which it can go on."""
        checkpoints = self.trial_checkpoints(number)
        states = [checkpoints / name / CHECKPOINT_REPORT for name in self.root.names(checkpoints)]
        return any(map(self.root.exists, [self.trial_state(number), *states]))

    def _at(self, *names: str) -> Path:
        return self.root.inside(self.path.joinpath(*names))

    def _at_trial(self, number: int, name: str) -> Path:
        return self.root.inside(self.trial(number) / name)
