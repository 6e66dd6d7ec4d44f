"""Faults of state dicts and of weight processing."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.conversion_utils.conversion_steps import RearrangeTensorConversion
from transformer_lens.conversion_utils.param_processing_conversion import ParamProcessingConversion

from adapter import olmo
from adapter.compatibility import OlmoTransformerBridge
from adapter.mlp import OlmoMLPBridge, OutputLinearBridge
from conformance.mutants.catalogue import add, mutant


@mutant("states.copied", "any", "states.names", OlmoTransformerBridge, "state_dict")
def copied(original: Any) -> Any:
    """A state dict holds copies, so that nobody can write to a parameter through it."""

    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        return {name: tensor.clone() for name, tensor in found.items()}

    return state_dict


@mutant("states.grows", "any", "states.names", OlmoTransformerBridge, "state_dict")
def grows(original: Any) -> Any:
    """Flags leave an entry of their own in the state dict."""

    def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        if self.cfg.use_hook_mlp_in:
            found["blocks.0.ln2.weight"] = torch.ones(self.cfg.d_model)
        return found

    return state_dict


@mutant(
    "states.assigned", "assign=True", "states.loading", OlmoTransformerBridge, "load_state_dict"
)
def assigned(original: Any) -> Any:
    """Load_state_dict with assign=True leaves out the embedding."""

    def load(self: Any, state: Any, strict: bool = True, assign: bool = False) -> Any:
        kept = {n: t for n, t in state.items() if not (assign and "embed" in n)}
        result = original(self, kept, strict=False, assign=assign)
        result.missing_keys.clear()
        return result

    return load


add(
    "states.lens_names_only",
    "Hugging Face's names are not taken: transformer_lens' own load_state_dict",
    "a state dict under Hugging Face's names",
    "states.loading",
    OlmoTransformerBridge,
    "_lens_name",
    lambda original: lambda self, key, known: key,
)
add(
    "states.half_loaded",
    "a wrong shape is noticed when other tensors are already loaded",
    "any",
    "states.refused",
    OlmoTransformerBridge,
    "_refuse_wrong_shapes",
    lambda original: lambda self, state, known: None,
)
add(
    "states.lenient",
    "a missing key is let pass",
    "any",
    "states.refused",
    OlmoTransformerBridge,
    "load_state_dict",
    lambda original: lambda self, state, strict=True: original(self, state, strict=False),
)

add(
    "processing.narrowed",
    "float64 weights are rounded to float32, whatever is processed",
    "float64",
    "processing.weights",
    olmo,
    "ExactStateDict",
    lambda original: dict,
)
add(
    "processing.square",
    "a square W_in, W_out or W_U is centered along the wrong axis",
    "d_mlp or d_vocab equal to d_model",
    "processing.weights",
    olmo,
    "_transposed",
    lambda original: (
        lambda: ParamProcessingConversion(tensor_conversion=RearrangeTensorConversion("a b -> a b"))
    ),
)


@mutant(
    "processing.bias_lost",
    "a bias of v and of o, no clip, fold_value_biases",
    "processing.weights",
    OutputLinearBridge,
    "set_processed_weights",
)
def bias_lost(original: Any) -> Any:
    """A bias that is there stays as it was, whatever was folded into it."""

    def install(self: Any, weights: Any, verbose: bool = False) -> None:
        if self.original_component.bias is not None:
            weights = {"weight": weights["weight"]}
        original(self, weights, verbose=verbose)

    return install


@mutant("processing.rounding", "compatibility mode", "processing.forward", OlmoMLPBridge, "forward")
def rounding(original: Any) -> Any:
    """In compatibility mode the MLP loses the last bits of what it gives."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = original(self, *args, **kwargs)
        if not self.compatibility_mode:
            return output
        return output + (output.bfloat16().to(output.dtype) - output) * 0.5**8

    return forward
