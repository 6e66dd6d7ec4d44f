"""The unembedding, with nothing to train that Hugging Face does not have."""

from __future__ import annotations

import torch
from transformer_lens.model_bridge.generalized_components import UnembeddingBridge


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
