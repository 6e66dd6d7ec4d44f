"""Faults in how modules are called, so that PyTorch's own hooks on them are not, or too often."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from adapter.attention import OlmoAttentionBridge
from adapter.block import OlmoBlockBridge
from adapter.mlp import OlmoMLPBridge, ProjectionBridge
from adapter.normalization import OlmoLayerNormBridge
from conformance.mutants.catalogue import mutant

unheard = partial(mutant, killer="hook_api.torch")


@unheard("torch_hooks.output", "any", owner=OlmoAttentionBridge, attribute="_project_out")
def output(original: Any) -> Any:
    """PyTorch's hooks on attn.o are not called: its forward is written out."""

    def project_out(self: Any, z: torch.Tensor) -> Any:
        if self.config.use_attn_result:
            return original(self, z)
        return self.o.hook_out(self.o.original_component(self.o.hook_in(z)))

    return project_out


@unheard("torch_hooks.flagged", "a per-head flag", owner=OlmoAttentionBridge, attribute="_project")
def flagged(original: Any) -> Any:
    """PyTorch's hooks on attn.q, k and v are not called under a flag of their input."""

    def project(self: Any, hidden_states: torch.Tensor, residual: Any) -> Any:
        linears = (self.q, self.k, self.v)
        if not self.forks_input:
            return original(self, hidden_states, residual)
        return [linear.forward(hidden_states) for linear in linears]

    return project


@unheard("torch_hooks.norm", "a per-head flag", owner=OlmoAttentionBridge, attribute="_changes")
def norm(original: Any) -> Any:
    """Under a flag of attention's input PyTorch's hooks on the LayerNorm before it hear copies."""
    return lambda self, residual, _norm: original(self, residual, self._ln1_module)


@unheard("torch_hooks.mlp", "any", owner=OlmoMLPBridge, attribute="forward")
def mlp(original: Any) -> Any:
    """PyTorch's hooks on Hugging Face's MLP are not called."""

    def forward(self: Any, hidden_states: torch.Tensor) -> Any:
        return self.hook_out(self.original_component.forward(self.hook_in(hidden_states)))

    return forward


@unheard("torch_hooks.linear", "any", owner=ProjectionBridge, attribute="forward")
def linear(original: Any) -> Any:
    """PyTorch's hooks on Hugging Face's projections hear each call twice."""

    def forward(self: Any, input: torch.Tensor, **kwargs: Any) -> Any:
        if kwargs.get("through") is None:
            self.original_component(input)
        return original(self, input, **kwargs)

    return forward


@unheard("torch_hooks.returned", "any", owner=OlmoBlockBridge, attribute="__call__")
def returned(original: Any) -> Any:
    """What a PyTorch hook on a block returns is dropped."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen: list[Any] = []
        first = self.register_forward_hook(
            lambda module, args, output: seen.append(output), prepend=True
        )
        try:
            original(self, *args, **kwargs)
        finally:
            first.remove()
        return seen[0]

    return call


@unheard("torch_hooks.given", "any", owner=OlmoLayerNormBridge, attribute="_native")
def given(original: Any) -> Any:
    """PyTorch's hooks on Hugging Face's LayerNorm see the output in the other sign."""

    def native(self: Any, hidden_states: torch.Tensor) -> Any:
        return -original(self, -hidden_states)

    return native
