"""Who decides each field of SFTConfig and LoraConfig: the user, the service, or nobody any more.

Every field of the snapshot stands in exactly one of USER and OWNED; a test holds that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Owned:
    """Why a field is not the user's, and where to say what was meant, if anywhere."""

    reason: str
    instead: str | None = None


def _each(section: str, names: str) -> list[str]:
    return [f"{section}.{name}" for name in names.split()]


_TRAIN = """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
    max_length truncation_mode packing padding_free pad_to_multiple_of
    completion_only_loss assistant_only_loss dataset_text_field eos_token chat_template_path
    loss_type label_smoothing_factor neftune_noise_alpha router_aux_loss_coef
    seed data_seed full_determinism train_sampling_strategy
    gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs
    activation_offloading torch_empty_cache_steps
    tf32 torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_timeout
"""
_LORA = """
    r lora_alpha alpha_ratio lora_dropout use_rslora use_dora bias init_lora_weights
    target_modules exclude_modules target_parameters layers_to_transform layers_pattern rank_pattern alpha_pattern
    modules_to_save trainable_token_indices ensure_weight_tying fan_in_fan_out
"""
USER = frozenset(_each("train", _TRAIN) + _each("lora", _LORA))
"""Fields that a spec may fix, and search unless they stand in FIXED_ONLY."""

_CHANGES_EVAL = "it changes what the evaluation measures, so that trials could not be compared"
FIXED_ONLY = {
    **dict.fromkeys(
        _each(
            "train",
            "completion_only_loss assistant_only_loss dataset_text_field eos_token chat_template_path truncation_mode",
        ),
        _CHANGES_EVAL,
    ),
    **dict.fromkeys(
        _each(
            "train",
            "per_device_eval_batch_size gradient_checkpointing activation_checkpointing torch_empty_cache_steps "
            "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
            "dataloader_multiprocessing_context dataloader_in_order "
            "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_timeout",
        ),
        "it does not change any score",
    ),
}
"""Fields that may be fixed but not searched, and why."""

_BY_REASON: dict[tuple[str, str | None], list[str]] = {
    ("a trial's length is its budget", "budget.steps_per_trial"): ["train.max_steps"],
    ("a trial's length is its budget", "budget.epochs_per_trial"): ["train.num_train_epochs"],
    ("say the strategy in packing itself", "train.packing"): ["train.packing_strategy"],
    ("the evaluation set is never packed", None): ["train.eval_packing"],
    ("evaluations stand at equal token counts", "budget.evals_per_trial"): _each(
        "train", "eval_strategy eval_steps eval_delay eval_on_start do_eval"
    ),
    ("the service evaluates with token-weighted sums of its own", None): _each(
        "train",
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "include_for_metrics batch_eval_metrics bf16_full_eval fp16_full_eval label_names",
    ),
    ("the best evaluation of each trial is chosen by the objective", "objective.metric"): _each(
        "train", "metric_for_best_model greater_is_better load_best_model_at_end"
    ),
    ("the service keeps the adapters, and decides where", "storage.keep_best"): _each(
        "train", "save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint"
    ),
    ("every trial has its folder below the storage root", "storage.root"): ["train.output_dir"],
    ("`tuner resume` continues a sweep", None): _each(
        "train", "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint"
    ),
    ("every evaluation is reported to the sweep's store", None): _each(
        "train",
        "report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id logging_strategy "
        "logging_steps logging_first_step logging_nan_inf_filter include_num_input_tokens_seen skip_memory_metrics",
    ),
    ("`tuner show NAME TRIAL` shows a trial's log, which holds all that is printed", None): _each(
        "train", "log_level log_level_replica log_on_each_node disable_tqdm debug"
    ),
    ("only a promoted model is pushed, by `tuner promote --push-to-hub`", None): _each(
        "train", "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision"
    ),
    ("it follows the type of the base", "model.dtype"): _each("train", "bf16 fp16"),
    ("it belongs to the model", "model.trust_remote_code"): ["train.trust_remote_code"],
    ("the model section says how the base is loaded", "model.dtype"): ["train.model_init_kwargs"],
    ("Ray Train places the workers", "resources.strategy"): _each(
        "train", "fsdp fsdp_config deepspeed accelerator_config parallelism_config ddp_backend local_rank use_cpu"
    ),
    ("a batch size found in mid-trial would change the budget", "train.per_device_train_batch_size"): [
        "train.auto_find_batch_size"
    ],
    ("the loss is always a mean over the tokens of all workers", None): ["train.average_tokens_across_devices"],
    ("rows are tokenised and packed once, before the trials", None): _each(
        "train", "dataset_kwargs dataset_num_proc shuffle_dataset remove_unused_columns length_column_name"
    ),
    ("padding never counts, in a loss or a score: it is the tokenizer's pad token, else its eos token", None): [
        "train.pad_token"
    ],
    ("TRL trains without a cache of keys and values", None): ["train.use_cache"],
    ("a trial trains and nothing else", None): _each("train", "do_train do_predict"),
    ("the service trains causal language models with LoRA", None): _each(
        "lora", "task_type peft_type auto_mapping peft_version inference_mode runtime_config"
    ),
    ("the base is the sweep's", "model.name"): ["lora.base_model_name_or_path"],
    ("the base is the sweep's", "model.revision"): ["lora.revision"],
    ("it changes the base, and its adapter does not fit the original one", None): _each(
        "lora", "layer_replication loftq_config corda_config lora_ga_config kasa_config"
    ),
    ("it needs a pass over data before training", None): ["lora.eva_config"],
    ("its adapter cannot be merged into a plain model", None): _each("lora", "alora_invocation_tokens arrow_config"),
    ("its merge needs a bias in every layer, which bases seldom have", None): ["lora.lora_bias"],
    ("a variant of LoRA whose merge this service does not verify", None): _each(
        "lora", "monteclora_config velora_config use_bdlora"
    ),
    ("it needs a base this service does not load", None): _each(
        "lora", "megatron_config megatron_core use_qalora qalora_group_size"
    ),
}
OWNED = {key: Owned(reason, instead) for (reason, instead), keys in _BY_REASON.items() for key in keys}
"""Fields that a spec may not name."""

HARMLESS: dict[str, tuple[Any, ...]] = {
    "train.report_to": ("none", [], ["none"]),
    "train.push_to_hub": (False,),
    "train.do_train": (True,),
    "train.eval_packing": (False,),
    "train.disable_tqdm": (True,),
    "train.save_strategy": ("no",),
    "train.use_cache": (False,),
}
"""Values of OWNED fields that ask for what the service does anyway: a spec may say them."""

REFUSED_VALUES = {
    ("train.lr_scheduler_type", "reduce_lr_on_plateau"): "the schedule ends where the budget does",
    ("train.lr_scheduler_type", "greedy"): "the schedule ends where the budget does",
    ("train.optim", "galore_adafactor_layerwise"): "galore-torch refuses a learning rate for it, which a trial has",
    **{
        ("lora.init_lora_weights", value): "it changes the base, and its adapter does not fit the original one"
        for value in ("pissa", "pissa_niter_[number of iters]", "olora", "corda", "loftq", "lora_ga")
    },
    ("lora.init_lora_weights", "eva"): "it needs a pass over data before training",
}
"""Choices of a field that the libraries take and the service does not, and why."""
