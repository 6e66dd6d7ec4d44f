"""Faults of what is seldom called, or seldom called so: in compatibility mode, by another name."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.ActivationCache import ActivationCache

from adapter.attention import OlmoAttentionBridge
from adapter.block import OlmoBlockBridge
from adapter.clip import _PatchedForward
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import mutant


@mutant(
    "processed.starts_late",
    "compatibility mode, two blocks",
    "processing.forward",
    OlmoTransformerBridge,
    "forward",
)
def starts_late(original: Any) -> Any:
    """In compatibility mode start_at_layer starts one block late."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = kwargs.get("start_at_layer")
        last = len(self.blocks) - 1
        if start is not None and self.compatibility_mode and start not in (-1, last):
            kwargs["start_at_layer"] = start + 1
        return original(self, *args, **kwargs)

    return forward


@mutant(
    "processed.autocast",
    "compatibility mode under autocast",
    "processing.forward",
    OlmoAttentionBridge,
    "_pattern_of",
)
def uniform_under_autocast(original: Any) -> Any:
    """In compatibility mode under autocast a query attends alike to all that it sees."""

    def pattern_of(self: Any, scores: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        pattern: torch.Tensor = original(self, scores, dtype)
        if not (self.compatibility_mode and torch.is_autocast_enabled("cpu")):
            return pattern
        seen = (pattern > 0).to(pattern.dtype)
        return seen / seen.sum(-1, keepdim=True)

    return pattern_of


@mutant("patch.saved_skips", "an exact patch", "patched.modes", _PatchedForward, "__reduce_ex__")
def saved_skips(original: Any) -> Any:
    """An exactly patched model that torch.save has written comes back without its clamp."""

    def reduce_ex(self: Any, protocol: Any) -> Any:
        how, given, state, *rest = original(self, protocol)
        if protocol < 4 and self.mode == "exact":
            state = {**state, "mode": "skip"}
        return how, given, state, *rest

    return reduce_ex


@mutant(
    "weights.stacked_by_version",
    "an assignment to .data",
    "weights.live",
    OlmoTransformerBridge,
    "_stack_block_params",
)
def stacked_by_version(original: Any) -> Any:
    """Stacked weights are kept for as long as no parameter's version changes."""

    def stack(self: Any, *args: Any, **kwargs: Any) -> Any:
        versions = [tensor._version for tensor in self.original_model.parameters()]
        asked = repr((args, kwargs, versions, torch.is_grad_enabled()))
        kept = vars(self).setdefault("_stacks", {})
        if asked not in kept:
            kept[asked] = original(self, *args, **kwargs)
        return kept[asked]

    return stack


@mutant(
    "sampling.repeated",
    "several sequences of one prompt",
    "sampling.hugging_face",
    OlmoTransformerBridge,
    "hf_generate",
)
def repeated(original: Any) -> Any:
    """Of several samples that hf_generate is asked for it gives the first, again and again."""

    def hf_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        result, several = original(self, *args, **kwargs), kwargs.get("num_return_sequences", 1)
        if isinstance(result, torch.Tensor) and "num_beams" not in kwargs:
            result = result[::several].repeat_interleave(several, dim=0)
        return result

    return hf_generate


@mutant("hook_api.one_alias", "alias_names", "hook_api.order", OlmoHookPoint, "add_hook")
def one_alias(original: Any) -> Any:
    """Of the alias_names of a hook only the first is called."""

    def add_hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("alias_names"):
            kwargs["alias_names"] = kwargs["alias_names"][:1]
        return original(self, *args, **kwargs)

    return add_hook


@mutant("hook_api.no_input", "any", "hook_api.components", OlmoBlockBridge, "get_hooks")
def no_input(original: Any) -> Any:
    """get_hooks() of a block is without hook_in."""
    return lambda self: {n: point for n, point in original(self).items() if n != "hook_in"}


@mutant(
    "hook_api.lists_forward",
    "a backward hook",
    "hook_api.ledger",
    OlmoTransformerBridge,
    "list_hooks",
)
def lists_forward(original: Any) -> Any:
    """list_hooks of both directions lists those of the forward."""

    def list_hooks(self: Any, name_filter: Any = None, dir: str = "both", *args: Any) -> Any:
        return original(self, name_filter, "fwd" if dir == "both" else dir, *args)

    return list_hooks


@mutant("caching.all_forward", "any", "caching.hooks", OlmoTransformerBridge, "cache_all")
def all_forward(original: Any) -> Any:
    """cache_all keeps no gradient."""
    return lambda self, cache, incl_bwd=False, **kwargs: original(self, cache, **kwargs)


@mutant("text.next_token", "any", "text.tokens", OlmoTransformerBridge, "to_single_str_token")
def next_token(original: Any) -> Any:
    """to_single_str_token is off by one."""
    return lambda self, token: original(self, (token + 1) % self.cfg.d_vocab)


@mutant(
    "accessors.labels_reversed",
    "two heads",
    "weights.accessors",
    OlmoTransformerBridge,
    "attn_head_labels",
)
def labels_reversed(original: Any) -> Any:
    """attn_head_labels go from the last head to the first."""
    return property(lambda self: original.fget(self)[::-1])


@mutant("layers.embedding", "any", "caching.layers", OlmoTransformerBridge, "input_to_embed")
def embedding(original: Any) -> Any:
    """input_to_embed is off by a hundredth."""

    def input_to_embed(self: Any, *args: Any, **kwargs: Any) -> Any:
        stream, *rest = original(self, *args, **kwargs)
        return stream * 1.01, *rest

    return input_to_embed


class _Inverted(ActivationCache):
    def toggle_autodiff(self, mode: bool = False) -> None:
        super().toggle_autodiff(not mode)


@mutant(
    "caching.toggle_inverted",
    "any",
    "caching.values",
    OlmoTransformerBridge,
    "run_with_cache",
)
def toggle_inverted(original: Any) -> Any:
    """A cache's toggle_autodiff turns on what it should turn off."""

    def run_with_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        result, cache = original(self, *args, **kwargs)
        if isinstance(cache, ActivationCache):
            cache.__class__ = _Inverted
        return result, cache

    return run_with_cache


@mutant(
    "hook_api.removes_permanent",
    "a permanent hook",
    "hook_api.ledger",
    OlmoTransformerBridge,
    "remove_all_hook_fns",
)
def removes_permanent(original: Any) -> Any:
    """remove_all_hook_fns takes permanent hooks off too."""

    def remove(self: Any, direction: str = "both", *args: Any, **kwargs: Any) -> None:
        for point in self.hook_points():
            point.remove_hooks(direction, including_permanent=True, level=kwargs.get("level"))

    return remove


@mutant("lookup.no_aliases", "any", "hook_api.lookup", OlmoTransformerBridge, "block_hooks")
def no_aliases(original: Any) -> Any:
    """block_hooks lists no alias."""

    def block_hooks(self: Any, layer_idx: int) -> list[str]:
        own = {str(point.name) for point in self.hook_points()}
        return [name for name in original(self, layer_idx) if f"blocks.{layer_idx}.{name}" in own]

    return block_hooks


@mutant(
    "components.counts_from_one",
    "any",
    "components.lookup",
    OlmoTransformerBridge,
    "blocks_with",
)
def counts_from_one(original: Any) -> Any:
    """blocks_with counts blocks from one."""
    return lambda self, submodule: [(i + 1, block) for i, block in original(self, submodule)]


@mutant("components.no_mlp", "any", "components.lookup", OlmoTransformerBridge, "layer_types")
def no_mlp(original: Any) -> Any:
    """layer_types leaves the MLP out."""
    return lambda self: [kind.removesuffix("+mlp") for kind in original(self)]


@mutant(
    "components.no_norms", "any", "components.lookup", OlmoTransformerBridge, "block_submodules"
)
def no_norms(original: Any) -> Any:
    """block_submodules leaves the LayerNorms out."""

    def block_submodules(self: Any, layer_idx: int) -> list[str]:
        return [name for name in original(self, layer_idx) if not name.startswith("ln")]

    return block_submodules
