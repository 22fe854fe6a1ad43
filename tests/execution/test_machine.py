"""What a trial gets of a cluster, and the clusters on which a sweep is refused."""

from __future__ import annotations

import pytest
from silent import silent

from tuner.errors import MachineError
from tuner.execution import machine
from tuner.execution.machine import (
    AHEAD,
    Placement,
    address_for_every_node,
    place,
    refuse_silence,
    refuse_what_would_hang,
)
from tuner.spec.sweep import SweepSpec


def spec_with(trials: int = 100, **resources: object) -> SweepSpec:
    return SweepSpec.model_validate(
        {
            "name": "placed",
            "model": {"name": "some/model"},
            "data": {"path": "rows.jsonl"},
            "space": {"train.learning_rate": {"type": "choice", "values": [1e-4]}},
            "budget": {"trials": trials, "tokens_per_trial": 1000},
            "resources": resources,
        }
    )


@pytest.mark.parametrize(
    ("nodes", "resources", "worker", "concurrent"),
    [
        ([{"CPU": 2}], {}, {"CPU": 1}, 2),
        ([{"CPU": 2}], {"workers_per_trial": 2}, {"CPU": 1}, 1),
        ([{"CPU": 8}], {"cpus_per_worker": 3}, {"CPU": 3}, 2),
        ([{"CPU": 8}], {"max_concurrent_trials": 3}, {"CPU": 1}, 3),
        ([{"CPU": 8}], {"max_concurrent_trials": 30}, {"CPU": 1}, 8),
        # where there is a GPU a worker gets one, unless it says otherwise
        ([{"CPU": 16, "GPU": 4}], {}, {"CPU": 1, "GPU": 1}, 4),
        ([{"CPU": 16, "GPU": 4}], {"gpus_per_worker": 0}, {"CPU": 1}, 16),
        ([{"CPU": 16, "GPU": 4}], {"workers_per_trial": 2}, {"CPU": 1, "GPU": 1}, 2),
        ([{"CPU": 16, "GPU": 1}], {"gpus_per_worker": 0.5}, {"CPU": 1, "GPU": 0.5}, 2),
        ([{"CPU": 16, "GPU": 1}], {"gpus_per_worker": 0.1}, {"CPU": 1, "GPU": 0.1}, 10),
        ([{"CPU": 4, "GPU": 1}], {"gpus_per_worker": 0.1}, {"CPU": 1, "GPU": 0.1}, 4),
        # a trial spreads over nodes, a worker does not
        ([{"CPU": 3}, {"CPU": 3}], {"cpus_per_worker": 2}, {"CPU": 2}, 2),
        ([{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}], {"workers_per_trial": 2}, {"CPU": 1, "GPU": 1}, 1),
        ([{"CPU": 8}, {"CPU": 1, "GPU": 2}], {}, {"CPU": 1, "GPU": 1}, 1),
    ],
)
def test_the_cluster_is_divided_among_trials(nodes, resources, worker, concurrent):
    placement = place(spec_with(**resources), nodes)
    workers, cpus = resources.get("workers_per_trial", 1), resources.get("cpus_per_worker", 1)
    most = min(resources.get("max_concurrent_trials", 100), 100)
    assert placement == Placement(workers, worker, threads=cpus, concurrent=concurrent, most=most)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"train": {"optim": "paged_adamw_8bit"}}, "train.optim paged_adamw_8bit keeps its state in memory that a GPU"),
        ({"train": {"use_liger_kernel": True}}, "train.use_liger_kernel takes kernels that are written for GPUs"),
        ({"train": {"activation_offloading": True}}, "train.activation_offloading moves activations off a GPU"),
        ({"train": {"tf32": True}}, "train.tf32 is a number format of GPUs"),
        ({"model": {"name": "m", "attn_implementation": "flash_attention_2"}}, "flash_attention_2 is written for GPUs"),
    ],
    ids=str,
)
def test_what_needs_a_gpu_is_refused_where_workers_have_none(sections, reason):
    spec = SweepSpec.model_validate(spec_with().model_dump() | sections)
    assert place(spec, [{"CPU": 8, "GPU": 1}]).concurrent == 1
    with pytest.raises(MachineError, match=f"{reason}.*, and the workers have none"):
        place(spec, [{"CPU": 8}])


