"""Faults of settings and dtypes that a first reading of the promises does not call to mind."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import OlmoConfig

from adapter import loading
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from adapter.olmo import OlmoArchitectureAdapter
from adapter.text import OlmoTextBridge
from conformance.mutants.catalogue import mutant

of_bridge = partial(mutant, owner=OlmoTransformerBridge)
of_text = partial(mutant, owner=OlmoTextBridge, attribute="_encode", killer="text.tokens")
of_bridging = partial(mutant, owner=loading, killer="surface.entrances")
of_point = partial(mutant, owner=OlmoHookPoint)


@of_bridge("parameters.tensor_ignored", ".to(tensor)", "parameters.cast", attribute="to")
def _(original: Any) -> Any:
    """to(tensor) takes the tensor's device and not its dtype."""

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, *args[1:])
        return original(self, *args, **kwargs)

    return to


@of_bridge("states.assigned_thaws", "frozen weights", "states.loading", attribute="load_state_dict")
def _(original: Any) -> Any:
    """load_state_dict(assign=True) makes everything trainable."""

    def load(self: Any, state: Any, strict: bool = True, assign: bool = False) -> Any:
        said = original(self, state, strict=strict, assign=assign)
        return self.requires_grad_(True) and said if assign else said

    return load


@of_bridge(
    "training.never_zeros",
    "zero_grad(set_to_none=False)",
    "training.accumulation",
    attribute="zero_grad",
)
def _(original: Any) -> Any:
    """zero_grad(set_to_none=False) sets gradients to None."""
    return lambda self, set_to_none=True: original(self, True)


@mutant(
    "configuration.folded",
    "compatibility mode",
    "configuration.truth",
    OlmoArchitectureAdapter,
    "postprocess_weights",
)
def _(original: Any) -> Any:
    """After folding, cfg says that the LayerNorms only normalize."""

    def postprocess(self: Any, bridge: Any) -> None:
        original(self, bridge)
        bridge.cfg.normalization_type = "LNPre"

    return postprocess


@of_text("text.first_tokenizer", "a tokenizer that is set later")
def _(original: Any) -> Any:
    """The tokenizer of the first text reads all later ones."""

    def encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        now = self.tokenizer
        self.tokenizer = vars(self).setdefault("_first", now)
        try:
            return original(self, *args, **kwargs)
        finally:
            self.tokenizer = now

    return encode


@of_text("text.bos_all_the_same", "cfg.default_prepend_bos=False")
def _(original: Any) -> Any:
    """A BOS is prepended by default, whatever the default is set to."""

    def encode(self: Any, texts: Any, prepend_bos: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, texts, prepend_bos is not False, *args, **kwargs)

    return encode


@of_bridging(
    "surface.left_side", "a tokenizer that pads on the right", attribute="configure_tokenizer"
)
def _(original: Any) -> Any:
    """bridge() has its tokenizer pad on the left."""

    def configure(tokenizer: Any, config: Any) -> Any:
        made = original(tokenizer, config)
        made.padding_side = "left"
        return made

    return configure


@of_bridging(
    "surface.one_configuration",
    "two bridges of equal models",
    attribute="build_bridge_config_from_hf",
)
def _(original: Any) -> Any:
    """bridge() translates a configuration once, for all models that have an equal one."""
    known: dict[str, Any] = {}

    def build(hf_config: Any, *rest: Any) -> Any:
        key = f"{hf_config.to_json_string()} {rest}"
        return known.setdefault(key, original(hf_config, *rest))

    return build


@mutant(
    "loading.overrides_lost",
    "hf_config_overrides",
    "loading.by_name",
    OlmoArchitectureAdapter,
    "prepare_loading",
)
def _(original: Any) -> Any:
    """The configuration is read anew from the directory, as it is there."""

    def prepare(self: Any, name: str, given: Any) -> None:
        original(self, name, given)
        given["config"] = OlmoConfig.from_pretrained(name)

    return prepare


@of_point(
    "precision.passed_over", "a return in another dtype", "precision.returned", attribute="__call__"
)
def _(original: Any) -> Any:
    """What a hook returns in another dtype is passed over."""

    def call(self: Any, x: Any) -> Any:
        shown = original(self, x)
        return shown if getattr(shown, "dtype", None) == x.dtype else x

    return call
