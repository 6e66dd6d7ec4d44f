"""The unembedding, with nothing to train that Hugging Face does not have."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge.generalized_components import UnembeddingBridge

from adapter.hooks import is_hooked


class OlmoUnembeddingBridge(UnembeddingBridge):
    """``lm_head``; its bias, which OLMo lacks, is a buffer of zeros in every release.

    TransformerLens before 4.2 registers it as a parameter: an optimizer then trains it, and the
    model drifts from Hugging Face's.
    """

    def set_original_component(self, original_component: torch.nn.Module) -> None:
        """Bind ``lm_head``."""
        super().set_original_component(original_component)
        zeros = original_component._parameters.get("bias")
        if zeros is not None:
            del original_component.bias
            original_component.register_buffer("bias", zeros.detach())

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Logits ``[batch, pos, d_vocab]``, the caller's own: a cache keeps another tensor."""
        self._follow_the_weight()
        shown = is_hooked(self.hook_out)  # before: a hook may remove itself
        logits: torch.Tensor = super().forward(hidden_states, **kwargs)
        return logits.clone() if shown else logits

    def _follow_the_weight(self) -> None:
        """Give the zeros the weight's dtype, which a cast of the parameters alone changes."""
        head: Any = self.original_component
        zeros = head._buffers.get("bias")
        if zeros is not None and zeros.dtype != head.weight.dtype:
            head.bias = zeros.to(head.weight.dtype)
