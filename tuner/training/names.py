"""Names of modules and parameters in a spec, held against those of the base: one that matches nothing is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import Conv1D

from tuner.errors import Problem
from tuner.spec.checks.fields import place_of, possible_values
from tuner.spec.checks.words import any_of, nearest, show
from tuner.spec.sweep import SweepSpec

_SHORTHANDS = ("all-linear", "all_linear")
_OF_ADAPTED = ("{}", "base_model.model.{}", "base_model.model.{}.base_layer", "base_model.model.{}.lora_A.default")
"""What a module may be called where it has an adapter."""


def unmatched_names(spec: SweepSpec, tree: Any) -> list[Problem]:
    """Find every name, pattern, layer and token of the spec that the base does not have.

    `tree` is the base as transformers makes it; it needs no weights. Each is matched as the library that reads it does.
    """
    found = [*_of_optimizer(spec, tree), *_of_fsdp(spec, tree)]
    if spec.lora is not None:
        found += [*_of_lora(spec, tree), *_of_layers(spec, tree), *_of_tokens(spec, tree)]
    return list(dict.fromkeys(found))


Matches = Callable[[str, str], Any]
"""Takes what the spec says and the name of a module."""


def _of_lora(spec: SweepSpec, tree: Any) -> Iterator[Problem]:
    modules, parameters = _modules(tree), [name for name, _ in tree.named_parameters()]
    adapted = [*_adapted(spec, tree), *_adapted_parameters(spec, parameters)]
    yield from _unmatched(spec, "lora.target_modules", modules, _is_end)
    yield from _unmatched(spec, "lora.exclude_modules", modules, _is_end)
    yield from _unmatched(spec, "lora.target_parameters", parameters, _is_end)
    yield from _unmatched(spec, "lora.modules_to_save", modules, lambda word, name: name.endswith(word))
    yield from _unmatched(spec, "lora.layers_pattern", modules, _holds_layers, is_pattern=_holds_layers)
    for key in ("lora.rank_pattern", "lora.alpha_pattern"):
        yield from _unmatched(spec, key, adapted, _is_pattern_of_end, "names or patterns of what gets an adapter")


def _unmatched(
    spec: SweepSpec,
    key: str,
    known: list[str],
    is_name: Matches,
    allowed: str = "names that match something in the base",
    is_pattern: Matches = re.fullmatch,
) -> Iterator[Problem]:
    """Every word that a value of this key consists of, and that matches none of the known names."""
    for value in possible_values(spec, key):
        matches = is_pattern if isinstance(value, str) else is_name
        for word in [value] if isinstance(value, str) else value or ():
            if not (isinstance(value, str) and word.lower() in _SHORTHANDS) and not _any(matches, word, known):
                yield Problem(place_of(spec, key), show(word), allowed, nearest(word, _ends(known, word)))


def _any(matches: Matches, word: str, known: Iterable[str]) -> bool:
    try:
        return any(matches(word, name) for name in known)
    except re.error:
        return False


def _is_end(word: str, name: str) -> bool:
    return name == word or name.endswith(f".{word}")


def _is_pattern_of_end(word: str, name: str) -> Any:
    return re.match(rf"(.*\.)?({word})$", name)


def _holds_layers(word: str, name: str) -> Any:
    return re.match(rf"(?:^|.*?\.){word}\.\d+\.", name)


def _ends(known: Iterable[str], word: str) -> list[str]:
    """The ends of names that have as many parts as a word."""
    parts = word.count(".") + 1
    return list(dict.fromkeys(".".join(name.split(".")[-parts:]) for name in known))


def _modules(tree: Any) -> list[str]:
    return [name for name, _ in tree.named_modules(remove_duplicate=False) if name]


# What gets an adapter


def _targets(spec: SweepSpec) -> Iterator[SimpleNamespace]:
    """What says which modules get an adapter, as PEFT's configs have it: all that the spec may combine."""
    names = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    for values in product(*(possible_values(spec, f"lora.{name}") for name in names)):
        yield SimpleNamespace(target_parameters=None, **dict(zip(names, values, strict=True)))


def _adapted(spec: SweepSpec, tree: Any) -> list[str]:
    """The modules that get an adapter in any trial of the spec."""
    return list(dict.fromkeys(name for targets in _targets(spec) for name in _adapted_by(targets, tree)))


