"""How hook points show tensors: TransformerLens' ``[batch, pos, head, d_head]`` everywhere.

The classes stand at module level, where pickle finds them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import (
    BaseTensorConversion,
)


class SplitHeads(BaseTensorConversion):
    """Show ``[batch, pos, head * d_head]`` as ``[batch, pos, head, d_head]``."""

    splits_attention_heads = True

    def __init__(self, d_head: int) -> None:
        super().__init__()
        self.d_head = d_head

    def handle_conversion(self, input_value: torch.Tensor, *full_context: Any) -> torch.Tensor:
        """Split the heads."""
        return input_value.view(*input_value.shape[:-1], -1, self.d_head)

    def revert(self, input_value: torch.Tensor, *full_context: Any) -> torch.Tensor:
        """Join the heads; a hook may also hand back the joined layout."""
        return input_value.flatten(-2) if input_value.ndim == 4 else input_value


class HeadsAfterPositions(BaseTensorConversion):
    """Show ``[batch, head, pos, d_head]`` as ``[batch, pos, head, d_head]``."""

    def handle_conversion(self, input_value: torch.Tensor, *full_context: Any) -> torch.Tensor:
        """Put positions first."""
        return input_value.transpose(1, 2)

    def revert(self, input_value: torch.Tensor, *full_context: Any) -> torch.Tensor:
        """Put heads first."""
        return input_value.transpose(1, 2)
