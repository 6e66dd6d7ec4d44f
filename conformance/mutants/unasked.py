"""Faults of what is seldom asked: empty texts, a list of lists, the order of a cache."""

from __future__ import annotations

import re
from typing import Any
from unicodedata import normalize

import torch
from transformer_lens import ActivationCache, FactoredMatrix

from adapter.compatibility import OlmoTransformerBridge
from adapter.mlp import OlmoMLPBridge
from adapter.normalization import OlmoLayerNormBridge
from adapter.text import OlmoTextBridge
from conformance.mutants.catalogue import mutant


@mutant("text.empty_is_a_token", "an empty text", "text.tokens", OlmoTextBridge, "_encode")
def _(original: Any) -> Any:
    """An empty text is read as a blank."""

    def encode(self: Any, texts: Any, *args: Any, **named: Any) -> Any:
        every = [texts] if isinstance(texts, str) else texts
        return original(self, [text or " " for text in every], *args, **named)

    return encode


@mutant(
    "text.normalized",
    "characters that are compatible with others",
    "text.tokens",
    OlmoTextBridge,
    "_encode",
)
def _(original: Any) -> Any:
    """Texts are normalized otherwise than the tokenizer does it."""

    def encode(self: Any, texts: Any, *args: Any, **named: Any) -> Any:
        every = [texts] if isinstance(texts, str) else texts
        return original(self, [normalize("NFKC", text) for text in every], *args, **named)

    return encode


@mutant("text.list_of_lists", "a list of rows", "text.tokens", OlmoTextBridge, "to_string")
def _(original: Any) -> Any:
    """Rows that are given as lists become one string."""

    def to_string(self: Any, tokens: Any) -> Any:
        rows = isinstance(tokens, list) and any(isinstance(row, list) for row in tokens)
        return original(self, [token for row in tokens for token in row] if rows else tokens)

    return to_string


@mutant(
    "calls.row_of_padding",
    "a row of padding alone",
    "calls.masks",
    OlmoTransformerBridge,
    "forward",
)
def _(original: Any) -> Any:
    """The logits of a row of padding alone are zero."""

    def forward(self: Any, *args: Any, attention_mask: Any = None, **named: Any) -> Any:
        found = original(self, *args, attention_mask=attention_mask, **named)
        flat = attention_mask is not None and attention_mask.ndim == 2
        if flat and isinstance(found, torch.Tensor) and found.ndim == 3:
            empty = (attention_mask == 0).all(dim=1)
            found = found.masked_fill(empty[:, None, None], 0)
        return found

    return forward


@mutant(
    "caching.later_chunk",
    "run_with_cache over a key-value cache",
    "chunks.edits",
    OlmoTransformerBridge,
    "run_with_cache",
)
def _(original: Any) -> Any:
    """What is kept of a later chunk was computed without those before it."""

    def run_with_cache(self: Any, *args: Any, past_key_values: Any = None, **named: Any) -> Any:
        output, cache = original(self, *args, past_key_values=past_key_values, **named)
        if past_key_values is not None and past_key_values.get_seq_length() > output.shape[1]:
            mask = named.pop("attention_mask", None)
            short = None if mask is None else mask[:, -output.shape[1] :]
            _, cache = original(self, *args, attention_mask=short, **named)
        return output, cache

    return run_with_cache


@mutant(
    "returns.loss_before_hooks",
    "a hook at the unembedding",
    "returns.kinds",
    OlmoTransformerBridge,
    "forward",
)
def _(original: Any) -> Any:
    """The loss is that of the logits before a hook edits them."""

    def forward(self: Any, *args: Any, return_type: Any = "logits", **named: Any) -> Any:
        found = original(self, *args, return_type=return_type, **named)
        point = self.unembed.hook_out
        if return_type not in ("loss", "both") or not point._forward_hooks:
            return found
        hooks, point._forward_hooks = point._forward_hooks, {}
        try:
            loss = original(self, *args, return_type="loss", **named)
        finally:
            point._forward_hooks = hooks
        return loss if return_type == "loss" else (found[0], loss)

    return forward


def _giving(original: Any, kind: type[ActivationCache]) -> Any:
    """A run_with_cache that gives caches of a kind."""

    def run_with_cache(self: Any, *args: Any, **named: Any) -> Any:
        output, cache = original(self, *args, **named)
        if isinstance(cache, ActivationCache):
            cache.__class__ = kind
        return output, cache

    return run_with_cache


@mutant(
    "analysis.to_batch",
    "a cache without its batch axis",
    "caching.values",
    OlmoTransformerBridge,
    "run_with_cache",
)
def _(original: Any) -> Any:
    """A cache that is moved to a device says that it has a batch axis again."""

    class Moved(ActivationCache):
        def to(self, device: Any) -> Any:
            self.has_batch_dim = True
            return super().to(device)

    return _giving(original, Moved)


