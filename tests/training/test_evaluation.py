"""A score depends on the weights and the rows, and on nothing else."""

from __future__ import annotations

import math
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer, pack_dataset

from tuner.training.evaluation import score


def rows() -> Dataset:
    ids = [[5 + (31 * i + 7 * j) % 5000 for j in range(3 + (i * 11) % 37)] for i in range(19)]
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@pytest.fixture(scope="module")
def adapter_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes the tiny model for sure: its B is not zero."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def model_with_adapter(tiny_model_dir: Path, adapter_dir: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter_dir, is_trainable=True)


def reference(model: torch.nn.Module, examples: Dataset) -> tuple[float, float]:
    """The definition, one row and one token at a time: no padding, no packing, no fused head."""
    model.eval()
    nll, correct, tokens = 0.0, 0, 0
    with torch.no_grad():
        for example in examples:
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].double()
            log_probs = logits.log_softmax(-1)
            for position, label in enumerate(example["labels"][1:]):
                if label != -100:
                    nll -= log_probs[position, label].item()
                    correct += int(logits[position].argmax().item() == label)
                    tokens += 1
    return nll / tokens, correct / tokens


@pytest.mark.parametrize("packing", ["none", "bfd", "bfd_split", "wrapped"])
def test_the_same_adapter_scores_the_same_under_every_packing_and_batch_size(
    packing, tiny_model_dir, adapter_dir, tmp_path
):
    model = model_with_adapter(tiny_model_dir, adapter_dir)
    expected_loss, expected_accuracy = reference(model, rows())
    train_rows = rows() if packing == "none" else pack_dataset(rows(), 32, packing)
    trainer = SFTTrainer(  # a trainer changes the model's forward; which packing it uses must not matter to the score
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            packing=packing != "none",
            packing_strategy=packing if packing != "none" else "bfd",
            dataset_kwargs={"skip_prepare_dataset": True},
            per_device_train_batch_size=2,
            max_steps=2,
            learning_rate=0.0,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=train_rows,
    )
    trainer.train()
    for batch_size in (1, 3, 8):
        result = score(trainer.model, rows(), batch_size)
        assert result.eval_loss == pytest.approx(expected_loss, abs=1e-5)
        assert result.mean_token_accuracy == pytest.approx(expected_accuracy, abs=1e-9)
        assert trainer.model.training  # as it was before


def score_on_rank(rank: int, world: int, port: int, folders: tuple[Path, Path], queue: multiprocessing.Queue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    result = score(model_with_adapter(*folders), rows(), 3)
    queue.put((rank, result.eval_loss, result.mean_token_accuracy, result.tokens))
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(180)
def test_two_ranks_score_as_one_even_when_the_last_batch_is_uneven(tiny_model_dir, adapter_dir):
    alone = score(model_with_adapter(tiny_model_dir, adapter_dir), rows(), 3)  # 7 batches: one rank gets an empty one
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = 29500 + os.getpid() % 1000
    folders = (tiny_model_dir, adapter_dir)
    ranks = [context.Process(target=score_on_rank, args=(rank, 2, port, folders, queue)) for rank in range(2)]
    try:
        for process in ranks:
            process.start()
        for _ in ranks:
            _, loss, accuracy, tokens = queue.get(timeout=150)
            assert loss == pytest.approx(alone.eval_loss, abs=1e-5)
            assert accuracy == alone.mean_token_accuracy
            assert tokens == alone.tokens
    finally:
        for process in ranks:
            process.kill()
            process.join()


def test_weights_that_are_not_finite_give_a_score_that_is_not_finite(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    assert math.isnan(score(model, rows()).eval_loss)


def test_scoring_leaves_the_model_as_it_was(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    before = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    score(model, rows())
    assert torch.equal(model(input_ids=torch.tensor([[5, 6, 7]])).logits, before)


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """One batch of 4,096 tokens over a vocabulary of 150,000: full float32 logits would take 2.4 GB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=150_000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    long = [[(7 * i + j) % 150_000 for j in range(1024)] for i in range(4)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        score(model, Dataset.from_dict({"input_ids": long, "labels": long}), 4)
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name == "[memory]")
    assert largest < 600e6
