"""A point of the space becomes a trial; conditions decide which keys it has."""

from __future__ import annotations

import pytest

from tuner.errors import NotFoundError
from tuner.spec.layout import Root, check_name
from tuner.spec.load import load_spec
from tuner.spec.space import in_order, is_active, resolve


def test_a_point_lies_over_the_fixed_values(good):
    spec = load_spec(good, ["train.max_length=64", "lora.lora_dropout=0.1"])
    trial = resolve(spec, 3, {"train.learning_rate": 1e-4, "train.packing": "bfd", "lora.r": 8})
    assert trial["number"] == 3
    assert trial["train"] == {"max_length": 64, "learning_rate": 1e-4, "packing": "bfd"}
    assert trial["lora"] == {"lora_dropout": 0.1, "r": 8}
    assert trial["model"]["dtype"] == "bfloat16"
    assert spec.train == {"max_length": 64}


@pytest.mark.parametrize(("ratio", "rank", "alpha"), [(2, 8, 16), (0.5, 8, 4), (0.5, 1, 0.5)])
def test_alpha_is_the_ratio_times_the_rank(ratio, rank, alpha, good):
    spec = load_spec(good, ["space.lora.alpha_ratio={type: choice, values: [0.5, 2]}"])
    lora = resolve(spec, 0, {"lora.r": rank, "lora.alpha_ratio": ratio})["lora"]
    assert lora == {"r": rank, "lora_alpha": alpha}
    assert isinstance(lora["lora_alpha"], type(alpha))


def test_a_fixed_ratio_follows_the_searched_rank(good):
    spec = load_spec(good, ["lora.alpha_ratio=2"])
    assert resolve(spec, 0, {"lora.r": 4})["lora"]["lora_alpha"] == 8


def test_a_searched_model_value_replaces_the_default(good):
    spec = load_spec(good, ["space.model.dtype={type: choice, values: [float32, bfloat16]}"])
    assert resolve(spec, 0, {"model.dtype": "float32"})["model"]["dtype"] == "float32"


def test_conditions_look_at_the_point(good):
    spec = load_spec(good, ["space.lora.r.when.train.packing=[bfd]"])
    rank = spec.space["lora.r"]
    assert is_active(rank, {"train.packing": "bfd"})
    assert not is_active(rank, {"train.packing": "none"})
    assert not is_active(rank, {})


def test_parents_come_before_the_keys_that_depend_on_them(good):
    spec = load_spec(good, ["space.train.learning_rate.when.lora.r=[8]", "space.lora.r.when.train.packing=[bfd]"])
    assert in_order(spec.space) == ["train.packing", "lora.r", "train.learning_rate"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a b", "x" * 65, "é", "a\n"])
def test_a_name_that_is_no_plain_folder_is_refused(name, tmp_path):
    with pytest.raises(NotFoundError, match="allowed are 1 to 64"):
        check_name(name, "sweep")
    with pytest.raises(NotFoundError):
        Root(tmp_path).sweep(name)


def test_every_path_of_a_sweep_lies_below_the_root(tmp_path):
    folder = Root(tmp_path).sweep("a.b-c_1")
    assert folder.adapter(7, 2500) == tmp_path / "sweeps" / "a.b-c_1" / "trials" / "00007" / "tokens-000000002500"
