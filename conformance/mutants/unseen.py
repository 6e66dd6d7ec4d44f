"""Faults that somebody seeded who had not read the checks, and that none of these saw."""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import methodcaller
from types import SimpleNamespace
from typing import Any

import torch
from transformers.utils import output_capturing

from adapter import attention
from adapter.attention import OlmoAttentionBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from adapter.layouts import SplitHeads
from conformance.mutants.catalogue import Make, add, mutant


def _clipping(clip_of: Callable[[Any], float | None]) -> Make:
    """The clamp by what an attention takes for the clip."""

    def make(original: Any) -> Any:
        def clip_all(self: Any, *projections: torch.Tensor) -> tuple[torch.Tensor, ...]:
            clip = clip_of(self)
            if clip is not None:
                projections = tuple(x.clamp(-clip, clip) for x in projections)
            points = (self.hook_q_clipped, self.hook_k_clipped, self.hook_v_clipped)
            return tuple(point(x) for point, x in zip(points, projections, strict=True))

        return clip_all

    return make


def _first(self: Any) -> float | None:
    """The clip that an attention had in its first forward."""
    kept: float | None = vars(self).setdefault(
        "_first_clip", self.original_component.config.clip_qkv
    )
    return kept


def _whole(self: Any) -> float | None:
    """The clip, in whole numbers if it is large."""
    found: float | None = self.original_component.config.clip_qkv
    return found if found is None or found < 4 else float(round(found))


for name, breaks, trigger, killer, clip_of in (
    ("remembered", "the clip is read once", "a clip that changes", "configuration.live", _first),
    ("whole", "a large clip loses its fraction", "a clip of 6.3", "clamp.sizes", _whole),
):
    add(f"clamp.{name}", breaks, trigger, killer, OlmoAttentionBridge, "_clip", _clipping(clip_of))


@mutant(
    "attention.reported_detached", "any", "alive.output_attentions", attention, "record_attention"
)
def reported_detached(original: Any) -> Any:
    """The patterns that output_attentions=True returns have no gradient."""
    return lambda pattern: original(pattern.detach())


@mutant(
    "attention.reported_early", "an edit", "alive.output_attentions", OlmoAttentionBridge, "forward"
)
def reported_early(original: Any) -> Any:
    """output_attentions=True returns the pattern without what hook_pattern's hooks have done."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen: list[torch.Tensor] = []
        handle = self.hook_attn_scores.register_forward_hook(lambda m, i, o: seen.append(o))
        try:
            output, pattern = original(self, *args, **kwargs)
        finally:
            handle.remove()
        collected = output_capturing._active_collector.get()  # type: ignore[no-untyped-call]
        if collected is not None and "attentions" in collected:
            collected["attentions"][-1] = self._pattern_of(seen[0], pattern.dtype)
        return output, pattern

    return forward


@mutant("hook_api.perma_backward", "any", "hook_api.ledger", OlmoHookPoint, "add_perma_hook")
def perma_backward(original: Any) -> Any:
    """add_perma_hook of a backward hook adds one that is not permanent."""
    return lambda self, hook, dir="fwd": self.add_hook(hook, dir, dir == "fwd")


@mutant("hook_api.not_told", "a backward hook", "hook_api.ledger", OlmoHookPoint, "has_hooks")
def not_told(original: Any) -> Any:
    """has_hooks() knows nothing of backward hooks."""

    def has_hooks(self: Any, dir: str = "both", *args: Any, **kwargs: Any) -> Any:
        return original(self, "fwd" if dir == "both" else dir, *args, **kwargs)

    return has_hooks


@mutant("hook_api.dead_handle", "prepend=True", "hook_api.ledger", OlmoHookPoint, "add_hook")
def dead_handle(original: Any) -> Any:
    """The handle of a hook that was put in front removes nothing."""

    def add_hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = original(self, *args, **kwargs)
        if not kwargs.get("prepend"):
            return handle
        dead = copy.copy(handle)
        dead.hook = SimpleNamespace(remove=lambda: None)
        return dead

    return add_hook


@mutant(
    "hook_api.cache_ends_contexts",
    "run_with_cache inside of hooks()",
    "hook_api.ledger",
    OlmoTransformerBridge,
    "run_with_cache",
)
def cache_ends_contexts(original: Any) -> Any:
    """run_with_cache takes the hooks of an open context away."""

    def run_with_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        for point in self.hook_dict.values():
            point.remove_hooks("fwd", level=1)
        return result

    return run_with_cache


add(
    "modes.inference_shares",
    "under inference mode hooks get the tensor that neighbours read too",
    "an edit in place",
    "modes.inference",
    OlmoHookPoint,
    "forward",
    lambda original: lambda self, x: x if torch.is_inference_mode_enabled() else original(self, x),
)


@mutant("modes.no_dropout_draws", "a dropout of 0", "modes.dropout", attention, "dropout")
def no_dropout_draws(original: Any) -> Any:
    """In train mode a model without dropout draws a random number all the same."""

    def dropout(x: torch.Tensor, p: float, training: bool) -> Any:
        if training and not p:
            torch.rand(())
        return original(x, p=p, training=training)

    return dropout


@mutant("interventions.viewed", "a strided tensor", "interventions.layouts", SplitHeads, "revert")
def viewed(original: Any) -> Any:
    """Heads are joined again by their strides alone, whatever these are."""

    def revert(self: Any, x: torch.Tensor, *context: Any) -> Any:
        joined = (*x.shape[:-2], x.shape[-2] * x.shape[-1])
        return x.as_strided(joined, torch.empty(joined).stride())

    return revert


@mutant(
    "caching.empty_is_all",
    "an empty list of names",
    "caching.values",
    OlmoTransformerBridge,
    "run_with_cache",
)
def empty_is_all(original: Any) -> Any:
    """An empty list of names is taken for no filter."""

    def run_with_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["names_filter"] = kwargs.get("names_filter") or None
        return original(self, *args, **kwargs)

    return run_with_cache


def _after(act: Callable[[Any], object]) -> Make:
    """A method of the bridge with something more that it does."""

    def make(original: Any) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            act(self)
            return result

        return method

    return make


for name, breaks, trigger, killer, owner_method, then in (
    ("copies.cast_evaluates", "a cast ends train mode", "train mode", "copies.cast", "to", "eval"),
    (
        "copies.cast_zeroes",
        "a cast loses gradients",
        "a gradient",
        "copies.cast",
        "to",
        "zero_grad",
    ),
    (
        "states.gradients_lost",
        "loading weights loses the gradients",
        "a gradient",
        "states.loading",
        "load_state_dict",
        "zero_grad",
    ),
    (
        "compatibility.evaluates",
        "processing ends train mode",
        "train mode",
        "compatibility.frozen",
        "process_weights",
        "eval",
    ),
):
    make = _after(methodcaller(then))
    add(name, breaks, trigger, killer, OlmoTransformerBridge, owner_method, make)


@mutant("states.taken_apart", "any", "states.loading", OlmoTransformerBridge, "load_state_dict")
def taken_apart(original: Any) -> Any:
    """load_state_dict takes what it has loaded out of the caller's dictionary."""

    def load_state_dict(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, dict(state_dict), *args, **kwargs)
        state_dict.pop("unembed.bias", None)
        state_dict.popitem()
        return result

    return load_state_dict


