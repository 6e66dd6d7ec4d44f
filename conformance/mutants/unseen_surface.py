"""Faults of the adapter's surface that nobody had thought of: what it does beside its work."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from adapter import clip, loading
from adapter.olmo import OlmoArchitectureAdapter
from conformance.mutants.catalogue import Make, add, bridge_mutant, mutant


def _once_a_process(original: Any) -> Any:
    told: list[object] = []

    def call(self: Any) -> bool:
        told.append(self)
        return len(told) == 1

    return call


def _exactly_too(original: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.mode == "exact":
            self._warn()
        return original(self, *args, **kwargs)

    return call


add(
    "patch.warns_once_a_process",
    "only the first patched model of a process warns",
    "a second model",
    "forward.patch_warning",
    clip._Once,
    "__call__",
    _once_a_process,
)
add(
    "patch.warns_exactly_too",
    "a model that is patched exactly says that its clamp is skipped",
    "exact_clip=True",
    "forward.patch_warning",
    clip._PatchedForward,
    "__call__",
    _exactly_too,
)


def _and_then(act: Callable[[Any], object]) -> Make:
    """A method of the adapter that is given a model, with something more that it does to it."""

    def make(original: Any) -> Any:
        def method(self: Any, hf_model: Any, *args: Any, **kwargs: Any) -> None:
            original(self, hf_model, *args, **kwargs)
            if isinstance(hf_model, torch.nn.Module):
                act(hf_model)

        return method

    return make


def _forget_cache(model: Any) -> None:
    model.config.use_cache = False


for name, breaks, trigger, owner_method, act in (
    ("eval", "prepare_model ends train mode", "train mode", "prepare_model", lambda m: m.eval()),
    (
        "draws",
        "prepare_model draws a random number",
        "any",
        "prepare_model",
        lambda _: torch.rand(1),
    ),
    (
        "freezes",
        "setup_component_testing freezes the model",
        "any",
        "setup_component_testing",
        partial(torch.nn.Module.requires_grad_, requires_grad=False),
    ),
    (
        "uncached",
        "setup_component_testing turns the model's cache off",
        "use_cache",
        "setup_component_testing",
        _forget_cache,
    ),
):
    add(
        f"surface.{name}",
        breaks,
        trigger,
        "surface.untouched",
        OlmoArchitectureAdapter,
        owner_method,
        _and_then(act),
    )


@bridge_mutant("surface.thaws", "a frozen part", "surface.untouched")
def thaws(bridge: Any) -> None:
    """Building a bridge thaws what was frozen."""
    bridge.original_model.requires_grad_(True)


@bridge_mutant("surface.silences", "any", "surface.untouched")
def silences(bridge: Any) -> None:
    """A bridge that is built turns off the warnings of users."""
    warnings.simplefilter("ignore", UserWarning)


@bridge_mutant("surface.unhooks", "a hook of the user", "surface.untouched")
def unhooks(bridge: Any) -> None:
    """Building a bridge loses the forward hooks of the model."""
    for module in bridge.original_model.modules():
        module._forward_hooks.clear()


@bridge_mutant("configuration.activation", "any", "configuration.truth")
def activation(bridge: Any) -> None:
    """The configuration names another activation."""
    bridge.cfg.act_fn = "tanh"


@bridge_mutant("configuration.last_norm", "any", "configuration.truth")
def last_norm(bridge: Any) -> None:
    """The last LayerNorm has a configuration of its own, with another eps."""
    bridge.ln_final.config = copy.copy(bridge.ln_final.config)
    bridge.ln_final.config.eps = 1e-6


@mutant(
    "components.rotation_copied",
    "frequencies that change",
    "components.wiring",
    OlmoArchitectureAdapter,
    "setup_component_testing",
)
def rotation_copied(original: Any) -> Any:
    """The attentions get a copy of the model's rotary embedding."""

    def setup(self: Any, hf_model: Any, bridge_model: Any = None) -> None:
        original(self, hf_model, bridge_model)
        for block in () if bridge_model is None else bridge_model.blocks:
            block.attn.set_rotary_emb(copy.deepcopy(hf_model.model.rotary_emb))

    return setup


@mutant(
    "components.hooks_reset",
    "a hook of the user",
    "components.wiring",
    OlmoArchitectureAdapter,
    "setup_component_testing",
)
def hooks_reset(original: Any) -> Any:
    """setup_component_testing takes the user's hooks off the bridge."""

    def setup(self: Any, hf_model: Any, bridge_model: Any = None) -> None:
        original(self, hf_model, bridge_model)
        if bridge_model is not None:
            bridge_model.reset_hooks()

    return setup


@mutant("surface.tokenizer_lost", "a tokenizer", "surface.entrances", loading, "bridge")
def tokenizer_lost(original: Any) -> Any:
    """bridge() takes a tokenizer for a text that says none."""

    def bridge(hf_model: Any, tokenizer: Any = None) -> Any:
        made = original(hf_model, tokenizer)
        if tokenizer is not None:
            made.cfg.default_prepend_bos = False
            made.tokenizer.padding_side = "left"
            made.to_tokens = lambda text, **_: torch.tensor([tokenizer(text)["input_ids"][:-1]])
        return made

    return bridge


@mutant("surface.unties", "tied embeddings", "surface.entrances", loading, "bridge")
def unties(original: Any) -> Any:
    """bridge() gives a tied model an unembedding of its own, as long as nobody trains the same."""

    def bridge(hf_model: Any, tokenizer: Any = None) -> Any:
        made = original(hf_model, tokenizer)
        if hf_model.config.tie_word_embeddings:
            weight = made.unembed.original_component.weight
            made.unembed.original_component.weight = torch.nn.Parameter(weight.detach().clone())
        return made

    return bridge


@mutant("surface.no_batches", "any", "surface.constructor", OlmoArchitectureAdapter, "__init__")
def no_batches(original: Any) -> Any:
    """The adapter says that a bridge gives no attentions."""

    def init(self: Any, cfg: Any) -> None:
        original(self, cfg)
        self.supports_hf_output_attentions = False

    return init
