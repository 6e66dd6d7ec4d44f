"""Faults of biases, state dicts, copies, the configuration and weight processing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    GatedMLPBridge,
    PositionEmbeddingsAttentionBridge,
)

from adapter import compatibility, olmo
from adapter.attention import OlmoAttentionBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from adapter.mlp import BranchLinearBridge, OlmoMLPBridge
from conformance.mutants.catalogue import add, mutant


@mutant("biases.value_dropped", "a bias of v", "biases.forward", BranchLinearBridge, "forward")
def value_dropped(original: Any) -> Any:
    """V is projected without its bias."""

    def forward(self: Any, x: torch.Tensor, *args: Any) -> Any:
        if self.name != "v_proj":
            return original(self, x, *args)
        return self.hook_out(F.linear(self.hook_in(x), self.original_component.weight))

    return forward


@mutant("biases.zeros", "no bias of k", "biases.optional", OlmoAttentionBridge, "b_K")
def zeros(original: Any) -> Any:
    """B_K of a component is zeros where the model has none."""

    def bias(self: Any) -> Any:
        found = original.fget(self)
        return self.W_K[:, 0] * 0 if found is None else found

    return property(bias)


@mutant("biases.type_error", "no bias of q", "biases.optional", OlmoTransformerBridge, "b_Q")
def type_error(original: Any) -> Any:
    """The stacked b_Q of a model without one raises a TypeError."""

    def stacked(self: Any) -> Any:
        return torch.stack([block.attn.b_Q for block in self.blocks])

    return property(stacked)


@mutant(
    "biases.in_state_dict",
    "no bias of o",
    "biases.optional",
    OlmoTransformerBridge,
    "state_dict",
)
def in_state_dict(original: Any) -> Any:
    """The state dict has zeros for a bias that the model has not."""

    def state_dict(self: Any, *args: Any, **named: Any) -> Any:
        state = original(self, *args, **named)
        for block in range(len(self.blocks)):
            state.setdefault(f"blocks.{block}.attn.o.bias", torch.zeros(self.cfg.d_model))
        return state

    return state_dict


@mutant(
    "state.biases_skipped",
    "any bias",
    "copies.state_dict",
    OlmoTransformerBridge,
    "load_state_dict",
)
def biases_skipped(original: Any) -> Any:
    """Load_state_dict takes no bias."""

    def load(self: Any, state: Any, strict: bool = True, assign: bool = False) -> Any:
        weights = {name: tensor for name, tensor in state.items() if not name.endswith(".bias")}
        return original(self, weights, strict=False, assign=assign)

    return load


@mutant(
    "state.biases_required",
    "some bias missing",
    "biases.forward",
    OlmoTransformerBridge,
    "load_state_dict",
)
def biases_required(original: Any) -> Any:
    """Load_state_dict refuses a state dict without biases."""

    def load(self: Any, state: Any, *args: Any, **named: Any) -> Any:
        for letter in "qkvo":
            state[f"blocks.0.attn.{letter}.bias"]
        return original(self, state, *args, **named)

    return load


add(
    "configuration.untold",
    "cfg says what transformer_lens' translation has made of it",
    "a clip, dropout, a rope_theta or a head_dim of its own",
    "configuration.truth",
    olmo,
    "tell_the_truth",
    lambda original: lambda bridge: None,
)
add(
    "copies.block",
    "a deep copy's blocks listen for the original: transformer_lens' own BlockBridge",
    "a deep copy after a forward",
    "copies.deepcopy",
    olmo,
    "OlmoBlockBridge",
    lambda original: BlockBridge,
)


@mutant(
    "copies.hook_points",
    "a deep copy after a forward",
    "copies.deepcopy",
    OlmoHookPoint,
    "__deepcopy__",
)
def copied_hook_points(original: Any) -> Any:
    """A deep copy's hook points hold the very hooks of the original's, in the very same lists."""

    def copied(self: Any, memo: dict[int, Any]) -> Any:
        new = memo[id(self)] = object.__new__(type(self))
        vars(new).update(vars(self))
        return new

    return copied


@mutant(
    "copies.fresh_hook_points",
    "a deep copy of a bridge with hooks on",
    "copies.hooked",
    OlmoHookPoint,
    "__deepcopy__",
)
def fresh_hook_points(original: Any) -> Any:
    """A deep copy's hook points are new ones, of the same name and with no hook."""

    def copied(self: Any, memo: dict[int, Any]) -> Any:
        new = memo[id(self)] = type(self)()
        new.name, new.hook_conversion = self.name, copy.deepcopy(self.hook_conversion, memo)
        return new

    return copied


