"""What OLMo's bridge does otherwise than TransformerLens': weight processing, and compilation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch

from adapter.calls import OlmoCalls
from adapter.gates import refuse_gated
from adapter.partial_runs import call_of_its_own
from adapter.recorders import forget_output_recorders
from adapter.state import WholeStateBridge
from adapter.text import OlmoTextBridge


class OlmoTransformerBridge(OlmoCalls, OlmoTextBridge, WholeStateBridge):
    """A TransformerBridge that refuses or skips what is not legal for OLMo.

    TransformerLens decides about weight processing in the bridge and tells an architecture adapter
    neither what was asked nor early enough to say no, so the adapter gives its bridges this class.
    """

    # Hooks are Python that comes and goes between two calls. Traced, every one of them breaks the
    # graph, a change of them compiles anew, and an older PyTorch fails at it. So torch.compile
    # leaves a bridge as it is: a compiled one runs eagerly, hooks and all.
    forward = torch.compiler.disable(OlmoCalls.forward)  # type: ignore[no-untyped-call]

    def enable_compatibility_mode(
        self,
        disable_warnings: bool = False,
        no_processing: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Process the weights and turn legacy names on, or refuse before anything is touched."""
        if not no_processing:
            _refuse_refactoring(refactor_factored_attn_matrices)
        super().enable_compatibility_mode(
            disable_warnings=disable_warnings,
            no_processing=no_processing,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
        )

    def process_weights(
        self,
        verbose: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Process the weights as far as that leaves the model's log-probabilities as they are."""
        _refuse_refactoring(refactor_factored_attn_matrices)
        if fold_value_biases and (reason := self._why_value_biases_must_stay()):
            warnings.warn(f"value biases are not folded into b_O: {reason}", stacklevel=2)
            fold_value_biases = False
        trains = {name: held.requires_grad for name, held in self.named_parameters()}
        super().process_weights(
            verbose=verbose,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
        )
        # Processed weights are new parameters. What was frozen stays so, and so does what is new in
        # a model that is frozen as a whole.
        for name, held in self.named_parameters():
            held.requires_grad_(trains.get(name, any(trains.values())))

    def apply(self, fn: Callable[[torch.nn.Module], None]) -> OlmoTransformerBridge:
        """Call ``fn`` on each module once, children first, as in a tree.

        A bridge is none: its components and Hugging Face's modules have each other for children.
        """
        seen: set[torch.nn.Module] = set()

        def visit(module: torch.nn.Module) -> None:
            seen.add(module)
            for child in module.children():
                if child not in seen:
                    visit(child)
            fn(module)

        visit(self)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy without the hooks that pickle cannot find by their names."""
        forget_output_recorders(self.original_model)
        return super().__reduce_ex__(protocol)

    def accumulated_bias(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Sum the biases up to a layer, ``[d_model]``, in the model's dtype.

        TransformerLens sums them in float32 at least: a cache's full decomposition then came out in
        float32, or could not be projected onto directions of any other dtype.
        """
        bias: torch.Tensor = super().accumulated_bias(*args, **kwargs)
        return bias.to(self.W_E.dtype)

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Run and cache; refuse a name whose hook fires only under a flag that is off.

        A run that a hook, or another thread, makes meanwhile is not cached.
        """
        given = signature(super().run_with_cache).bind(*args, **kwargs).arguments
        refuse_gated(self, given.get("names_filter"))
        with call_of_its_own() as call:
            call.caches = True
            return super().run_with_cache(*args, **kwargs)

    def get_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Build caching hooks; refuse a name whose hook fires only under a flag that is off."""
        refuse_gated(self, names_filter)
        return super().get_caching_hooks(names_filter, *args, **kwargs)

    def _why_value_biases_must_stay(self) -> str | None:
        """The reason why folding would change the model, or None.

        Folding relies on a head's output being linear in its values and on patterns that sum to 1.
        """
        config: Any = self.original_model.config
        if all(block.attn.b_V is None for block in self.blocks):
            return None
        if config.clip_qkv is not None:
            return f"clip_qkv={config.clip_qkv} clamps the values after the bias is added"
        if config.attention_dropout and self.training:
            return f"attention_dropout={config.attention_dropout} is active in training mode"
        return None


def _refuse_refactoring(asked: bool) -> None:
    if asked:
        raise ValueError(
            "refactor_factored_attn_matrices=True is not possible for OLMo: rotary embeddings "
            "make the QK circuit depend on positions. Nothing was changed."
        )
