"""Ways to get a bridge around an OLMo model with this adapter."""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_config_from_hf,
    configure_tokenizer,
)

from adapter.olmo import OlmoArchitectureAdapter

ARCHITECTURE = "OlmoForCausalLM"


def bridge(hf_model: Any, tokenizer: Any = None) -> TransformerBridge:
    """Wrap ``hf_model`` in place in a TransformerBridge that uses this adapter.

    Nothing is registered: other bridges in the process stay as they are.

    Args:
        hf_model: An ``OlmoForCausalLM``. Bridging modifies it in place.
        tokenizer: Its tokenizer, if strings shall be accepted.

    Raises:
        ValueError: If there is a bridge around ``hf_model`` already.
    """
    if any(isinstance(module, GeneralizedComponent) for module in hf_model.modules()):
        raise ValueError(
            f"hf_model: this {type(hf_model).__name__} is inside of a bridge already; use that "
            "bridge, or load the model again"
        )
    config = build_bridge_config_from_hf(
        hf_model.config,
        ARCHITECTURE,
        getattr(hf_model.config, "_name_or_path", "") or "olmo",
        next(hf_model.parameters()).dtype,
    )
    adapter = OlmoArchitectureAdapter(config)
    adapter.cfg.device = str(next(hf_model.parameters()).device)
    adapter.prepare_model(hf_model)
    if tokenizer is not None:
        tokenizer = configure_tokenizer(tokenizer, adapter.cfg)
    return TransformerBridge(hf_model, adapter, tokenizer)


def register() -> None:
    """Make ``TransformerBridge.boot_transformers`` use this adapter for OLMo v1.

    The registry belongs to the process: every OLMo that is booted afterwards gets this adapter.
    """
    # Imported first, this module is circular in transformer_lens 4.0.
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, OlmoArchitectureAdapter)
