"""Rotary position embeddings: cosines and sines, and nothing that never fires."""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge.generalized_components import RotaryEmbeddingBridge

from adapter.hooks import drop_hook


class OlmoRotaryEmbeddingBridge(RotaryEmbeddingBridge):
    """The model's rotary embedding with ``hook_cos`` and ``hook_sin``, ``[batch, pos, d_head]``.

    ``hook_in`` shows the embedded tokens, of which only dtype and device are read: no edit there
    has an effect.

    It returns a pair, so there is no single output for ``hook_out`` to carry: the name (and its
    alias ``hook_pos_embed``) is absent instead of dead.
    """

    def __init__(self, name: str, config: Any = None) -> None:
        super().__init__(name, config)
        drop_hook(self, "hook_out")
