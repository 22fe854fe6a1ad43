"""The sweep one writes by hand after the documentation of Ray Tune, Ray Train and TRL; none of ours is used.

One function that Tune calls for a trial and that starts a `TorchTrainer`, one that its worker runs and that is a plain
`SFTTrainer` with Ray's own reporting callback, Optuna to propose, ASHA to stop. Two trials at a time, a core each.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import ray
import ray.train
from ray import tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch


def train_worker(config: dict[str, Any]) -> None:
    import resource
    import time

    import psutil
    import torch
    from datasets import load_from_disk
    from peft import LoraConfig
    from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class NoteStart(TrainerCallback):
        """For the benchmark: when training begins."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.log_history.append({"began": time.time()})

    if memory := config.get("memory"):  # bytes that may be allocated from here on
        limit = psutil.Process().memory_info().data + memory
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))

    bf16 = config["dtype"] == "bfloat16"
    every = config["steps"] // config["evals"]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(config["model"], dtype=getattr(torch, config["dtype"])),
        processing_class=AutoTokenizer.from_pretrained(config["model"]),
        train_dataset=load_from_disk(config["train_rows"]),
        eval_dataset=load_from_disk(config["eval_rows"]),
        peft_config=LoraConfig(r=config["lora_r"], target_modules="all-linear", task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir="checkpoints",
            learning_rate=config["learning_rate"],
            per_device_train_batch_size=config["rows"],
            max_length=config["length"],
            max_steps=config["steps"],
            logging_steps=every,
            eval_strategy="steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            packing=True,
            packing_strategy="wrapped",
            eval_packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},  # tokenised beforehand
            gradient_checkpointing=False,
            bf16=bf16,
            use_cpu=True,
            data_seed=42,
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.add_callback(NoteStart())
    trainer.add_callback(RayTrainReportCallback())
    prepare_trainer(trainer).train()


def trial(config: dict[str, Any], fixed: dict[str, Any]) -> None:
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=fixed | config,
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            name=f"train-{tune.get_context().get_trial_id()}",
            storage_path=fixed["storage"],
            callbacks=[TuneReportCallback()],
        ),
    )
    trainer.fit()


def sweep(fixed: dict[str, Any], callbacks: Sequence[tune.Callback]) -> None:
    """Run so many `trials`: the `points` listed, or, without a list, what Optuna proposes and ASHA lets live."""
    ray.init(log_to_driver=False)
    searched = not fixed["points"]
    tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, fixed=fixed), {"CPU": 0.01}),  # the worker takes the core
        param_space=fixed.get("space")
        or {
            "learning_rate": tune.loguniform(*fixed["learning_rates"]),
            "lora_r": tune.choice(fixed["ranks"]),
        },
        tune_config=tune.TuneConfig(
            metric="eval_loss",
            mode="min",
            search_alg=OptunaSearch(seed=fixed["seed"], points_to_evaluate=fixed["points"] or None),
            scheduler=ASHAScheduler(max_t=fixed["evals"], reduction_factor=3) if searched else None,
            num_samples=fixed["trials"],
            max_concurrent_trials=os.cpu_count(),
        ),
        run_config=tune.RunConfig(storage_path=fixed["storage"], callbacks=list(callbacks), verbose=0),
    ).fit()
