"""What every node of a cluster must have: a sweep whose paths lie on one node only is refused before it begins."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tuner.errors import MachineError
from tuner.spec.layout import is_object_store
from tuner.spec.sweep import SweepSpec

TIMEOUT_S = 120.0


def refuse_what_a_node_lacks(spec: SweepSpec) -> None:
    """Raise MachineError when a node does not see a path or module that the spec names, or the storage root.

    Where there is one node, it is this one, on which the spec was checked: all that is asked is whether it may write.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    look = ray.remote(num_cpus=0, max_retries=0)(_lacking)
    with _mark(spec.storage.root) as marks:
        if len(nodes) == 1:
            return
        answers = []
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answers.append(look.options(scheduling_strategy=there).remote([*_paths(spec), *marks], _modules(spec)))
        found = ray.get(answers, timeout=TIMEOUT_S)
    named = dict.fromkeys(marks, f"the storage root {spec.storage.root}")
    lacks = [
        f"{node['NodeManagerAddress']} lacks {', '.join(named.get(one, one) for one in lacking)}"
        for node, lacking in zip(nodes, found, strict=True)
        if lacking
    ]
    if lacks:
        raise MachineError(
            f"every node must have what the spec names: {'; '.join(lacks)}. Paths belong where all nodes mount them "
            "(or name a hub id), modules in the cluster's image"
        )


def _paths(spec: SweepSpec) -> list[str]:
    data, template = spec.data, spec.train.get("chat_template_path")
    places = (spec.model.name, data.path, data.eval_path, template)
    return [place for place in places if isinstance(place, str) and os.path.isabs(place)]


def _modules(spec: SweepSpec) -> list[str]:
    packages = [spec.model.name.removeprefix("package:")] if spec.model.name.startswith("package:") else []
    return packages + ([spec.data.formatter.partition(":")[0].partition(".")[0]] if spec.data.formatter else [])


def _lacking(paths: Sequence[str], modules: Sequence[str]) -> list[str]:
    missing = [path for path in paths if not os.path.exists(path)]
    return missing + [f"module {name}" for name in modules if importlib.util.find_spec(name) is None]


@contextmanager
def _mark(root: str) -> Iterator[list[str]]:
    """The path of a new file in the storage root; none where that is an object store, which every node reaches."""
    if is_object_store(root):
        yield []
        return
    try:
        os.makedirs(root, exist_ok=True)
        file = tempfile.NamedTemporaryFile(dir=root, prefix=".seen-")  # noqa: SIM115  # the `with` is below
    except OSError as error:
        raise MachineError(f"storage.root {root} cannot be written here: {error.strerror}") from None
    with file:
        yield [file.name]
