"""Faults of the patch that takes Hugging Face's in-place clamp out of the way."""

from __future__ import annotations

import contextlib
import copy
import warnings
from types import SimpleNamespace
from typing import Any

import torch

from adapter import clip, olmo
from adapter.attention import OlmoAttentionBridge
from conformance.mutants.catalogue import Make, add, mutant

_BINDS = "a clip that binds"


def _attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def _shared_config(original: Any) -> Any:
    def patch(model: Any, *, exact_clip: bool = False) -> None:
        model.config.clip_qkv = None

    return patch


def _lasting_view(original: Any) -> Any:
    def patch(model: Any, *, exact_clip: bool = False) -> None:
        for attn in _attentions(model):
            attn.config = copy.copy(attn.config)
            attn.config.clip_qkv = None

    return patch


def _forward_hooks(original: Any) -> Any:
    """The obvious way: clear the configuration, clamp in forward hooks. Its gradients are late."""

    def patch(model: Any, *, exact_clip: bool = False) -> None:
        bound = model.config.clip_qkv
        if not exact_clip or bound is None:
            return original(model, exact_clip=exact_clip)  # type: ignore[no-any-return]
        for attn in _attentions(model):
            attn.config = copy.copy(attn.config)
            attn.config.clip_qkv = None
            for linear in (attn.q_proj, attn.k_proj, attn.v_proj):
                linear.register_forward_hook(lambda _, into, out: out.clamp(-bound, bound))

    return patch


def _first_layer(original: Any) -> Any:
    def patch(model: Any, *, exact_clip: bool = False) -> None:
        part = SimpleNamespace(config=model.config, layers=model.model.layers[:1])
        original(part, exact_clip=exact_clip)

    return patch


def _ignoring(original: Any) -> Any:
    return lambda model, *, exact_clip=False: None


def _always(exact: bool) -> Make:
    return lambda original: lambda model, *, exact_clip=False: original(model, exact_clip=exact)


for name, breaks, trigger, killer, make in (
    ("nothing", "prepare_model leaves the clamp in", _BINDS, "forward.patched", _ignoring),
    ("always_exact", "the default patch clamps", _BINDS, "forward.patched", _always(True)),
    ("never_exact", "exact_clip=True skips", _BINDS, "forward.patched_exact", _always(False)),
    (
        "first_layer",
        "only the first layer is patched",
        "two layers and a clip that binds",
        "forward.patched",
        _first_layer,
    ),
    (
        "shared_config",
        "prepare_model clears the shared configuration's clip_qkv, and so the bridge's",
        "a clip that binds, prepare_model before bridging",
        "forward.logits",
        _shared_config,
    ),
    (
        "lasting_view",
        "each attention keeps a configuration without clip_qkv, and so the bridge",
        "a clip that binds, prepare_model before bridging",
        "forward.logits",
        _lasting_view,
    ),
    (
        "forward_hooks",
        "a full backward hook on a projection sees the gradient behind the clamp",
        "a clip that binds, a full backward hook",
        "gradients.full_backward_hooks",
        _forward_hooks,
    ),
):
    add(f"patch.{name}", breaks, trigger, killer, olmo, "patch_clip", make)

add(
    "patch.no_clone",
    "exact mode hands Hugging Face the projection's own output to clamp",
    "a clip and a full backward hook",
    "gradients.full_backward_hooks",
    clip._CloningProjection,
    "__call__",
    lambda original: lambda self, *args: self._real(*args),
)
add(
    "patch.detached_clone",
    "exact mode cuts the gradient of q, k and v",
    "a clip",
    "gradients.patched_exact",
    clip._CloningProjection,
    "__call__",
    lambda original: lambda self, *args: original(self, *args).detach(),
)


@mutant("patch.gradient", "a clip", "gradients.patched", clip._PatchedForward, "__call__")
def gradient(original: Any) -> Any:
    """The default patch cuts the gradient of attention."""

    def call(self: Any, *args: Any, **named: Any) -> Any:
        output, pattern = original(self, *args, **named)
        return output.detach() if self.mode == "skip" else output, pattern

    return call


def _saying(answer: bool) -> Make:
    return lambda original: lambda self: answer


for name, breaks, answer in (
    ("warns_always", "every forward of every layer warns", True),
    ("warns_never", "nothing says that the clamp is skipped", False),
):
    killer = "forward.patch_warning"
    add(f"patch.{name}", breaks, "a clip", killer, clip._Once, "__call__", _saying(answer))


@mutant("patch.warns_early", "a clip", "forward.patch_warning", olmo, "patch_clip")
def warns_early(original: Any) -> Any:
    """Prepare_model warns, though nobody knows yet whether the model will be bridged."""

    def patch(model: Any, *, exact_clip: bool = False) -> None:
        original(model, exact_clip=exact_clip)
        for attn in _attentions(model)[:1]:
            if "forward" in vars(attn):
                attn.forward._warn()

    return patch


@mutant("patch.warns_bridged", "a clip", "forward.patch_warning", OlmoAttentionBridge, "_clip")
def warns_bridged(original: Any) -> Any:
    """A bridged model warns, though it clamps."""

    def clip_all(self: Any, *projections: torch.Tensor) -> Any:
        warnings.warn("clip_qkv is skipped", stacklevel=2)
        return original(self, *projections)

    return clip_all


add(
    "patch.stays_up",
    "what hides the clip is not taken down after the forward",
    "a clip",
    "patch.life",
    clip._PatchedForward,
    "_take_down",
    lambda original: lambda self: None,
)
add(
    "patch.not_undone",
    "unpatch_model does nothing",
    "a clip that binds",
    "patch.life",
    clip,
    "unpatch_model",
    lambda original: lambda model: None,
)


@mutant("patch.swallows", "a clip, no layers", "patch.strange", olmo, "patch_clip")
def swallows(original: Any) -> Any:
    """Prepare_model says nothing of a model that it could not patch."""

    def patch(model: Any, *, exact_clip: bool = False) -> None:
        with contextlib.suppress(Exception):
            original(model, exact_clip=exact_clip)

    return patch
