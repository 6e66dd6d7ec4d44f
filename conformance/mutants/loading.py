"""Faults of loading by name: what is read is not what is there, and damage goes unseen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from adapter import OlmoArchitectureAdapter, checkpoint, olmo
from adapter.checkpoint import CheckpointError
from conformance.mutants.catalogue import add, mutant

_ADAPTER = OlmoArchitectureAdapter


@mutant("loading.rounded", "float32 or wider", "loading.by_name", _ADAPTER, "prepare_loading")
def rounded(original: Any) -> Any:
    """Weights pass through bfloat16 on their way."""

    def prepare(self: Any, name: str, kwargs: dict[str, Any]) -> None:
        original(self, name, kwargs)
        kwargs["torch_dtype"] = torch.bfloat16

    return prepare


@mutant("loading.clip_lost", "a clip", "loading.by_name", _ADAPTER, "prepare_loading")
def clip_lost(original: Any) -> Any:
    """A model that is loaded by name has no clip."""

    def prepare(self: Any, name: str, kwargs: dict[str, Any]) -> None:
        original(self, name, kwargs)
        kwargs["config"].clip_qkv = None

    return prepare


@mutant("loading.untied", "tied embeddings", "loading.by_name", _ADAPTER, "prepare_loading")
def untied(original: Any) -> Any:
    """The unembedding of a tied model is taken for a weight of its own, which no file has."""

    def prepare(self: Any, name: str, kwargs: dict[str, Any]) -> None:
        original(self, name, kwargs)
        kwargs["config"].tie_word_embeddings = False

    return prepare


@mutant("loading.frequencies", "a short dtype", "loading.by_name", _ADAPTER, "prepare_model")
def frequencies(original: Any) -> Any:
    """Rotary frequencies are rounded to the dtype of the weights, of a loaded model only."""

    def prepare(self: Any, hf_model: Any, **mode: Any) -> None:
        original(self, hf_model, **mode)
        if hf_model.config._name_or_path:
            rotary = hf_model.model.rotary_emb
            rotary.inv_freq = rotary.inv_freq.to(hf_model.dtype).float()

    return prepare


@mutant("loading.damage_unnamed", "a damaged shard", "loading.refusal", checkpoint, "_header")
def damage_unnamed(original: Any) -> Any:
    """A damaged file is not told from an empty one."""

    def header(path: Path) -> Any:
        try:
            return original(path)
        except CheckpointError:
            return {}

    return header


@mutant(
    "loading.shape_unseen", "a tensor of another shape", "loading.refusal", checkpoint, "_compare"
)
def shape_unseen(original: Any) -> Any:
    """A tensor need only be there, whatever its shape."""

    def compare(directory: Path, wanted: Any, found: Any) -> None:
        original(directory, wanted, {name: wanted.get(name) for name in found})

    return compare


@mutant("loading.any_type", "another model_type", "loading.refusal", olmo, "require_whole")
def any_type(original: Any) -> Any:
    """Any model whose configuration claims the name of OLMo's class is taken."""

    def require(directory: Path, config: Any) -> None:
        if config.model_type == "olmo":
            original(directory, config)

    return require


add(
    "loading.missing_random",
    "a tensor that no file has is left to Hugging Face, which makes up random numbers",
    "a tensor that is missing",
    "loading.refusal",
    checkpoint,
    "_compare",
    lambda original: lambda directory, wanted, found: None,
)
add(
    "loading.no_tokenizer",
    "a tokenizer that Hugging Face makes up of nothing is taken",
    "no tokenizer",
    "loading.refusal",
    olmo,
    "require_text",
    lambda original: lambda tokenizer: None,
)
