"""Faults that show in a mode of running only: eval, dropout, checkpointing, autocast, compiled."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from adapter import attention, clip
from adapter.attention import OlmoAttentionBridge
from adapter.block import OlmoBlockBridge
from adapter.compatibility import OlmoTransformerBridge
from adapter.hooks import OlmoHookPoint
from conformance.mutants.catalogue import add, hook_mutant, mutant


def in_a_backward() -> bool:
    """Whether autograd runs, as it does when checkpointing computes something again."""
    return torch._C._current_graph_task_id() != -1


@mutant("modes.eval_of_blocks", "a block in eval mode", "modes.reach", OlmoBlockBridge, "train")
def eval_of_blocks(original: Any) -> Any:
    """Eval() of a block stays at the block: its attention goes on dropping."""

    def train(self: Any, mode: bool = True) -> Any:
        was = self.attn.training
        original(self, mode)
        self.attn.training = mode or was
        return self

    return train


@mutant("modes.eval_draws", "eval mode", "modes.reach", attention, "dropout")
def eval_draws(original: Any) -> Any:
    """Attention draws a random number in eval mode, which it does not use."""

    def dropout(x: torch.Tensor, p: float, training: bool) -> Any:
        if not training:
            torch.rand(())
        return original(x, p=p, training=training)

    return dropout


@mutant("modes.dropout_transposed", "two tokens", "modes.dropout", attention, "dropout")
def dropout_transposed(original: Any) -> Any:
    """The same random numbers drop the queries' entries in the order of keys."""

    def dropout(x: torch.Tensor, p: float, training: bool) -> Any:
        return original(x.transpose(2, 3).contiguous(), p=p, training=training).transpose(2, 3)

    return dropout


@mutant("modes.dropout_hooked", "a hook", "modes.dropout", OlmoHookPoint, "forward")
def dropout_hooked(original: Any) -> Any:
    """Where a hook listens a random number is drawn more."""

    def forward(self: Any, x: torch.Tensor) -> Any:
        if self.fwd_hooks:
            torch.rand(())
        return original(self, x)

    return forward


@mutant(
    "modes.recomputed_unclipped",
    "a clip that binds",
    "modes.checkpointing",
    OlmoAttentionBridge,
    "_clip",
)
def recomputed_unclipped(original: Any) -> Any:
    """What checkpointing computes again is not clamped."""

    def clamp(self: Any, *projections: torch.Tensor) -> Any:
        config = self.original_component.config
        clip = config.clip_qkv
        if not in_a_backward() or clip is None:
            return original(self, *projections)
        config.clip_qkv = clip + 100  # a clamp as before, since checkpointing counts operations
        try:
            return original(self, *projections)
        finally:
            config.clip_qkv = clip

    return clamp


hook_mutant(
    "modes.recomputed_unhooked",
    "hook_v does not fire again, nor edit, when checkpointing computes it again",
    "any",
    "modes.checkpointing",
    "blocks.{i}.attn.v.hook_out",
    lambda fire, x: x if in_a_backward() else fire(x),
)


@mutant("modes.short_mask", "a float32 model", "modes.autocast", OlmoAttentionBridge, "_masked")
def short_mask(original: Any) -> Any:
    """The mask is cast to the scores' dtype, in which its lowest number is -inf."""

    def masked(self: Any, scores: torch.Tensor, mask: torch.Tensor | None) -> Any:
        return original(self, scores, None if mask is None else mask.to(scores.dtype))

    return masked


@mutant(
    "modes.wide_rotation", "a float32 model", "modes.autocast", attention, "apply_rotary_pos_emb"
)
def wide_rotation(original: Any) -> Any:
    """Under autocast rotated queries and keys keep float32."""

    def rotate(q: torch.Tensor, k: torch.Tensor, cos: Any, sin: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            q, k = q.float(), k.float()
        return original(q, k, cos, sin)

    return rotate


@mutant(
    "modes.inference_unclipped",
    "a clip that binds",
    "modes.inference",
    attention.OlmoAttentionBridge,
    "_clip",
)
def inference_unclipped(original: Any) -> Any:
    """Under inference mode only values are clamped."""

    def clamp(self: Any, *projections: torch.Tensor) -> Any:
        clamped = original(self, *projections)
        return (*projections[:2], clamped[2]) if torch.is_inference_mode_enabled() else clamped

    return clamp


@mutant("compiled.silent", "any", "compiled.bridge", OlmoTransformerBridge, "forward")
def silent(original: Any) -> Any:
    """A compiled bridge fires no hook."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def without_hooks(self: Any, *args: Any, **kwargs: Any) -> Any:
        points = list(self.hook_dict.values())
        kept = [point._forward_hooks for point in points]
        for point in points:
            point._forward_hooks = OrderedDict()
        try:
            return original(self, *args, **kwargs)
        finally:
            for point, hooks in zip(points, kept, strict=True):
                point._forward_hooks = hooks

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = without_hooks if torch.compiler.is_compiling() else original
        return run(self, *args, **kwargs)

    return forward


@mutant(
    "compiled.patch_lost", "a clip that binds", "compiled.patched", clip._PatchedForward, "__call__"
)
def patch_lost(original: Any) -> Any:
    """Compiled, a patched attention is Hugging Face's own."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.__wrapped__(*args, **kwargs)
        return original(self, *args, **kwargs)

    return call


@mutant(
    "patched.recomputed",
    "checkpointing and a clip that binds",
    "patched.modes",
    clip._PatchedForward,
    "__call__",
)
def recomputed(original: Any) -> Any:
    """What checkpointing computes again is clamped where the patch skips the clamp."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if in_a_backward() and self.mode == "skip":
            return self.__wrapped__(*args, **kwargs)
        return original(self, *args, **kwargs)

    return call


add(
    "patched.copy",
    "a deep copy of a patched model is not patched",
    "a deep copy and a clip that binds",
    "patched.modes",
    clip._PatchedForward,
    "__getstate__",
    lambda original: lambda self: {**original(self), "mode": "off"},
)


@mutant(
    "patched.threads",
    "a clip that binds and two threads inside",
    "patched.threads",
    clip._PatchedForward,
    "__call__",
)
def threads(original: Any) -> Any:
    """The first thread that leaves an attention takes the patch from those that are inside."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            with clip._LOCK:
                self._take_down()

    return call