def test_no_more_trials_run_at_once_than_there_are():
    assert place(spec_with(trials=3), [{"CPU": 64}]).concurrent == 3


@pytest.mark.parametrize(
    ("nodes", "resources", "message"),
    [
        ([{"CPU": 2}], {"workers_per_trial": 3}, r"one trial needs 3 x \(1 CPU\), the cluster has 2 CPU"),
        ([{"CPU": 2}], {"cpus_per_worker": 4}, r"one trial needs 1 x \(4 CPU\), the cluster has 2 CPU"),
        ([{"CPU": 2}], {"gpus_per_worker": 1}, r"one trial needs 1 x \(1 CPU, 1 GPU\), the cluster has 2 CPU, 0 GPU"),
        ([{"CPU": 2, "GPU": 1}], {"workers_per_trial": 2}, r"needs 2 x \(1 CPU, 1 GPU\), the cluster has 2 CPU, 1 GPU"),
        ([{"CPU": 3}, {"CPU": 3}], {"cpus_per_worker": 4}, r"needs 1 x \(4 CPU\), the cluster has 2 x \(3 CPU\)"),
    ],
)
def test_a_trial_that_fits_nowhere_is_refused_with_what_is_there(nodes, resources, message):
    with pytest.raises(MachineError, match=message):
        place(spec_with(**resources), nodes)


def test_a_cluster_that_may_grow_is_waited_for():
    placement = place(spec_with(gpus_per_worker=1), [{"CPU": 2}], fixed=False)
    assert placement.concurrent == 0
    assert placement.wanted([{"CPU": 2}]) == AHEAD  # what an autoscaler starts nodes for
    assert placement.wanted([{"CPU": 16, "GPU": 8}] * 2) == 16 + AHEAD
    assert place(spec_with(trials=3), [{"CPU": 2}], fixed=False).wanted([{"CPU": 64}]) == 3


@pytest.mark.parametrize(
    ("address", "running", "message"),
    [
        ("local", {"10.0.0.1:6379"}, r"runs on this host already, at 10.0.0.1:6379.*RAY_ADDRESS=auto"),
        ("auto", {"10.0.0.1:6379", "10.0.0.1:7000"}, "2 Ray clusters run on this host"),
        ("auto", set(), "no Ray cluster runs on this host"),
        ("ray://127.0.0.1:1", set(), "'ray://127.0.0.1:1'; allowed: auto, local, HOST:PORT"),
        ("head-node", set(), "'head-node'; allowed: auto, local, HOST:PORT"),
    ],
)
def test_a_host_on_which_a_sweep_would_hang_is_refused(address, running, message):
    with pytest.raises(MachineError, match=message):
        refuse_what_would_hang(address, running)


@pytest.mark.parametrize(("address", "running"), [("local", []), ("auto", ["10.0.0.1:6379"])])
def test_one_cluster_is_fine(address, running):
    refuse_what_would_hang(address, running)


@pytest.mark.parametrize(
    ("address", "running", "expected"),
    [
        ("auto", {"10.0.0.1:6379"}, "10.0.0.1:6379"),
        ("127.0.0.1:6379", {"10.0.0.1:6379"}, "10.0.0.1:6379"),
        ("localhost:6379", {"10.0.0.1:6379"}, "10.0.0.1:6379"),
        ("10.0.0.2:6379", {"10.0.0.1:6379"}, "10.0.0.2:6379"),
        ("10.0.0.2:6379", set(), "10.0.0.2:6379"),
    ],
)
def test_workers_on_other_nodes_get_an_address_that_leads_to_the_head(address, running, expected):
    assert address_for_every_node(address, running) == expected


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999", "127.0.0.1:1" + "0" * 99])
def test_a_cluster_that_is_gone_is_refused(address):
    with pytest.raises(MachineError, match=f"{address}, but no Ray cluster answers there"):
        refuse_silence(address)


def test_a_head_that_takes_a_connection_and_never_answers_is_refused(monkeypatch):
    monkeypatch.setattr(machine, "_GCS_S", 1.0)
    with silent() as port, pytest.raises(MachineError, match=f":{port}, but no Ray cluster answers there"):
        refuse_silence(f"127.0.0.1:{port}")


def test_an_installation_without_the_dashboard_is_refused(monkeypatch):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"pip install \"ray\[default,tune,train\]\""):
        refuse_what_would_hang("local", [])
