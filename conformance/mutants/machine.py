"""Faults that no single step shows: something is kept, lost or shared from one step to a later."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

from adapter import clip
from adapter.attention import OlmoAttentionBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.mlp import OlmoMLPBridge
from adapter.unembedding import OlmoUnembeddingBridge
from conformance.mutants.catalogue import add, bridge_mutant, mutant

CHECK = "machine.steps"


@mutant(
    "machine.flag_sticks",
    "a flag that splits inputs, on and off",
    CHECK,
    OlmoAttentionBridge,
    "forks_input",
)
def flag_sticks(original: Any) -> Any:
    """Inputs stay split by head after the flag is off."""

    def forks(self: Any) -> bool:
        self._has_forked = getattr(self, "_has_forked", False) or original.fget(self)
        return bool(self._has_forked)

    return property(forks)


@mutant(
    "machine.hook_survives_error",
    "a hook that raises under run_with_hooks",
    CHECK,
    OlmoTransformerBridge,
    "run_with_hooks",
)
def hook_survives_error(original: Any) -> Any:
    """The hooks of a run that raised stay on."""

    def run(self: Any, tokens: Any, fwd_hooks: Any = (), **named: Any) -> Any:
        try:
            return original(self, tokens, fwd_hooks=fwd_hooks, **named)
        except Exception:
            for name, hook in fwd_hooks:
                self.add_hook(name, hook)
            raise

    return run


@mutant(
    "machine.context_clears_all",
    "a hook of the user's, and a context that is left",
    CHECK,
    OlmoTransformerBridge,
    "hooks",
)
def context_clears_all(original: Any) -> Any:
    """Leaving a hooks() context removes the hooks that were there before it."""

    @contextmanager
    def hooks(self: Any, *args: Any, **named: Any) -> Any:
        with original(self, *args, **named) as inside:
            yield inside
        self.reset_hooks()

    return hooks


add(
    "machine.permanent_lost",
    "reset_hooks removes permanent hooks too",
    "a permanent hook",
    CHECK,
    OlmoTransformerBridge,
    "reset_hooks",
    lambda original: lambda self, **named: original(self, **{**named, "including_permanent": True}),
)
add(
    "machine.reset_one_way",
    "reset_hooks of one direction removes those of the other",
    "a hook of each direction, or a reset of the other one",
    CHECK,
    OlmoTransformerBridge,
    "reset_hooks",
    lambda original: lambda self, **named: original(self, **{**named, "direction": "both"}),
)


@mutant(
    "machine.cache_removes_backward",
    "a backward hook, and run_with_cache",
    CHECK,
    OlmoTransformerBridge,
    "run_with_cache",
)
def cache_removes_backward(original: Any) -> Any:
    """Run_with_cache takes the user's backward hooks away."""

    def run(self: Any, *args: Any, **named: Any) -> Any:
        result = original(self, *args, **named)
        self.reset_hooks(direction="bwd")
        return result

    return run


@mutant(
    "machine.stale_rotation",
    "two forwards of one shape at other positions, or before and after a cast",
    CHECK,
    OlmoAttentionBridge,
    "_rotation",
)
def stale_rotation(original: Any) -> Any:
    """Cosine and sine are those of the first forward of the same shape."""

    def rotation(self: Any, hidden: torch.Tensor, named: Any) -> Any:
        cos, sin = named["position_embeddings"]
        kept = self.__dict__.setdefault("_rotations", {})
        held = kept.setdefault((cos.shape, cos.dtype), (cos, sin))
        return original(self, hidden, {**named, "position_embeddings": held})

    return rotation


@mutant(
    "machine.stale_mask",
    "two forwards of one shape, of which one is padded in another way",
    CHECK,
    OlmoAttentionBridge,
    "_apply_reconstruct_attention_mask",
)
def stale_mask(original: Any) -> Any:
    """The mask is that of the first forward of the same shape."""

    def apply(self: Any, scores: torch.Tensor, mask: Any, *lengths: int) -> torch.Tensor:
        if mask is not None:
            kept = self.__dict__.setdefault("_masks", {})
            mask = kept.setdefault((mask.shape, mask.dtype), mask)
        masked: torch.Tensor = original(self, scores, mask, *lengths)
        return masked

    return apply


@mutant(
    "machine.stale_unembedding",
    "a change of the weights after a forward",
    CHECK,
    OlmoUnembeddingBridge,
    "forward",
)
def stale_unembedding(original: Any) -> Any:
    """Logits are of the weight that the first forward in this dtype has met."""

    def forward(self: Any, hidden: torch.Tensor, **named: Any) -> torch.Tensor:
        linear = self.original_component
        kept = self.__dict__.setdefault("_weights", {})
        held = kept.setdefault(hidden.dtype, linear.weight.detach().clone())
        weight = linear.weight + (held - linear.weight).detach()
        logits: torch.Tensor = self.hook_out(F.linear(self.hook_in(hidden), weight, linear.bias))
        return logits

    return forward


