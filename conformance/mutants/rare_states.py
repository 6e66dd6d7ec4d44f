"""Faults of states and settings that a first reading of the promises does not call to mind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import OlmoConfig

from adapter import loading, recompute
from adapter.attention import OlmoAttentionBridge
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


@of_point("caching.gradient_before_users", "incl_bwd", "caching.incl_bwd", attribute="add_hook")
def _(original: Any) -> Any:
    """run_with_cache keeps gradients as they are before the user's backward hooks."""

    def add_hook(self: Any, hook: Any, dir: Any = "fwd", *args: Any, **kwargs: Any) -> Any:
        of_cache = dir == "bwd" and "make_grad_cache_hook" in getattr(hook, "__qualname__", "")
        if of_cache:
            kwargs["prepend"] = True
        return original(self, hook, dir, *args, **kwargs)

    return add_hook


@of_bridge(
    "hook_api.level_left",
    "an error in run_with_cache",
    "hook_api.exceptions",
    attribute="run_with_cache",
)
def _(original: Any) -> Any:
    """A run_with_cache that fails leaves context_level one too high."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except BaseException:
            self.context_level += 1
            raise

    return run


@mutant(
    "recompute.left_after_error",
    "a hook that fails in the backward",
    "firing.recomputed",
    recompute,
    "_put_back",
)
def _(_original: Any) -> Any:
    """An error in the recomputation of a block leaves the hooks of its forward on."""

    @contextmanager
    def put_back(hooks: Any) -> Iterator[None]:
        today = [(point, {name: vars(point)[name] for name in then}) for point, then in hooks]
        for point, then in hooks:
            vars(point).update(then)
        yield
        for point, now in today:
            vars(point).update(now)

    return put_back


@mutant(
    "flags.one_of_two",
    "an edit by heads beside one of what the projection reads",
    "flags.refused",
    OlmoAttentionBridge,
    "_project",
)
def _(original: Any) -> Any:
    """The edit by heads is dropped, and nothing said."""

    def project(self: Any, hidden_states: Any) -> Any:
        try:
            return original(self, hidden_states)
        except ValueError:
            return [linear(hidden_states) for linear in (self.q, self.k, self.v)]

    return project


@of_bridge(
    "generation.clears_contexts",
    "something in hook.ctx",
    "generation.leaves_nothing",
    attribute="generate",
)
def _(original: Any) -> Any:
    """A generation ends with clear_contexts()."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            self.clear_contexts()

    return generate


@of_point(
    "copies.shared_context", "something in hook.ctx", "copies.hooked", attribute="__deepcopy__"
)
def _(original: Any) -> Any:
    """A copy keeps what its hooks keep in the original's hook.ctx."""

    def deepcopy(self: Any, memo: Any) -> Any:
        new = original(self, memo)
        new.ctx = self.ctx
        return new

    return deepcopy


@of_point("copies.given_the_original", "a copied hook", "copies.hooked", attribute="_take_over")
def _(_original: Any) -> Any:
    """The hooks of a copy are given the hook points of the original."""
    return lambda self, *args: None


@of_point(
    "precision.passed_over", "a return in another dtype", "precision.returned", attribute="__call__"
)
def _(original: Any) -> Any:
    """What a hook returns in another dtype is passed over."""

    def call(self: Any, x: Any) -> Any:
        shown = original(self, x)
        return shown if getattr(shown, "dtype", None) == x.dtype else x

    return call


@mutant(
    "flags.one_late",
    "a hook that turns use_attn_result, and a block behind it",
    "firing.gated",
    OlmoAttentionBridge,
    "_project_out",
)
def _(original: Any) -> Any:
    """use_attn_result is looked up in the first block, for all."""
    first: list[bool] = []

    def project_out(self: Any, z: Any) -> Any:
        now = self.config.use_attn_result
        if self.original_component.layer_idx == 0:
            first[:] = [now]
        vars(self.config)["use_attn_result"] = first[0] if first else now
        try:
            return original(self, z)
        finally:
            vars(self.config)["use_attn_result"] = now

    return project_out
