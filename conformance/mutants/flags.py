"""Faults of the flags, and of what they let a researcher see and edit."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge.generalized_components import BlockBridge

from adapter import attention
from adapter.attention import OlmoAttentionBridge
from adapter.block import OlmoBlockBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import add, mutant, shared


@mutant(
    "flags.split_bias", "a bias, split inputs", "flags.unchanged", OlmoAttentionBridge, "_project"
)
def split_bias(original: Any) -> Any:
    """The path of the split inputs loses the projections' biases."""

    def project(self: Any, *given: Any) -> list[torch.Tensor]:
        projected = original(self, *given)
        if not self.forks_input:
            return projected  # type: ignore[no-any-return]
        biases = [linear.original_component.bias for linear in (self.q, self.k, self.v)]
        return [x if bias is None else x - bias for x, bias in zip(projected, biases, strict=True)]

    return project


@mutant("flags.sticky", "any input flag", "flags.unchanged", OlmoAttentionBridge, "forks_input")
def sticky(original: Any) -> Any:
    """Inputs that were split once fire hooks of their own for ever."""

    def forks(self: Any) -> bool:
        own = vars(self)
        own["_forked"] = own.get("_forked", False) or original.fget(self)
        return bool(own["_forked"])

    return property(forks)


def _by_head(z: torch.Tensor, projection: Any, d_head: int) -> torch.Tensor:
    weight = projection.weight.view(projection.out_features, -1, d_head)
    return torch.einsum("bphd,mhd->bphm", z.view(*z.shape[:-1], -1, d_head), weight)


@mutant("flags.result_summed", "use_attn_result", "flags.hooks", attention, "head_contributions")
def result_summed(original: Any) -> Any:
    """Results are summed by head also where none is edited: another rounding."""

    def contributions(z: torch.Tensor, projection: Any, d_head: int, hook: Any) -> torch.Tensor:
        summed: torch.Tensor = hook(_by_head(z, projection, d_head)).sum(2)
        return summed if projection.bias is None else summed + projection.bias

    return contributions


@mutant(
    "flags.result_unasked",
    "use_attn_result",
    "flags.unchanged",
    OlmoAttentionBridge,
    "_project_out",
)
def result_unasked(original: Any) -> Any:
    """Results are summed by head also where nobody looks at any."""

    def project_out(self: Any, z: torch.Tensor) -> torch.Tensor:
        if not self.config.use_attn_result or self.hook_result.has_hooks():
            output: torch.Tensor = original(self, z)
            return output
        hf = self.original_component
        summed = _by_head(z, hf.o_proj.original_component, hf.head_dim).sum(2)
        bias = hf.o_proj.original_component.bias
        return self.o.hook_out(summed if bias is None else summed + bias)  # type: ignore[no-any-return]

    return project_out


@mutant("flags.result_twice", "use_attn_result", "flags.hooks", attention, "head_contributions")
def result_twice(original: Any) -> Any:
    """Under use_attn_result, z and o_proj get their gradient twice."""

    def contributions(z: torch.Tensor, projection: Any, d_head: int, hook: Any) -> torch.Tensor:
        results = _by_head(z, projection, d_head)
        output: torch.Tensor = projection(z) + (hook(results) - results.detach()).sum(2)
        return output

    return contributions


add(
    "flags.result_reversed",
    "hook_result shows the heads in reverse, and takes them so",
    "more than one head, use_attn_result",
    "flags.hooks",
    attention,
    "head_contributions",
    lambda original: (
        lambda z, projection, d_head, hook: original(
            z, projection, d_head, lambda results: hook(results.flip(2)).flip(2)
        )
    ),
)

add(
    "flags.input_normalized",
    "hook_q_input and the like are behind the LayerNorm",
    "any input flag",
    "flags.hooks",
    attention,
    "change_of_heads",
    lambda original: (
        lambda residual, norm, hook, heads: original(
            norm(residual), torch.nn.Identity(), hook, heads
        )
    ),
)


@mutant("flags.attn_in_of_queries", "use_attn_in", "flags.hooks", OlmoAttentionBridge, "_changes")
def attn_in_of_queries(original: Any) -> Any:
    """The gradient of hook_attn_in is that of the queries alone."""

    def changes(self: Any, residual: torch.Tensor, norm: Any) -> Any:
        q, k, v = original(self, residual, norm)
        if q is None or not self.config.use_attn_in:
            return [q, k, v]
        return [q, k.detach(), v.detach()]

    return changes


add(
    "flags.group_first",
    "a key-value head reads the first copy of its group, and not their mean",
    "grouped heads, an edit of hook_attn_in",
    "flags.edits",
    attention,
    "mean_of_groups",
    lambda original: lambda heads, size: heads[:, :, ::size],
)