@mutant("machine.dropout_stays", "train, then eval", CHECK, OlmoTransformerBridge, "train")
def dropout_stays(original: Any) -> Any:
    """Attention stays in train mode when the bridge goes back to eval."""

    def train(self: Any, mode: bool = True) -> Any:
        result = original(self, mode)
        for block in self.blocks if getattr(self, "_has_trained", False) else ():
            object.__setattr__(block.attn, "training", True)
        object.__setattr__(self, "_has_trained", mode)
        return result

    return train


@mutant("machine.counted_twice", "two backwards in a row", CHECK, OlmoMLPBridge, "forward")
def counted_twice(original: Any) -> Any:
    """Where gradients have accumulated already, the MLP's count twice."""

    def forward(self: Any, *args: Any, **named: Any) -> torch.Tensor:
        output: torch.Tensor = original(self, *args, **named)
        held = self.original_component.down_proj.original_component.weight.grad
        if held is not None and output.requires_grad:
            output.register_hook(lambda gradient: 2 * gradient)  # type: ignore[no-untyped-call]
        return output

    return forward


@dataclass
class _Shared:
    """Gives the same tensor to every copy. It pickles, unlike a function of its own."""

    tensor: torch.Tensor

    def __call__(self, memo: Any) -> torch.Tensor:
        return self.tensor


@bridge_mutant("machine.shared_by_copies", "a copy whose weights change", CHECK)
def shared_by_copies(bridge: Any) -> None:
    """A deep copy has the embedding of its original, and crashes where one of them is cast."""
    weight = bridge.original_model.get_input_embeddings().weight
    weight.__deepcopy__ = _Shared(weight)


@mutant("machine.copy_forgets", "a flag, and a copy", CHECK, OlmoTransformerBridge, "__setstate__")
def copy_forgets(original: Any) -> Any:
    """A copy has its flags off."""

    def setstate(self: Any, state: Any) -> None:
        original(self, state)
        self.set_use_hook_mlp_in(False)
        self.set_use_attn_result(False)

    return setstate


@mutant(
    "machine.processed_again",
    "compatibility mode twice",
    CHECK,
    OlmoTransformerBridge,
    "enable_compatibility_mode",
)
def processed_again(original: Any) -> Any:
    """A second enable_compatibility_mode makes the unembedding larger by 1e-3 of itself."""

    def enable(self: Any, *args: Any, **named: Any) -> None:
        again = self.compatibility_mode
        original(self, *args, **named)
        if again:
            with torch.no_grad():
                self.unembed.original_component.weight.mul_(1.001)

    return enable


@mutant(
    "machine.unfrozen",
    "frozen parameters, and processed weights",
    "compatibility.frozen",
    OlmoTransformerBridge,
    "process_weights",
)
def unfrozen(original: Any) -> Any:
    """Processed weights require a gradient, whatever was frozen."""

    def process(self: Any, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        self.requires_grad_(True)

    return process


@mutant(
    "machine.partial_load",
    "a state dict that lacks some weights",
    CHECK,
    OlmoTransformerBridge,
    "load_state_dict",
)
def partial_load(original: Any) -> Any:
    """What a partial state dict lacks is zero afterwards."""

    def load(self: Any, state: Any, strict: bool = True, **named: Any) -> Any:
        if not strict:
            missing = self.state_dict().keys() - state.keys()
            zeros = {key: 0 * held for key, held in self.state_dict().items() if key in missing}
            state = {**state, **zeros}
        return original(self, state, strict=strict, **named)

    return load


@mutant("machine.cast_drops", "gradients, and a cast", CHECK, OlmoTransformerBridge, "to")
def cast_drops(original: Any) -> Any:
    """A move to another dtype drops the gradients."""

    def to(self: Any, *args: Any, **named: Any) -> Any:
        result = original(self, *args, **named)
        self.zero_grad()
        return result

    return to


@mutant("machine.generate_evaluates", "train mode", CHECK, OlmoTransformerBridge, "generate")
def generate_evaluates(original: Any) -> Any:
    """Generation leaves the bridge in eval mode."""

    def generate(self: Any, *args: Any, **named: Any) -> Any:
        result = original(self, *args, **named)
        self.eval()
        return result

    return generate


@mutant("machine.unpatch_unclamps", "a clip", CHECK, clip, "unpatch_model")
def unpatch_unclamps(original: Any) -> Any:
    """Unpatch_model takes the clip away from the attentions inside of a bridge."""

    def unpatch(model: Any) -> None:
        original(model)
        for layer in model.model.layers:
            hf = layer.original_component.self_attn.original_component
            hf.config = type(hf.config)(**{**hf.config.to_dict(), "clip_qkv": None})

    return unpatch


add(
    "machine.not_pickled_again",
    "a bridge that has shown its attentions cannot be pickled",
    "run_with_cache, and pickle",
    CHECK,
    OlmoTransformerBridge,
    "__reduce_ex__",
    lambda original: TransformerBridge.__reduce_ex__,
)
