"""OLMo's pre-norm block: what the flags ``use_split_qkv_input`` and ``use_hook_mlp_in`` need."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.generalized_components import BlockBridge

from adapter.partial_runs import OfTheCall
from adapter.recompute import same_hooks_again


class OlmoBlockBridge(BlockBridge):
    """A block whose listeners belong to it, and to its copy after ``copy.deepcopy``.

    TransformerLens listens with closures, which a deep copy shares with its original: edits at the
    copy's ``hook_mlp_in`` did nothing and fired the original's hook. Bound methods are copied with
    their owner.
    """

    _runs = False
    _stop_at_layer_idx = OfTheCall()
    _start_at_layer_idx = OfTheCall()
    _start_residual = OfTheCall()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block on the residual stream ``[batch, pos, d_model]``."""
        # Of a forward whose hook runs this one.
        captured, runs = self.attn._captured_pre_ln_residual, self._runs
        vars(self)["_runs"] = True
        try:
            with same_hooks_again(self, self.original_component):
                return super().forward(*args, **kwargs)
        finally:
            self.attn._captured_pre_ln_residual = captured
            vars(self)["_runs"] = runs

    def _check_stop_at_layer(self, *args: Any, **kwargs: Any) -> None:
        """Stop with a tensor of the caller's own: hooks may keep the one that they have seen."""
        try:
            super()._check_stop_at_layer(*args, **kwargs)
        except StopAtLayerException as stop:
            raise StopAtLayerException(stop.layer_output.clone()) from None

    def _maybe_wire_capture_hooks(self) -> None:
        """Listen at the two LayerNorms, once."""
        self._wire_ln1_module()
        if self._capture_hooks_wired:
            return
        self._capture_hook_handles += [
            # The wrapped module and not ln1 itself: an edit at ln1.hook_in must be in the capture.
            self.ln1.original_component.register_forward_pre_hook(self._capture_residual),
            self.ln2.register_forward_pre_hook(self._fire_mlp_in),
        ]
        self._capture_hooks_wired = True

    def _capture_residual(self, _module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the residual stream that attention forks per head, ``[batch, pos, d_model]``.

        In a forward under no flag as well: a hook between here and there may turn one on.
        """
        wanted = self._runs or self.attn.forks_input
        if wanted and self.attn._captured_pre_ln_residual is None:
            self.attn._captured_pre_ln_residual = args[0]

    def _fire_mlp_in(
        self, _module: torch.nn.Module, args: tuple[Any, ...]
    ) -> tuple[torch.Tensor] | None:
        """Fire ``hook_mlp_in`` on what the MLP branch reads, ``[batch, pos, d_model]``."""
        if not self._read_use_hook_mlp_in():
            return None
        return (self.hook_mlp_in(args[0]),)