@mutant("caching.order", "any", "caching.values", OlmoTransformerBridge, "run_with_cache")
def _(original: Any) -> Any:
    """What is kept is sorted by name."""

    def run_with_cache(self: Any, *args: Any, **named: Any) -> Any:
        output, cache = original(self, *args, **named)
        held = cache.cache_dict if isinstance(cache, ActivationCache) else cache
        for name in sorted(held):
            held[name] = held.pop(name)
        return output, cache

    return run_with_cache


@mutant("circuits.dense", "any", "circuits.products", OlmoTransformerBridge, "OV")
def _(original: Any) -> Any:
    """The OV circuit is one dense matrix beside an identity: it has eigenvalues of no head."""

    def dense(self: Any) -> FactoredMatrix:
        whole = original.fget(self).AB
        return FactoredMatrix(whole, torch.eye(whole.shape[-1], dtype=whole.dtype))

    return property(dense)


@mutant("circuits.eigenvalues", "several heads", "circuits.products", OlmoTransformerBridge, "QK")
def _(original: Any) -> Any:
    """The eigenvalues of the QK circuits of a layer are those of its first head."""

    class Broken(FactoredMatrix):
        @property
        def eigenvalues(self) -> Any:
            found = super().eigenvalues
            return found[:, :1].expand_as(found) if found.ndim == 3 else found

    def circuit(self: Any) -> FactoredMatrix:
        whole = original.fget(self)
        return Broken(whole.A, whole.B)

    return property(circuit)


@mutant(
    "calls.logits_to_keep",
    "logits_to_keep",
    "calls.spelled",
    OlmoTransformerBridge,
    "forward",
)
def _(original: Any) -> Any:
    """The first logits are kept instead of the last."""

    def forward(self: Any, *args: Any, logits_to_keep: int = 0, **named: Any) -> Any:
        found = original(self, *args, **named)
        return found[:, :logits_to_keep] if logits_to_keep else found

    return forward


def _by_name(stack: torch.Tensor, labels: Any) -> torch.Tensor:
    """The pieces of blocks in the order of the blocks' names: 0, 1, 10, 2."""
    numbers = [re.match(r"L?(\d+)", label) for label in labels]
    blocks = {at: number[1] for at, number in enumerate(numbers) if number}
    named = sorted(blocks, key=lambda at: blocks[at])
    stack = stack.clone()
    stack[list(blocks)] = stack[named]
    return stack


@mutant(
    "analysis.ten_layers",
    "eleven blocks",
    "decompositions.components",
    OlmoTransformerBridge,
    "run_with_cache",
)
def _(original: Any) -> Any:
    """decompose_resid takes blocks in the order of their names."""

    class Sorted(ActivationCache):
        def decompose_resid(self, *args: Any, **named: Any) -> Any:
            stack, labels = super().decompose_resid(*args, **named)
            return _by_name(stack, labels), labels

    return _giving(original, Sorted)


@mutant(
    "analysis.ten_layers_of_heads",
    "eleven blocks",
    "decompositions.heads",
    OlmoTransformerBridge,
    "run_with_cache",
)
def _(original: Any) -> Any:
    """stack_head_results takes blocks in the order of their names."""

    class Sorted(ActivationCache):
        def stack_head_results(self, *args: Any, **named: Any) -> Any:
            stack, labels = super().stack_head_results(*args, **named)
            return _by_name(stack, labels), labels

    return _giving(original, Sorted)


@mutant(
    "analysis.long_results",
    "more than 32 tokens",
    "decompositions.heads",
    OlmoTransformerBridge,
    "run_with_cache",
)
def _(original: Any) -> Any:
    """stack_head_results is wrong on more than 32 tokens."""

    class Short(ActivationCache):
        def stack_head_results(self, *args: Any, **named: Any) -> Any:
            found = super().stack_head_results(*args, **named)
            if self["blocks.0.attn.hook_z"].shape[-3] <= 32:
                return found
            return (found[0] / 2, *found[1:]) if isinstance(found, tuple) else found / 2

    return _giving(original, Short)


@mutant(
    "torch_hooks.backward",
    "a backward hook of PyTorch's",
    "hook_api.torch",
    OlmoMLPBridge,
    "register_full_backward_hook",
)
def _(original: Any) -> Any:
    """A full backward hook on an MLP is called twice."""

    def register(self: Any, hook: Any, *args: Any, **named: Any) -> Any:
        original(self, lambda *told: hook(*told) and None, *args, **named)
        return original(self, hook, *args, **named)

    return register


@mutant(
    "torch_hooks.backward_of_input",
    "a backward hook of PyTorch's",
    "hook_api.torch",
    OlmoLayerNormBridge,
    "register_full_backward_hook",
)
def _(original: Any) -> Any:
    """A full backward hook on a LayerNorm is told the gradient of its input as its output's."""

    def register(self: Any, hook: Any, *args: Any, **named: Any) -> Any:
        def swapped(module: Any, inputs: Any, outputs: Any) -> Any:
            return hook(module, outputs, inputs)

        return original(self, swapped, *args, **named)

    return register