def _adapted_by(targets: SimpleNamespace, tree: Any) -> list[str]:
    if targets.target_modules is None:  # PEFT's own choice for the type of the model, or parameters alone
        return _modules(tree)
    if isinstance(targets.target_modules, str) and targets.target_modules.lower() == "all-linear":
        head = tree.get_output_embeddings()
        linear = [name for name, one in tree.named_modules() if isinstance(one, torch.nn.Linear | Conv1D)]
        names = [name for name in linear if tree.get_submodule(name) is not head]
        targets = SimpleNamespace(**{**vars(targets), "target_modules": names})
    try:
        return [name for name in _modules(tree) if check_target_module_exists(targets, name)]
    except re.error:
        return []


def _adapted_parameters(spec: SweepSpec, parameters: list[str]) -> Iterator[str]:
    """Those that get one, and the modules that hold them: a pattern may name either."""
    for words in possible_values(spec, "lora.target_parameters"):
        for name in parameters:
            if any(_is_end(word, name) for word in words or ()):
                yield from (name, name.rpartition(".")[0])


def _of_layers(spec: SweepSpec, tree: Any) -> Iterator[Problem]:
    """Layers that hold nothing that gets an adapter, or are not there at all."""
    key = "lora.layers_to_transform"
    for targets in _targets(spec):
        if targets.layers_to_transform is None or not isinstance(targets.target_modules, list):
            continue
        asked = targets.layers_to_transform
        has = []
        for layer in range(tree.config.get_text_config(decoder=True).num_hidden_layers):
            one = SimpleNamespace(**{**vars(targets), "layers_to_transform": [layer]})
            has += [layer] if _adapted_by(one, tree) else []
        for layer in [asked] if isinstance(asked, int) else asked:
            if layer not in has:
                allowed = f"{any_of(has) or 'no number'}, layers of the base with such modules"
                yield Problem(place_of(spec, key), show(layer), allowed)


def _of_tokens(spec: SweepSpec, tree: Any) -> Iterator[Problem]:
    """Tokens that the embedding has no row for, and embeddings that are not there."""
    key = "lora.trainable_token_indices"
    size = tree.get_input_embeddings().weight.shape[0]
    modules = _modules(tree)
    for value in possible_values(spec, key):
        by_name = value if isinstance(value, dict) else {None: value or []}
        for name, tokens in by_name.items():
            if name is not None and not any(one.endswith(name) for one in modules):
                allowed = "names that match something in the base"
                yield Problem(place_of(spec, key), show(name), allowed, nearest(name, _ends(modules, name)))
            for token in tokens:
                if not 0 <= token < size:
                    yield Problem(place_of(spec, key), show(token), f"0 to {size - 1}, the rows of the embedding")


# Others


def _of_optimizer(spec: SweepSpec, tree: Any) -> Iterator[Problem]:
    """Names of linear layers; where there are adapters these are among them."""
    linear = [name for name, module in tree.named_modules() if isinstance(module, torch.nn.Linear)]
    adapted = _OF_ADAPTED if spec.lora is not None else _OF_ADAPTED[:1]

    def is_pattern(word: str, name: str) -> Any:
        return any(re.fullmatch(word, one.format(name)) for one in adapted)

    def is_name(word: str, name: str) -> Any:
        return word in adapted[-1].format(name) or is_pattern(word, name)

    allowed = "names that match a linear layer of the base"
    yield from _unmatched(spec, "train.optim_target_modules", linear, is_name, allowed, is_pattern)


def _of_fsdp(spec: SweepSpec, tree: Any) -> Iterator[Problem]:
    """Classes that FSDP is to wrap."""
    asked = (spec.resources.fsdp or {}).get("transformer_layer_cls_to_wrap")
    classes = sorted({type(module).__name__ for module in tree.modules()})
    for name in asked.split(",") if isinstance(asked, str) else asked or []:
        if name not in classes:
            layers = [one for one in classes if one.endswith(("Layer", "Block"))] or classes
            at = "resources.fsdp.transformer_layer_cls_to_wrap"
            yield Problem(at, show(name), f"classes of the base, such as {any_of(layers)}", nearest(name, classes))
