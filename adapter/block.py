"""OLMo's pre-norm block: what the flags ``use_split_qkv_input`` and ``use_hook_mlp_in`` need."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.generalized_components import BlockBridge

from adapter.partial_runs import OfTheCall
from adapter.recompute import recompute_alike
from adapter.recorders import record_hidden_state
from adapter.running import begin, set_apart


class OlmoBlockBridge(BlockBridge):
    """A block whose listeners belong to it, and to its copy after ``copy.deepcopy``.

    TransformerLens listens with closures, which a deep copy shares with its original: edits at the
    copy's ``hook_mlp_in`` did nothing and fired the original's hook. Bound methods are copied with
    their owner.
    """

    _stop_at_layer_idx = OfTheCall()
    _start_at_layer_idx = OfTheCall()
    _start_residual = OfTheCall()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block on the residual stream ``[batch, pos, d_model]``."""
        recompute_alike(self, self.original_component)
        with set_apart():
            output = super().forward(*args, **kwargs)
        record_hidden_state(output)
        return output

    def _hook_input_hidden_states(self, *args: Any) -> Any:
        """Fire ``hook_in``, whose hooks come before the layer."""
        hooked = super()._hook_input_hidden_states(*args)
        begin(self)
        return hooked

    def _check_stop_at_layer(self, *args: Any, **kwargs: Any) -> None:
        """Stop with a tensor of the caller's own: hooks may keep the one that they have seen."""
        try:
            super()._check_stop_at_layer(*args, **kwargs)
        except StopAtLayerException as stop:
            raise StopAtLayerException(stop.layer_output.clone()) from None

    def _maybe_wire_capture_hooks(self) -> None:
        """Listen at the second LayerNorm, once."""
        self._wire_ln1_module()
        if not self._capture_hooks_wired:
            self._capture_hook_handles.append(self.ln2.register_forward_pre_hook(self._fire_mlp_in))
            self._capture_hooks_wired = True

    def _fire_mlp_in(
        self, _module: torch.nn.Module, args: tuple[Any, ...]
    ) -> tuple[torch.Tensor] | None:
        """Fire ``hook_mlp_in`` on what the MLP branch reads, ``[batch, pos, d_model]``."""
        if not self._read_use_hook_mlp_in():
            return None
        return (self.hook_mlp_in(args[0]),)
