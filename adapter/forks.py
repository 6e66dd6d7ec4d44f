"""One copy of a tensor per head, added to the computation as a change that is zero until edited.

The flags ``use_split_qkv_input``, ``use_attn_in`` and ``use_attn_result`` let a researcher edit
what a single head reads or writes. Computing the whole projection per head would round differently
from Hugging Face and leave the hooks on the shared path (ln1's output, ``attn.hook_in``,
``q.hook_in``, ``o.hook_out``) without effect. So the shared path always runs, and a per-head hook
contributes the difference that its edit makes. All hooks stay alive, and without an edit the
result and all gradients are equal to Hugging Face's bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformer_lens.hook_points import HookPoint

from adapter.hooks import is_hooked


class _Operands(TorchFunctionMode):
    """Takes down with what a linear map is called, and computes nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.nn.functional.linear:
            return func(*args, **(kwargs or {}))
        input, self.weight, self.bias = args
        return input


def parameters_of(projection: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight ``[out, in]`` and bias of a projection that is nothing but these."""
    linear = isinstance(projection, torch.nn.Linear) and projection.weight.is_floating_point()
    if not linear or type(projection).forward is not torch.nn.Linear.forward:
        raise TypeError(
            "per-head hooks need the projection's weight, and a "
            f"{type(projection).__name__} computes more than a weight (an adapter, a "
            "quantization); merge it before the model is bridged, or turn the flag off"
        )
    if not projection.weight.is_meta:
        return projection.weight, projection.bias
    # What accelerate has offloaded is there while the projection runs, and no longer.
    with _Operands() as used:
        projection.forward(torch.empty(0, projection.in_features, dtype=projection.weight.dtype))
    return used.weight, used.bias


def change_of_heads(
    residual: torch.Tensor, norm: Any, hook: HookPoint, n_heads: int
) -> torch.Tensor | None:
    """What an edit of the per-head copies changes in the heads' normalized input.

    Args:
        residual: The residual stream, ``[batch, pos, d_model]``.
        norm: The LayerNorm between the copies and the projection.
        hook: Fires on the copies, ``[batch, pos, head, d_model]``.
        n_heads: How many copies.

    Returns:
        ``[batch, pos, head, d_model]``, at least float32: subtracting nearby values and adding
        the difference again must not round in low precision. None if nothing listens at ``hook``:
        then there is no need to ask whether anything has changed, which vmap does not allow.
    """
    if not is_hooked(hook):
        return None
    copies = residual.unsqueeze(2).repeat(1, 1, n_heads, 1)
    hooked = hook(copies.clone())
    wide = torch.promote_types(residual.dtype, torch.float32)
    plain = norm(copies).to(wide)
    # Both terms send their gradients to ``copies``, where they cancel exactly. No edit changes what
    # a residual stream that is not finite leaves, and NaN - NaN would look like one.
    return torch.where(plain.isnan(), 0.0, norm(hooked).to(wide) - plain)


def is_known_in(condition: torch.Tensor) -> bool:
    """Whether a condition holds anywhere; no if `torch.vmap` lets nobody look."""
    try:
        return bool(condition.any())
    except RuntimeError:
        return False


def mean_of_groups(heads: torch.Tensor, size: int) -> torch.Tensor:
    """Average each ``size`` consecutive heads of ``[batch, pos, head, d_model]``."""
    batch, pos, _, width = heads.shape
    return heads.view(batch, pos, -1, size, width).mean(3)


def project_change(change: torch.Tensor, projection: Any, d_head: int) -> torch.Tensor:
    """Project each head's own change, ``[batch, pos, head, d_model]``, with that head's weight.

    Returns:
        ``[batch, pos, head * d_head]``, to be added to the projection of the shared input.
    """
    weight = parameters_of(projection)[0].view(-1, d_head, projection.in_features)
    return torch.einsum("bphm,hdm->bphd", change.to(weight.dtype), weight).flatten(2)


def head_contributions(
    z: torch.Tensor, projection: Any, d_head: int, hook: HookPoint
) -> torch.Tensor:
    """Output projection whose per-head summands can be edited at ``hook``.

    Args:
        z: The heads' outputs, ``[batch, pos, head * d_head]``.
        projection: The linear map to ``d_model``, with or without bias.
        d_head: Width of a head.
        hook: Fires on the summands, ``[batch, pos, head, d_model]``.

    Returns:
        ``[batch, pos, d_model]``: positions without an edit keep the plain projection's value. The
        dtype is the plain projection's: under autocast a bias is wider than that.
    """
    weight, bias = parameters_of(projection)
    weight = weight.view(projection.out_features, -1, d_head)
    summands = torch.einsum("bphd,mhd->bphm", z.view(*z.shape[:-1], -1, d_head), weight)
    hooked = hook(summands.clone())
    plain: torch.Tensor = projection(z)
    # Summands may overflow whose sum does not, and inf - inf is NaN.
    change = torch.where(summands.isfinite(), hooked - summands, 0.0)
    connected = plain + change.sum(2)
    rebuilt = hooked.sum(2) if bias is None else hooked.sum(2) + bias
    edited = (hooked != summands).flatten(2).any(-1, keepdim=True)
    return torch.where(edited, rebuilt, connected).to(plain.dtype)
