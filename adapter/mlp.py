"""OLMo's gated MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformer_lens.model_bridge.generalized_components import GatedMLPBridge, LinearBridge


class ProjectionBridge(LinearBridge):
    """A projection ``[batch, pos, in]`` to ``[batch, pos, out]``, or by each head."""

    def forward(
        self,
        input: torch.Tensor,
        *args: Any,
        through: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Project ``input``.

        Args:
            input: ``[batch, pos, in]``.
            *args: For the wrapped module.
            through: What computes the projection in the wrapped module's place. The component is
                called all the same, for those who listen to it with PyTorch's own hooks.
            **kwargs: For the wrapped module.
        """
        if through is None:
            return super().forward(input, *args, **kwargs)
        hooked: torch.Tensor = self.hook_out(through(self.hook_in(input)))
        return hooked


class BranchLinearBridge(ProjectionBridge):
    """A projection that reads a tensor its siblings read too."""


class OutputLinearBridge(ProjectionBridge):
    """A projection into the residual stream, ``[batch, pos, in]`` to ``[batch, pos, d_model]``."""

    def set_processed_weights(
        self, weights: Mapping[str, torch.Tensor | None], verbose: bool = False
    ) -> None:
        """Store processed weights; a bias that folding created takes the weight's dtype.

        TransformerLens before 4.3 leaves it in float32, which a bfloat16 projection rejects.
        """
        weight, bias = weights.get("weight"), weights.get("bias")
        if weight is not None and bias is not None:
            weights = {**weights, "bias": bias.to(weight.dtype)}
        super().set_processed_weights(weights, verbose=verbose)


class OlmoMLPBridge(GatedMLPBridge):
    """``down(act(gate(x)) * up(x))``, always computed by Hugging Face's own module.

    The projections below it are bridges that write processed weights into Hugging Face's
    parameters, so compatibility mode needs no second implementation: activation function and
    hooks are the same in both modes.
    """

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Transform ``[batch, pos, d_model]``."""
        component = self.original_component
        if component is None:
            raise RuntimeError(f"no MLP is bound to {self.name!r} yet")
        hidden_states, *rest = args
        output: torch.Tensor = component(self.hook_in(hidden_states), *rest, **kwargs)
        hooked: torch.Tensor = self.hook_out(output)
        return hooked
