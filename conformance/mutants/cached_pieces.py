"""Faults of what a cache is taken apart into: a cache that tells one small lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformer_lens import ActivationCache

from adapter.compatibility import OlmoTransformerBridge
from conformance.mutants.catalogue import add, mutant

Lie = Callable[..., Any]


def _lying(method: str, lie: Lie) -> Callable[[Any], Any]:
    """A run_with_cache whose cache answers ``method`` by ``lie``, given the honest one."""

    class Lying(ActivationCache):
        pass

    def tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        return lie(self, getattr(super(Lying, self), method), *args, **kwargs)

    setattr(Lying, method, tell)

    def make(original: Any) -> Any:
        def run_with_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
            output, cache = original(self, *args, **kwargs)
            if isinstance(cache, ActivationCache):
                cache.__class__ = Lying
            return output, cache

        return run_with_cache

    return make


def _stack(change: Callable[[Any, Any, dict[str, Any]], Any]) -> Lie:
    """A lie about the stack that a method gives, with or without labels."""

    def lie(self: Any, honest: Any, *args: Any, **kwargs: Any) -> Any:
        found = honest(*args, **kwargs)
        if isinstance(found, tuple):
            return change(self, found[0].clone(), kwargs), found[1]
        return change(self, found.clone(), kwargs)

    return lie


def _remainder_without_bias(self: Any, stack: Any, asked: dict[str, Any]) -> Any:
    bias = self.model.blocks[0].attn.b_O
    if asked["incl_remainder"] and bias is not None and not asked["apply_ln"]:
        stack[-1] -= bias
    return stack


def _neuron_twice(self: Any, stack: Any, asked: dict[str, Any]) -> Any:
    if len(stack) > 2:
        stack[0] = stack[1]
    return stack


def _labels_by_kind(self: Any, honest: Any, *args: Any, **kwargs: Any) -> Any:
    stack, labels = honest(*args, **kwargs)
    return stack, sorted(labels, key=lambda label: label.partition("_")[2])


def _one_off(self: Any, stack: Any, asked: dict[str, Any]) -> Any:
    return stack if isinstance(asked["pos_slice"], int) else stack.roll(1, -2)


def _first_norm(
    self: Any, honest: Any, layer: Any, mlp_input: bool, *rest: Any, **named: Any
) -> Any:
    return honest(layer, False, *rest, **named)


def _last_block(
    self: Any, honest: Any, layer: Any, mlp_input: bool, *rest: Any, **named: Any
) -> Any:
    last = self.model.cfg.n_layers
    if layer in (None, last):
        return honest(last - 1, True, *rest, **named)
    return honest(layer, mlp_input, *rest, **named)


def _rows_alike(self: Any, honest: Any, *args: Any, **named: Any) -> Any:
    scale = honest(*args, **named)
    rows = scale.ndim == 3 and len(scale) > 1
    return scale[:1].expand_as(scale) if rows else scale


def _own_scale(self: Any, honest: Any, *args: Any, **kwargs: Any) -> Any:
    return honest(*args, **kwargs | {"recompute_ln": False})


def _added(self: Any, honest: Any, stack: Any, tokens: Any, wrong: Any, **kwargs: Any) -> Any:
    found = honest(stack, tokens, wrong, **kwargs)
    return found if wrong is None else found + 2 * honest(stack, wrong, **kwargs)


def _larger_embedding(self: Any, stack: Any, asked: dict[str, Any]) -> Any:
    stack[-2] *= 1.01
    return stack


def _early(self: Any, honest: Any, name: str, layer: Any = -1, kind: Any = None) -> Any:
    last = layer in (-1, None)
    stack = honest(name, layer, kind).clone()
    if last and len(stack) > 1:
        stack[-1] = stack[-2]
    return stack


def _from_the_end(self: Any, honest: Any, key: Any) -> Any:
    if isinstance(key, tuple) and len(key) > 1 and isinstance(key[1], int) and key[1] < -1:
        key = (key[0], key[1] + 1, *key[2:])
    return honest(key)


def _heads_turned(self: Any, honest: Any, *args: Any, **kwargs: Any) -> Any:
    stack, labels = honest(*args, **kwargs)
    heads = self.model.cfg.n_heads
    return torch.cat([stack[:heads].flip(0), stack[heads:]]), labels


LIES: tuple[tuple[str, str, str, str, str, Lie], ...] = (
    (
        "pieces.labels_by_kind",
        "decompose_resid names all attentions before all MLPs",
        "two layers and both kinds",
        "decompositions.components",
        "decompose_resid",
        _labels_by_kind,
    ),
    (
        "pieces.position",
        "decompose_resid gives each position of a range the tensor of the one before",
        "two positions",
        "decompositions.components",
        "decompose_resid",
        _stack(_one_off),
    ),
    (
        "pieces.first_norm",
        "what an MLP reads is divided by the scale of its layer's first LayerNorm",
        "mlp_input",
        "decompositions.norms",
        "_get_cached_ln_scale",
        _first_norm,
    ),
    (
        "pieces.heads_turned",
        "the heads of layer 0 are in the reverse order",
        "two heads",
        "decompositions.heads",
        "stack_head_results",
        _heads_turned,
    ),
    (
        "pieces.remainder_first",
        "the remainder stands first, and is still called the last",
        "incl_remainder",
        "decompositions.heads",
        "stack_head_results",
        _stack(lambda self, stack, asked: stack.roll(int(asked["incl_remainder"]), 0)),
    ),
    (
        "pieces.remainder_without_bias",
        "the remainder of the heads lacks the first output bias",
        "incl_remainder and a bias of o",
        "decompositions.heads",
        "stack_head_results",
        _stack(_remainder_without_bias),
    ),
    (
        "pieces.neuron_twice",
        "the first neuron asked for is the second",
        "two neurons",
        "decompositions.neurons",
        "stack_neuron_results",
        _stack(_neuron_twice),
    ),
    (
        "pieces.last_block_scale",
        "at the end, neurons are divided by the scale before the last MLP",
        "apply_ln at the end",
        "decompositions.neurons",
        "_get_cached_ln_scale",
        _last_block,
    ),
    (
        "pieces.embedding_larger",
        "in the full decomposition the embedding is a hundredth larger",
        "any",
        "decompositions.full",
        "get_full_resid_decomposition",
        _stack(_larger_embedding),
    ),
    (
        "pieces.rows_alike",
        "all rows are divided by the first one's scale",
        "two rows",
        "decompositions.norms",
        "_get_cached_ln_scale",
        _rows_alike,
    ),
    (
        "pieces.not_recomputed",
        "a scale that is to be recomputed is the final one all the same",
        "recompute_ln",
        "decompositions.norms",
        "apply_ln_to_stack",
        _own_scale,
    ),
    (
        "pieces.incorrect_added",
        "the share of incorrect tokens is added, not subtracted",
        "incorrect_tokens",
        "decompositions.logits",
        "logit_attrs",
        lambda self, honest, stack, tokens, incorrect_tokens=None, **named: _added(
            self, honest, stack, tokens, incorrect_tokens, **named
        ),
    ),
    (
        "pieces.last_twice",
        "stacked to the end, the last layer's tensor is that of the layer before",
        "two layers",
        "decompositions.stacked",
        "stack_activation",
        _early,
    ),
    (
        "pieces.from_the_end",
        "a layer counted from the end is the one after it",
        "two layers",
        "decompositions.stacked",
        "__getitem__",
        _from_the_end,
    ),
)
for name, breaks, trigger, killer, method, lie in LIES:
    add(name, breaks, trigger, killer, OlmoTransformerBridge, "run_with_cache", _lying(method, lie))


@mutant(
    "pieces.bias_short",
    "two layers and a bias of o",
    "decompositions.full",
    OlmoTransformerBridge,
    "accumulated_bias",
)
def bias_short(original: Any) -> Any:
    """The accumulated bias stops one layer early at the end."""

    def accumulated(self: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
        return original(self, layer - (layer == self.cfg.n_layers), *args, **kwargs)

    return accumulated


@mutant(
    "pieces.row_directions",
    "a token for each position of two rows",
    "decompositions.logits",
    OlmoTransformerBridge,
    "tokens_to_residual_directions",
)
def row_directions(original: Any) -> Any:
    """Tokens given for each position are those of the first row, in all rows."""

    def directions(self: Any, tokens: Any) -> Any:
        two = isinstance(tokens, torch.Tensor) and tokens.ndim == 2
        return original(self, tokens[:1].expand_as(tokens) if two else tokens)

    return directions


@mutant(
    "pieces.folded_bias_forgotten",
    "value biases that are folded",
    "decompositions.processed",
    OlmoTransformerBridge,
    "accumulated_bias",
)
def folded_bias_forgotten(original: Any) -> Any:
    """In compatibility mode the accumulated bias is that of nothing."""

    def accumulated(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        return found * 0 if self.compatibility_mode else found

    return accumulated


def _mean_kept(self: Any, stack: Any, asked: dict[str, Any]) -> Any:
    return stack + 1e-3 * stack.std() if self.model.compatibility_mode else stack


for method in ("stack_head_results", "stack_neuron_results"):
    add(
        f"pieces.mean_kept_{method.split('_')[1]}",
        f"in compatibility mode what {method} gives has a small mean left",
        "no LayerNorm on the pieces",
        "decompositions.processed",
        OlmoTransformerBridge,
        "run_with_cache",
        _lying(method, _stack(_mean_kept)),
    )