@mutant(
    "copies.loose_handles",
    "a deep copy of a deep copy of a bridge with hooks on",
    "copies.hooked",
    OlmoHookPoint,
    "__deepcopy__",
)
def loose_handles(original: Any) -> Any:
    """A copied hook point's empty dicts are not those that the handles of its hooks refer to."""

    def copied(self: Any, memo: dict[int, Any]) -> Any:
        new = memo[id(self)] = object.__new__(type(self))
        for name, value in vars(self).items():
            empty = isinstance(value, dict) and not value
            vars(new)[name] = type(value)() if empty else copy.deepcopy(value, memo)
        return new

    return copied


def _changed(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    """Copies of hook points that are changed once they are made."""

    def replacing(original: Any) -> Any:
        def copied(self: Any, memo: dict[int, Any]) -> Any:
            new = original(self, memo)
            change(new)
            return new

        return copied

    return replacing


def _all_permanent(point: Any) -> None:
    for handle in (*point.fwd_hooks, *point.bwd_hooks):
        handle.is_permanent = True


def _forward_only(point: Any) -> None:
    point.bwd_hooks = []
    point._backward_pre_hooks.clear()


for _name, _breaks, _change in (
    ("copies.all_permanent", "a plain reset_hooks leaves all hooks of a deep copy", _all_permanent),
    ("copies.forward_only", "a deep copy has lost its backward hooks", _forward_only),
):
    add(
        _name,
        _breaks,
        "a deep copy of a bridge with hooks on",
        "copies.hooked",
        OlmoHookPoint,
        "__deepcopy__",
        _changed(_change),
    )
add(
    "copies.layout",
    "conversions are of local classes, which pickle cannot find",
    "any",
    "copies.pickle",
    OlmoAttentionBridge,
    "_setup_qkv_hook_reshaping",
    lambda original: PositionEmbeddingsAttentionBridge._setup_qkv_hook_reshaping,
)


@mutant("copies.cast", "any", "copies.cast", OlmoTransformerBridge, "to")
def cast(original: Any) -> Any:
    """A bridge cast to another dtype still says that it has the first one."""

    def to(self: Any, *args: Any, **named: Any) -> Any:
        before = self.cfg.dtype
        result = original(self, *args, **named)
        self.cfg.dtype = before
        return result

    return to


add(
    "processing.value_bias",
    "a value bias is folded past the clamp",
    "a bias of v, a clip that binds, fold_value_biases",
    "compatibility.log_probabilities",
    OlmoTransformerBridge,
    "_why_value_biases_must_stay",
    lambda original: lambda self: None,
)


@mutant(
    "processing.scaled",
    "processed weights",
    "compatibility.log_probabilities",
    OlmoTransformerBridge,
    "process_weights",
)
def scaled(original: Any) -> Any:
    """Processing makes the unembedding too large by 1e-4 of itself, just above the allowance."""

    def process(self: Any, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        with torch.no_grad():
            self.unembed.original_component.weight.mul_(1 + 1e-4)

    return process


add(
    "processing.activation",
    "a processed MLP takes an activation that it does not know for SiLU",
    "a rare activation, processed weights",
    "compatibility.log_probabilities",
    OlmoMLPBridge,
    "forward",
    lambda original: GatedMLPBridge.forward,
)
add(
    "processing.silent",
    "hook_in of the gate and of the up projection never fire on processed weights",
    "processed weights",
    "compatibility.hooks",
    OlmoMLPBridge,
    "forward",
    lambda original: GatedMLPBridge.forward,
)
add(
    "processing.value_bias_kept",
    "no value bias is ever folded",
    "a bias of v and no clip",
    "compatibility.value_biases",
    OlmoTransformerBridge,
    "_why_value_biases_must_stay",
    lambda original: lambda self: "clip_qkv, or whatever",
)
add(
    "processing.no_refusal",
    "a refactoring of QK that rotary forbids is not refused",
    "any",
    "compatibility.refusal",
    compatibility,
    "_refuse_refactoring",
    lambda original: lambda asked: None,
)


@mutant(
    "processing.frozen",
    "compatibility mode",
    "compatibility.trains",
    OlmoTransformerBridge,
    "process_weights",
)
def frozen(original: Any) -> Any:
    """Processed weights no longer train."""

    def process(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.blocks[-1].mlp.requires_grad_(False)

    return process
