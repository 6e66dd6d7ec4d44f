"""The OLMo (v1) architecture adapter."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from transformer_lens.conversion_utils.conversion_steps import RearrangeTensorConversion
from transformer_lens.conversion_utils.param_processing_conversion import ParamProcessingConversion
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import EmbeddingBridge

from adapter.attention import OlmoAttentionBridge
from adapter.block import OlmoBlockBridge
from adapter.checkpoint import require_text, require_whole
from adapter.clip import patch_clip
from adapter.compatibility import OlmoTransformerBridge
from adapter.configuration import tell_the_truth
from adapter.hooks import adopt
from adapter.mlp import BranchLinearBridge, OlmoMLPBridge, OutputLinearBridge
from adapter.normalization import OlmoLayerNormBridge
from adapter.rotary import OlmoRotaryEmbeddingBridge
from adapter.state import ExactStateDict
from adapter.unembedding import OlmoUnembeddingBridge

OPTIONAL_PARAMETERS: tuple[str, ...] = (
    "blocks.{i}.attn.b_Q",
    "blocks.{i}.attn.b_K",
    "blocks.{i}.attn.b_V",
    "blocks.{i}.attn.b_O",
    "blocks.{i}.mlp.b_in",
    "blocks.{i}.mlp.b_gate",
    "blocks.{i}.mlp.b_out",
)
"""Parameters that a state dict may lack: attention biases come with ``attention_bias=True``, MLP
biases never in OLMo v1."""


class OlmoArchitectureAdapter(ArchitectureAdapter):
    """Architecture adapter for OLMo (v1) models.

    Pre-norm blocks; a LayerNorm without learnable weight or bias; rotary position embeddings;
    gated MLP; no Q/K norm; optional QKV clipping (``config.clip_qkv``), which a bridged model
    always applies exactly and out of place.

    Attributes:
        optional_parameters: ``OPTIONAL_PARAMETERS``, the parameters that may be missing.
        optional_hooks: Hook points that this adapter has beyond those of every OLMo bridge.
        exact_flags: The flags ``use_attn_result``, ``use_split_qkv_input``, ``use_attn_in`` and
            ``use_hook_mlp_in`` change no bit where nothing is edited.
    """

    optional_parameters: tuple[str, ...] = OPTIONAL_PARAMETERS
    optional_hooks: tuple[str, ...] = (
        "blocks.{i}.attn.hook_q_clipped",
        "blocks.{i}.attn.hook_k_clipped",
        "blocks.{i}.attn.hook_v_clipped",
    )
    exact_flags = True

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.normalization_type = "LN"
        self.cfg.positional_embedding_type = "rotary"
        self.cfg.final_rms = False
        self.cfg.uses_rms_norm = False
        self.cfg.gated_mlp = True
        self.cfg.attn_only = False
        # The attention bridge computes eager attention; the mask must be built for it.
        self.cfg.attn_implementation = "eager"

        self.weight_processing_conversions = {
            **self._qkvo_weight_conversions(include_biases=True),
            # Centering finds the axis to center by its size, and takes the wrong one of a square
            # matrix unless that is in TransformerLens' own layout, input axis first.
            "blocks.{i}.mlp.in.weight": _transposed(),
            "blocks.{i}.mlp.out.weight": _transposed(),
            "unembed.weight": _transposed(),
        }
        self.component_mapping = {
            "embed": EmbeddingBridge(name="model.embed_tokens"),
            "rotary_emb": OlmoRotaryEmbeddingBridge(name="model.rotary_emb", config=self.cfg),
            "blocks": OlmoBlockBridge(
                name="model.layers",
                submodules={
                    "ln1": OlmoLayerNormBridge(name="input_layernorm", config=self.cfg),
                    "attn": OlmoAttentionBridge(
                        name="self_attn",
                        config=self.cfg,
                        submodules={
                            "q": BranchLinearBridge(name="q_proj"),
                            "k": BranchLinearBridge(name="k_proj"),
                            "v": BranchLinearBridge(name="v_proj"),
                            "o": OutputLinearBridge(name="o_proj"),
                        },
                    ),
                    "ln2": OlmoLayerNormBridge(name="post_attention_layernorm", config=self.cfg),
                    "mlp": OlmoMLPBridge(
                        name="mlp",
                        config=self.cfg,
                        submodules={
                            "gate": BranchLinearBridge(name="gate_proj"),
                            "in": BranchLinearBridge(name="up_proj"),
                            "out": OutputLinearBridge(name="down_proj"),
                        },
                    ),
                },
            ),
            "ln_final": OlmoLayerNormBridge(name="model.norm", config=self.cfg),
            "unembed": OlmoUnembeddingBridge(name="lm_head", config=self.cfg),
        }
        for component in self.component_mapping.values():
            adopt(component)

    def prepare_loading(self, model_name: str, model_kwargs: dict[str, Any]) -> None:
        """Refuse a directory whose files are not a whole OLMo, before they are loaded."""
        super().prepare_loading(model_name, model_kwargs)
        if Path(model_name).is_dir():
            require_whole(Path(model_name), model_kwargs["config"])

    def prepare_model(self, hf_model: Any, *, exact_clip: bool = False) -> None:
        """Force eager attention and take the in-place clamp out of the attention forwards.

        Args:
            hf_model: A Hugging Face OLMo model (or anything shaped like one).
            exact_clip: Clamp exactly, out of place, instead of skipping the clamp.
        """
        super().prepare_model(hf_model)
        patch_clip(hf_model, exact_clip=exact_clip)

    def setup_hook_compatibility(self, bridge: TransformerBridge) -> None:
        """Finish a bridge: TransformerLens calls this once its components are bound."""
        if not isinstance(bridge, OlmoTransformerBridge):
            bridge.__class__ = _ours(type(bridge))  # type: ignore[arg-type]
        tell_the_truth(bridge)
        if bridge.tokenizer is not None:
            require_text(bridge.tokenizer)
        for block in bridge.blocks:
            block.attn.set_rotary_emb(bridge.rotary_emb)

    def preprocess_weights(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Keep a float64 model's weights in float64."""
        return ExactStateDict(super().preprocess_weights(state_dict))

    def postprocess_weights(self, bridge: TransformerBridge) -> None:
        """Follow the weights: processing unties the unembedding from the embedding."""
        tell_the_truth(bridge)


@cache
def _ours(kind: type[TransformerBridge]) -> type[TransformerBridge]:
    """OLMo's bridge, below what a subclass of TransformerBridge adds or overrides."""
    if kind is TransformerBridge:
        return OlmoTransformerBridge
    return type(kind.__name__, (kind, OlmoTransformerBridge), {"__module__": kind.__module__})


def _transposed() -> ParamProcessingConversion:
    return ParamProcessingConversion(tensor_conversion=RearrangeTensorConversion("a b -> b a"))
