"""What an `Edit` does to a tensor: a pure function of the tensor, the kind and the seed.

The same function edits every subject, so that equal tensors stay equal after it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from conformance.spec import Edit


def _noise(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Normal noise of the tensor's shape and dtype, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
    return drawn.to(tensor.device, tensor.dtype)


def _without(tensor: torch.Tensor, dim: int, seed: int) -> torch.Tensor:
    """The tensor with one drawn slice of a dimension set to zero."""
    keep = torch.ones(tensor.shape[dim], dtype=tensor.dtype, device=tensor.device)
    keep[seed % tensor.shape[dim]] = 0
    return tensor * keep.reshape([-1 if d == dim % tensor.ndim else 1 for d in range(tensor.ndim)])


def _head_dim(tensor: torch.Tensor) -> int:
    """The head's dimension: 2 of ``[batch, pos, head, d_head]``, 1 of ``[batch, head, q, k]``.

    A tensor with no head loses a slice of its last dimension instead.
    """
    return -1 if tensor.ndim < 4 else 2


_KINDS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "identity": lambda tensor, seed: tensor,
    "zero": lambda tensor, seed: tensor * 0,
    "scale": lambda tensor, seed: tensor * 0.5,
    "noise": lambda tensor, seed: tensor + 0.1 * _noise(tensor, seed),
    "replace": lambda tensor, seed: _noise(tensor, seed),
    "one_head": lambda tensor, seed: _without(tensor, _head_dim(tensor), seed),
    "one_position": lambda tensor, seed: _without(tensor, 1, seed),
    "one_row": lambda tensor, seed: _without(tensor, 0, seed),
    # Adding a constant would be rightly null on scores; a factor is null nowhere but at zero.
    "in_place": lambda tensor, seed: tensor * 0.5,
}


def edited(edit: Edit, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that a hook performing ``edit`` leaves behind.

    Args:
        edit: What to do.
        tensor: The site's tensor, in the hook's layout. Token ids are rolled by one position,
            whatever the kind, so that they stay token ids.

    Returns:
        A tensor of the same shape and dtype; the argument itself for ``identity``.
    """
    if edit.kind != "identity" and not tensor.is_floating_point():
        return tensor.roll(1, dims=-1)
    return _KINDS[edit.kind](tensor, edit.seed)


def edited_head(edit: Edit, tensor: torch.Tensor) -> torch.Tensor:
    """As `edited`, but of one drawn head only, or, one time in four, of all of them.

    Args:
        edit: What to do.
        tensor: ``[batch, pos, head, d_model]``. What has no heads is edited as a whole.

    Returns:
        A tensor of the same shape and dtype. Its gradient goes on to the argument, as zeros where
        the edit leaves nothing of it.
    """
    new = edited(edit, tensor)
    if tensor.ndim < 4:
        return new
    heads = torch.arange(tensor.shape[2]).unsqueeze(-1)
    every = edit.seed % 4 == 0 or edit.kind == "one_head"
    return torch.where(every | (heads == edit.seed // 4 % tensor.shape[2]), new, tensor)
