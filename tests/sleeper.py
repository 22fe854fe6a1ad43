"""A model with code of its own, by which a test makes its training stand still, or fail, when it wants to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

CODE = '''
import os
import time

from transformers import LlamaForCausalLM


class Sleeper(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.register_forward_pre_hook(fall_asleep)


def fall_asleep(model, inputs):
    """Whoever trains, and of these workers, takes the bed; the others find none."""
    bed = f"{model.config.bed}-{os.environ.get('RANK', '0')}"
    if not model.training or not os.path.exists(bed):
        return
    os.rename(bed, f"{bed}-taken")
    if open(f"{bed}-taken").read():
        raise RuntimeError(f"rank {os.environ['RANK']} has had enough")
    time.sleep(1_000_000)
'''


class Sleeper:
    """A copy of a tiny model, to be loaded with `trust_remote_code`."""

    def __init__(self, tiny_model_dir: Path, folder: Path):
        self.path = shutil.copytree(tiny_model_dir, folder / "sleeper")
        self._bed = folder / "bed"
        (self.path / "sleeper.py").write_text(CODE)
        config = json.loads((self.path / "config.json").read_text())
        config |= {"bed": str(self._bed), "auto_map": {"AutoModelForCausalLM": "sleeper.Sleeper"}}
        (self.path / "config.json").write_text(json.dumps(config))

    def sleep(self, rank: int = 0) -> None:
        """Have the next training step, of the worker of this rank where there are several, last for ever."""
        self._bed.with_name(f"bed-{rank}").touch()

    def fail(self, rank: int = 0) -> None:
        """Have it raise an error instead."""
        self._bed.with_name(f"bed-{rank}").write_text("no")
