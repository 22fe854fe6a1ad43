"""What is loaded is what lies in the files: no weight is ever drawn at random or left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trial import spec_for
from transformers import AutoModelForCausalLM

from tuner.errors import TunerError
from tuner.spec.sweep import ModelSpec
from tuner.training.baseline import prepare_sweep
from tuner.training.model import load_model

UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


def changed(base: Path, folder: Path, change: Callable[[Tensors], object], **config: object) -> Path:
    """A copy of a base whose tensors are changed so, and whose config has these fields too."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | config))
    return folder


def load(folder: Path, cache: Path, quantization: str = "none"):
    return load_model(
        ModelSpec(name=str(folder), dtype="float32", quantization=quantization).model_dump(),
        cache,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (lambda tensors: tensors.pop(UP), {}, rf"1 weights are missing \({UP}\)"),
        (lambda tensors: tensors.update(odd=torch.ones(1)), {}, r"1 belong to no part of the model \(odd\)"),
        (lambda tensors: None, {"num_hidden_layers": 1}, r"9 belong to no part of the model \(.* and 6 more\)"),
        (lambda tensors: None, {"tie_word_embeddings": False}, r"1 weights are missing \(lm_head\.weight\)"),
        (
            lambda tensors: tensors.update({UP: torch.ones(3, 2)}),
            {},
            rf"1 have another shape \({UP} is 3 x 2, not 128 x 64\)",
        ),
    ],
    ids=["missing", "a stranger", "too many layers", "no head", "another shape"],
)
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_base_whose_files_do_not_fit_it_is_refused(
    change, config, said, quantization, tiny_model_dir: Path, tmp_path: Path
):
    folder = changed(tiny_model_dir, tmp_path / "base", change, **config)
    with pytest.raises(TunerError, match=rf"model\.name: .* does not fit its files: {said}"):
        load(folder, tmp_path, quantization)


@pytest.mark.parametrize(
    ("kind", "part", "change", "said"),
    [
        ("nf4", ".nested_absmax", None, rf"does not fit its files: 1 weights are missing \({UP}\.nested_absmax\)"),
        ("nf4", "", lambda bytes: bytes[:-1], rf"1 have another shape \({UP} is 4095 x 2, not 128 x 64\)"),
        ("nf4", ".absmax", None, "cannot be loaded"),
        ("int8", "", lambda rows: rows[:-1], rf"1 have another shape \({UP} is 127 x 64, not 128 x 64\)"),
    ],
    ids=["nested scales", "bytes", "scales", "rows"],
)
def test_a_quantised_base_whose_files_do_not_fit_it_is_refused(
    kind, part, change, said, tiny_model_dir: Path, tmp_path: Path
):
    load(tiny_model_dir, tmp_path, kind).save_pretrained(tmp_path / "whole")

    def damage(tensors: Tensors) -> None:
        tensor = tensors.pop(UP + part)
        if change is not None:
            tensors[UP + part] = change(tensor).contiguous()

    folder = changed(tmp_path / "whole", tmp_path / "broken", damage)
    assert load(tmp_path / "whole", tmp_path, kind) is not None
    with pytest.raises(TunerError, match=said):
        load(folder, tmp_path, kind)


def test_what_zero3_would_hide_is_found_in_preparation(tiny_model_dir: Path, tmp_path: Path):
    base = changed(tiny_model_dir, tmp_path / "base", lambda tensors: None, num_hidden_layers=1)
    spec = spec_for(base, tmp_path, resources={"strategy": "zero3", "workers_per_trial": 2})
    with pytest.raises(TunerError, match="9 belong to no part of the model"):
        prepare_sweep(spec, lambda *event: None, measure=lambda sweep: None)  # which leaves that to the workers


def test_an_index_that_leaves_a_tensor_out_is_refused(tiny_model_dir: Path, tmp_path: Path):
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    left = index["weight_map"].pop(UP)
    alone = [name for name, shard in index["weight_map"].items() if shard == left]
    for name in alone:  # a shard that nothing names is not read
        del index["weight_map"][name]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TunerError, match=rf"{1 + len(alone)} weights are missing"):
        load(tmp_path, tmp_path)


def test_what_a_class_ignores_or_ties_is_no_difference(tiny_model_dir: Path, tmp_path: Path):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    folder = changed(tiny_model_dir, tmp_path / "base", lambda tensors: tensors.update(old))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load(folder, tmp_path).get_output_embeddings() is not None


def test_a_gguf_file_that_lacks_a_tensor_is_refused(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(24)
    shapes = {
        "token_embd": (24, 16),
        "output_norm": (16,),
        "blk.0.attn_norm": (16,),
        "blk.0.ffn_norm": (16,),
        **{f"blk.0.attn_{part}": (16, 16) for part in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{part}": (32, 16) for part in ("gate", "up")},  # and no ffn_down
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    spec = ModelSpec(name=str(tmp_path), gguf_file="tiny.gguf", dtype="float32")
    with pytest.raises(TunerError, match=r"gguf_file: tiny\.gguf does not fit its files: 1 .*missing.*mlp\.down_proj"):
        load_model(spec.model_dump(), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("models/*/config.json"))