@mutant("states.vars_detached", "any", "states.names", OlmoTransformerBridge, "state_dict")
def vars_detached(original: Any) -> Any:
    """state_dict(keep_vars=True) gives tensors that do not require a gradient."""
    return lambda self, *args, keep_vars=False, **kwargs: original(self, *args, **kwargs)


add(
    "weights.labels",
    "heads are counted from 1",
    "any",
    "weights.accessors",
    OlmoTransformerBridge,
    "all_head_labels",
    lambda original: property(
        lambda self: [
            f"L{layer}H{head + 1}"
            for layer in range(self.cfg.n_layers)
            for head in range(self.cfg.n_heads)
        ]
    ),
)


@mutant("returns.beside_detached", "both", "returns.labels", OlmoTransformerBridge, "forward")
def beside_detached(original: Any) -> Any:
    """The gradient of the logits that come beside a loss is cut by a hundredth."""

    def forward(self: Any, input: Any, return_type: Any = "logits", *args: Any, **kw: Any) -> Any:
        result = original(self, input, return_type, *args, **kw)
        if return_type != "both":
            return result
        logits, loss = result
        return logits * 0.99 + logits.detach() - logits.detach() * 0.99, loss

    return forward


@mutant("returns.trained_none", "train mode", "returns.kinds", OlmoTransformerBridge, "forward")
def trained_none(original: Any) -> Any:
    """In train mode return_type=None gives logits."""

    def forward(self: Any, input: Any, return_type: Any = "logits", *args: Any, **kw: Any) -> Any:
        return original(
            self, input, return_type or (self.training and "logits") or None, *args, **kw
        )

    return forward


@mutant("text.side_remembered", "a padding_side", "text.tokens", OlmoTransformerBridge, "to_tokens")
def side_remembered(original: Any) -> Any:
    """A padding_side that was asked for once is the tokenizer's own from then on."""

    def to_tokens(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = original(self, input, *args, **kwargs)
        self.tokenizer.padding_side = kwargs.get("padding_side") or self.tokenizer.padding_side
        return tokens

    return to_tokens


add(
    "hooks.layer",
    "hooks of the third block say that they are of the second",
    "three blocks",
    "hooks.names",
    OlmoHookPoint,
    "layer",
    lambda original: lambda self: original(self) - (original(self) == 2),
)


@mutant(
    "caching.batch_dim_again",
    "a cache without its batch axis",
    "caching.values",
    OlmoTransformerBridge,
    "run_with_cache",
)
def batch_dim_again(original: Any) -> Any:
    """A cache whose batch axis was removed at once says that it has one."""

    def run_with_cache(self: Any, *args: Any, **named: Any) -> Any:
        output, cache = original(self, *args, **named)
        if hasattr(cache, "has_batch_dim"):
            cache.has_batch_dim = True
        return output, cache

    return run_with_cache


@mutant(
    "weights.accumulated_detached",
    "output biases",
    "weights.live",
    OlmoTransformerBridge,
    "accumulated_bias",
)
def accumulated_detached(original: Any) -> Any:
    """No gradient goes through accumulated_bias."""
    return lambda self, *args, **named: original(self, *args, **named).detach()


@mutant(
    "generation.end_zero",
    "an end token 0",
    "sampling.hugging_face",
    OlmoTransformerBridge,
    "hf_generate",
)
def end_zero(original: Any) -> Any:
    """hf_generate takes the end token 0 for none."""

    def hf_generate(self: Any, *args: Any, **named: Any) -> Any:
        if not named.get("eos_token_id", True):
            named["eos_token_id"] = None
        return original(self, *args, **named)

    return hf_generate


@mutant(
    "compatibility.wide_clip",
    "a clip far out",
    "compatibility.value_biases",
    OlmoTransformerBridge,
    "_why_value_biases_must_stay",
)
def wide_clip(original: Any) -> Any:
    """A value bias is folded past a clip that is thought never to bind."""

    def why(self: Any) -> Any:
        clip = self.original_model.config.clip_qkv
        return None if clip is not None and clip > 10 else original(self)

    return why
