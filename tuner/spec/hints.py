"""What people type that is no key of a spec, and what to write instead.

The names are those of TRL and transformers (older versions too), PEFT, axolotl, LLaMA-Factory, unsloth and Ray Tune.
The table grows as names come: a new one is a word in a line.
"""

from __future__ import annotations

from functools import cache

from tuner.errors import Problem
from tuner.spec.policy import USER
from tuner.spec.sweep import SweepSpec, section_of

_NAMES: dict[str, str] = {
    # --- the base
    "model.name": "model_name_or_path model_name model_id model_path base_model base_model_config base_model_name "
    "pretrained_model_name_or_path tokenizer tokenizer_name tokenizer_name_or_path tokenizer_config processing_class "
    "model_init",
    "model.revision": "model_revision base_model_revision revision_of_model",
    "model.dtype": "torch_dtype bf16 fp16 bfloat16 float16 half_precision_backend pure_bf16 precision mixed_precision "
    "bnb_4bit_compute_dtype",
    "model.quantization: nf4": "load_in_4bit use_4bit bnb_4bit_quant_type qlora",
    "model.quantization: int8": "load_in_8bit use_8bit",
    "model.quantization: none, int8 or nf4": "quantization_config bnb_config quantization_bit quantization_method",
    "nothing, nf4 always quantises its constants as well (model.quantization)": "bnb_4bit_use_double_quant "
    "double_quantization",
    "model.attn_implementation": "flash_attention flash_attn flash_attention_2 use_flash_attention_2 "
    "use_flash_attention sdp_attention xformers_attention attention_implementation attn",
    "model.gguf_file": "gguf",
    "nothing, each worker loads the base on its own device (resources.gpus_per_worker)": "device_map device "
    "low_cpu_mem_usage max_memory",
    # --- the data
    "data.path": "dataset datasets dataset_path dataset_name dataset_dir data_path data_file data_files data_dir "
    "train_file train_data train_dataset train_path file_name",
    "data.name": "dataset_config dataset_config_name subset dataset_subset",
    "data.split": "dataset_split dataset_train_split train_split train_on_split",
    "data.eval_path": "eval_file eval_data eval_dataset validation_file validation_data validation_dataset test_file "
    "test_dataset test_datasets val_file val_dataset dataset_test_split",
    "data.eval_fraction": "val_set_size val_size validation_split validation_split_percentage test_size eval_size "
    "test_split_size",
    "data.max_train_examples": "max_train_samples max_samples num_train_samples",
    "data.max_eval_examples": "max_eval_samples num_eval_samples",
    "data.format": "dataset_format dataset_type",
    "data.formatter": "formatting_func formatting_function format_func preprocess_function preprocessing_function",
    "data.columns": "column_mapping columns_mapping rename_columns field_messages field_instruction field_output "
    "prompt_column response_column message_property_mappings",
    "train.dataset_text_field": "text_field text_column",
    "train.chat_template_path, a .jinja file or a tokenizer's folder": "chat_template chat_template_jinja",
    "train.chat_template_path for a chat template, data.template for a text with {column} fields": "template "
    "prompt_template",
    "nothing, rows are tokenised once, before the trials": "preprocessing_num_workers dataset_processes "
    "dataset_batch_size dataset_num_workers tokenized_path",
    "storage.root, which holds the cache too": "cache_dir dataset_prepared_path dataset_cache_path overwrite_cache",
    "train.eos_token; tokens that the base lacks cannot be added": "special_tokens add_tokens new_tokens "
    "additional_special_tokens",
    "nothing, padding never counts: the tokenizer's own pad token is used": "padding_side pad_to_sequence_len",
    "nothing, rows are collated as TRL does; train.completion_only_loss says what counts": "data_collator collator",
    "train.completion_only_loss for prompts and completions, train.assistant_only_loss for chat": "response_template "
    "instruction_template response_part instruction_part train_on_inputs train_on_input train_on_prompt mask_prompt "
    "mask_history train_on_responses_only roles_to_train",
    # --- the training
    "train.max_length": "max_seq_length max_seq_len sequence_len sequence_length seq_length seq_len cutoff_len "
    "block_size model_max_length context_length max_prompt_length max_source_length",
    "train.packing": "sample_packing use_packing neat_packing pack pack_sequences",
    "nothing, the evaluation set is never packed": "eval_sample_packing",
    "train.train_sampling_strategy: group_by_length": "group_by_length",
    "train.learning_rate": "lr learning_rates",
    "nothing, LoRA+ is not offered; train.learning_rate is that of both factors": "loraplus_lr_ratio "
    "loraplus_lr_embedding lora_plus_ratio",
    "train.optim": "optimizer optimizers optimizer_name optimizer_type optimizer_cls_and_kwargs",
    "train.optim_args": "optim_kwargs optimizer_args optimizer_kwargs",
    "train.lr_scheduler_type": "lr_scheduler lr_schedule scheduler_type learning_rate_schedule",
    "train.lr_scheduler_type, or stopping.type for early stopping": "scheduler",
    "train.lr_scheduler_kwargs": "scheduler_kwargs lr_scheduler_args",
    "train.lr_scheduler_kwargs: {min_lr_rate: ...} beside cosine_with_min_lr": "cosine_min_lr_ratio min_lr_ratio",
    "train.warmup_steps, a number below 1 being a share": "warmup_ratio warmup warmup_proportion num_warmup_steps",
    "train.max_grad_norm": "gradient_clipping grad_clip clip_grad_norm grad_clip_norm gradient_clip_val max_norm",
    "train.adam_beta1 and train.adam_beta2": "betas adam_betas",
    "train.per_device_train_batch_size": "per_gpu_train_batch_size per_device_batch_size batch_size train_batch_size "
    "micro_batch_size",
    "train.per_device_eval_batch_size": "per_gpu_eval_batch_size eval_batch_size val_batch_size",
    "train.gradient_accumulation_steps": "gradient_accumulation grad_accumulation_steps grad_accum "
    "accumulation_steps accumulate_grad_batches",
    "train.gradient_checkpointing": "use_gradient_checkpointing checkpoint_activations",
    "train.use_liger_kernel": "use_liger enable_liger_kernel liger liger_kernel",
    "train.neftune_noise_alpha": "neftune neftune_alpha noise_alpha",
    "train.torch_compile": "compile",
    "train.loss_type": "loss_fn loss_function compute_loss_func custom_loss",
    "train.seed": "random_state random_seed",
    "train.seed of the trials, search.seed of the sampler, data.seed of the hold-out": "seed",
    "nothing, trials take no callbacks; stopping.type and stopping.patience end them early": "callbacks callback",
    "nothing, a trial is supervised fine-tuning by TRL's SFTTrainer": "stage rl trl method task ref_model beta",
    # --- LoRA
    "lora": "peft_config lora_config adapter finetuning_type use_peft use_lora",
    "lora: null": "full_finetuning",
    "lora.r": "rank lora_r lora_rank",
    "lora.lora_alpha": "alpha",
    "lora.lora_dropout": "dropout",
    "lora.target_modules": "lora_target lora_target_modules target_layers",
    "lora.target_modules: all-linear, the default": "lora_target_linear",
    "lora.modules_to_save": "lora_modules_to_save additional_target",
    "lora.use_rslora": "rslora peft_use_rslora",
    "lora.use_dora": "dora peft_use_dora",
    "lora.layers_to_transform": "peft_layers_to_transform",
    "lora.init_lora_weights": "peft_init_lora_weights",
    # --- budget, objective, search
    "budget.trials": "num_trials n_trials max_trials num_samples n_samples",
    "budget.epochs_per_trial": "epochs num_epochs n_epochs max_epochs num_train_epochs",
    "budget.steps_per_trial": "steps num_steps max_steps max_train_steps total_steps",
    "budget.tokens_per_trial": "max_tokens num_tokens",
    "budget.evals_per_trial": "evaluation_strategy eval_strategy eval_steps evals_per_epoch eval_interval eval_every "
    "val_check_interval",
    "budget.time_limit": "timeout max_time time_budget time_budget_s time_limit_s",
    "budget.gpu_hours": "gpu_budget max_gpu_hours",
    "objective.metric": "metric eval_metric compute_metrics compute_objective metric_for_best_model "
    "preprocess_logits_for_metrics",
    "objective.goal": "direction mode greater_is_better",
    "search.sampler": "search_alg search_algorithm algorithm",
    "search.enqueue": "points_to_evaluate initial_points",
    "stopping.type": "pruner",
    "stopping.type, or stopping.patience": "early_stopping",
    "stopping.patience": "early_stopping_patience",
    "stopping.min_delta": "early_stopping_threshold",
    "stopping.grace_evals": "grace_period",
    # --- resources and storage
    "resources.workers_per_trial": "num_workers num_gpus n_gpus world_size nproc_per_node num_processes",
    "resources.gpus_per_worker": "no_cuda use_cpu use_gpu gpus gpus_per_trial num_gpus_per_trial",
    "resources.cpus_per_worker": "cpus num_cpus cpus_per_trial",
    "resources.max_concurrent_trials": "max_concurrent max_parallel_trials n_jobs parallelism",
    "resources.strategy": "distributed_strategy distributed_type",
    "resources.deepspeed": "deepspeed_config",
    "resources.fsdp": "fsdp_config",
    "storage.root": "output_dir output_path save_dir logging_dir local_dir storage_path",
    "nothing, every trial has its own folder below storage.root": "overwrite_output_dir",
    "storage.keep_best": "save_total_limit save_steps save_strategy num_to_keep keep_checkpoints_num",
    "name": "run_name experiment_name study_name",
    "nothing, `tuner promote NAME --push-to-hub REPO` pushes the promoted model": "push_to_hub hub_model_id "
    "hub_strategy hub_private_repo",
    "the environment variable HF_TOKEN: a spec is copied, so it holds no secret": "hf_token hub_token use_auth_token "
    "hf_use_auth_token token",
    "nothing, no tracker is written to; `tuner results NAME --json` has every figure": "report_to wandb use_wandb "
    "wandb_project wandb_entity wandb_name mlflow_tracking_uri mlflow_experiment_name use_mlflow comet_project_name "
    "use_tensorboard",
    "nothing, `tuner show NAME TRIAL` shows a trial's log": "log_level verbose verbosity logging_steps "
    "logging_strategy disable_tqdm",
}
HINTS = {name: instead for instead, names in _NAMES.items() for name in names.split()}
"""What people type, without its section -> the key to write instead, or a sentence."""

UNKNOWN = "an unknown key"


def unknown_key(at: str, allowed: str, near: str | None, key: str | None = None) -> Problem:
    """The problem of a key that does not exist: what the table says, else the same name elsewhere, else what is near.

    `at` is where it stands; `key` is the dotted key itself, where that is another.
    """
    name = (key or at).rpartition(".")[2]
    if name in HINTS:
        return Problem(at, "a name of older versions or other tools", HINTS[name])
    return Problem(at, UNKNOWN, allowed, _by_name().get(name) or near)


@cache
def _by_name() -> dict[str, str]:
    """Every name that one section alone has a key of, and that key."""
    keys: dict[str, list[str]] = {}
    for key in all_keys():
        keys.setdefault(key.rpartition(".")[2], []).append(key)
    return {name: found[0] for name, found in keys.items() if len(found) == 1}


@cache
def all_keys() -> frozenset[str]:
    """Every dotted key that a spec may have, but for those of a space."""
    keys = {*USER}
    for name, field in SweepSpec.model_fields.items():
        section = section_of(field)
        keys |= {f"{name}.{inner}" for inner in section.model_fields} if section else {name}
    return frozenset(keys)