@mutant(
    "flags.keys_are_values",
    "an edit of hook_k_input or hook_v_input",
    "flags.edits",
    OlmoAttentionBridge,
    "_changes",
)
def keys_are_values(original: Any) -> Any:
    """An edit of what keys or values read reaches both."""

    def changes(self: Any, residual: torch.Tensor, norm: Any) -> Any:
        q, k, v = original(self, residual, norm)
        if k is None or v is None or not self.config.use_split_qkv_input:
            return [q, k, v]
        return [q, k + v, v + k]

    return changes


@mutant(
    "flags.first_chunk",
    "an edit of an input, more than one chunk over a cache",
    "flags.edits",
    OlmoAttentionBridge,
    "_changes",
)
def first_chunk(original: Any) -> Any:
    """Edits of inputs act in a bridge's first forward only."""

    def changes(self: Any, residual: torch.Tensor, norm: Any) -> Any:
        changed = original(self, residual, norm)
        before = vars(self).get("_forwards", 0)
        vars(self)["_forwards"] = before + 1
        return [None if before else x for x in changed]

    return changes


@mutant("flags.edited_gradient", "an edit of an input", "flags.edits", attention, "change_of_heads")
def edited_gradient(original: Any) -> Any:
    """The residual stream keeps the gradient that an edited head's unedited copy had."""

    def change(residual: torch.Tensor, norm: Any, hook: Any, n_heads: int) -> torch.Tensor:
        copies = residual.unsqueeze(2).repeat(1, 1, n_heads, 1)
        hooked = hook(copies.clone())
        plain = copies if torch.equal(hooked, copies) else copies.detach()
        wide = torch.promote_types(residual.dtype, torch.float32)
        changed: torch.Tensor = norm(hooked).to(wide) - norm(plain).to(wide)
        return changed

    return change


@mutant(
    "flags.edited_bias",
    "an edit of hook_result, a bias of o",
    "flags.edits",
    attention,
    "head_contributions",
)
def edited_bias(original: Any) -> Any:
    """Where a result is edited, the output's bias is lost."""

    def contributions(z: torch.Tensor, projection: Any, d_head: int, hook: Any) -> torch.Tensor:
        results = _by_head(z, projection, d_head)
        hooked = hook(results.clone())
        connected = projection(z) + (hooked - results).sum(2)
        edited = (hooked != results).flatten(2).any(-1, keepdim=True)
        return torch.where(edited, hooked.sum(2), connected)

    return contributions


add(
    "flags.mlp_in_in_place",
    "an edit of hook_mlp_in in place reaches the residual stream beside the MLP",
    "such an edit",
    "flags.in_place",
    OlmoHookPoint,
    "forward",
    shared("hook_mlp_in"),
)


def _set_anyway(flag: str) -> Any:
    def set_flag(self: Any, on: bool) -> None:
        self.cfg._set_bridge_managed_hook_flag(flag, on)
        self._propagate_attention_flag(flag, on)

    return set_flag


add(
    "flags.both",
    "use_attn_in is taken while inputs are split",
    "such an attempt",
    "flags.refused",
    OlmoTransformerBridge,
    "set_use_attn_in",
    lambda original: _set_anyway("use_attn_in"),
)


@mutant(
    "flags.refused_late",
    "such an attempt",
    "flags.refused",
    OlmoTransformerBridge,
    "set_use_split_qkv_input",
)
def refused_late(original: Any) -> Any:
    """Split inputs are refused while use_attn_in is on, but the flag is set by then."""

    def set_flag(self: Any, on: bool) -> None:
        attn_in = self.cfg.use_attn_in
        _set_anyway("use_split_qkv_input")(self, on)
        if on and attn_in:
            raise ValueError("use_split_qkv_input excludes use_attn_in")

    return set_flag


add(
    "flags.copy_listens",
    "a copy's blocks listen with the closures of the original: transformer_lens' own",
    "a copy made after a forward",
    "flags.copies",
    OlmoBlockBridge,
    "_maybe_wire_capture_hooks",
    lambda original: BlockBridge._maybe_wire_capture_hooks,
)


@mutant(
    "flags.processed",
    "compatibility mode, an edit of an input",
    "flags.compatibility",
    OlmoAttentionBridge,
    "_changes",
)
def processed(original: Any) -> Any:
    """In compatibility mode an edit of an input does nothing."""

    def changes(self: Any, residual: torch.Tensor, norm: Any) -> Any:
        changed = original(self, residual, norm)
        return [None if self.compatibility_mode else x for x in changed]

    return changes
