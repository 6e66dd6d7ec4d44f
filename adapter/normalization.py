"""OLMo's LayerNorm without learnable weight or bias, with live hooks on its inside."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge.generalized_components import NormalizationBridge

from adapter.hooks import is_hooked
from adapter.running import run_of_norm

EPS = 1e-5  # a literal inside transformers' OlmoLayerNorm; the configuration has no such field


class OlmoLayerNormBridge(NormalizationBridge):
    """Hugging Face's own LayerNorm call, observable and editable inside.

    - ``hook_in``: the residual stream, ``[batch, pos, d_model]``.
    - ``hook_scale``: ``sqrt(var + eps)`` of the float32 input, ``[batch, pos, 1]``.
    - ``hook_normalized``: the normalized value. Weight 1 and bias 0 make it the module's output,
      in the output's dtype.
    - ``hook_out``: the same value, on its way out.
    """

    def __init__(self, name: str, config: Any) -> None:
        super().__init__(name, config, use_native_layernorm_autograd=True)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Normalize ``[batch, pos, d_model]``."""
        run = run_of_norm(self)
        if getattr(self, "_relevance_rule_active", False):  # LRP rules of releases before 4.3
            result = super().forward(hidden_states, **kwargs)
        else:
            hidden_states, result = self._observed(hidden_states)
        # Under no flag as well: a hook between here and attention may turn one on.
        if run is not None:
            run.residual = hidden_states
        return result

    def _observed(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is normalized, hooks at ``hook_in`` done, and what becomes of it."""
        hidden_states = self.hook_in(hidden_states)
        scaled = is_hooked(self.hook_scale)
        if scaled:
            # The input is then read twice. A node of its own sums the two gradients before that of
            # the residual stream is added, whichever other hooks there are.
            hidden_states = hidden_states.view_as(hidden_states)
        output = self._native(hidden_states)
        if scaled:
            output = self._apply_scale_hook(hidden_states, output)
        return hidden_states, self.hook_out(self.hook_normalized(output))

    def _native(self, hidden_states: torch.Tensor) -> torch.Tensor:
        component = self.original_component
        if component is None:
            raise RuntimeError(f"no LayerNorm is bound to {self.name!r} yet")
        output: torch.Tensor = component(hidden_states)
        return output

    def _apply_scale_hook(self, hidden_states: torch.Tensor, native: torch.Tensor) -> torch.Tensor:
        """Show the scale to its hooks and give their edits and gradients their effect.

        Where the hook left the value alone, ``native`` stays, plus a term that is exactly zero:
        ``centered / hooked - centered / scale``. Both halves send the input opposite gradients
        that cancel exactly, so only a changed gradient (or a detached value) moves anything.
        Where the hook changed the value, the output is computed from scratch.
        Values are compared, not identities: a backward hook turns every tensor into a new object.
        """
        wide = hidden_states.to(torch.float32)
        centered = wide - wide.mean(-1, keepdim=True)
        scale = (centered.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        hooked = self.hook_scale(scale)
        rebuilt = centered / hooked
        connected = native + (rebuilt - centered / scale).to(native.dtype)
        return torch.where(hooked == scale, connected, rebuilt.to(native.dtype))
