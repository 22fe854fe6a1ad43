"""Hyperparameter search for fine-tuning language models: one YAML in, a verified, promoted model out.

    import tuner

    sweep = tuner.run("search_spaces/demo.yaml")
    sweep.best.point, sweep.best.eval_loss
    sweep.trials().sort_values("eval_loss")

Public names are imported when they are first used: `import tuner` loads no heavy library.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Every process of ours imports this before torch, or inherits it: threads that wait leave the cores to other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from tuner.api import Sweep, load_spec, open, resume, run, submit, sweeps, worst_case
    from tuner.errors import DataError, JobError, MachineError, NotFoundError, PromotionRefused, SpecError, TunerError

__all__ = [
    "DataError",
    "JobError",
    "MachineError",
    "NotFoundError",
    "PromotionRefused",
    "SpecError",
    "Sweep",
    "TunerError",
    "load_spec",
    "open",
    "resume",
    "run",
    "submit",
    "sweeps",
    "worst_case",
]

_HOMES = {name: "tuner.errors" if name.endswith(("Error", "Refused")) else "tuner.api" for name in __all__}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tuner' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
