"""Build the subjects of a comparison: each a fresh model with the same weights.

The reference is a pristine `OlmoForCausalLM` that no adapter code ever touches. Bridging mutates
the model it wraps, so no two subjects ever share a module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformers import OlmoConfig, OlmoForCausalLM, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from conformance.data import TRAINED
from conformance.fields import SpecError
from conformance.spec import PROJECTIONS, ModelSpec

ARCHITECTURE = "OlmoForCausalLM"


class SubjectError(Exception):
    """The subject under test could not be built or run: its fault, not the kit's."""


@contextmanager
def at_work(stage: str) -> Iterator[None]:
    """Blame the subject under test for whatever is raised in here."""
    try:
        yield
    except SubjectError:
        raise
    except Exception as error:
        raise SubjectError(f"{stage}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Subject:
    """A model to observe.

    Attributes:
        model: The Hugging Face model, or None if it is bridged away.
        bridge: The bridge around it, or None.
        parameters: The Hugging Face model's parameters under its own names, taken before any
            bridge renamed them.
        clamps: Whether attention clamps q, k and v in place.
        optional_hooks: Hook patterns that the adapter declares beyond the required ones.
        under_test: Whether the adapter has touched it, so that its errors are the adapter's.
    """

    model: OlmoForCausalLM
    parameters: Mapping[str, nn.Parameter]
    bridge: TransformerBridge | None = None
    clamps: bool = False
    optional_hooks: tuple[str, ...] = ()
    under_test: bool = True


def rope_parameters(model: ModelSpec) -> dict[str, Any]:
    """What `rope_parameters` of a Hugging Face configuration needs for each type of RoPE."""
    half = max(model.max_position_embeddings // 2, 1)
    extra: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 2.0, "original_max_position_embeddings": half},
        "llama3": {
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": half,
        },
    }
    return {
        "rope_type": model.rope_type,
        "rope_theta": model.rope_theta,
        **extra[model.rope_type],
    }


def hf_config(model: ModelSpec, attention: str = "eager") -> OlmoConfig:
    """The Hugging Face configuration of a spec.

    Args:
        model: The spec.
        attention: Hugging Face's name of the implementation of attention.

    Raises:
        SpecError: If Hugging Face knows no activation of the name ``hidden_act``.
    """
    if model.hidden_act not in ACT2FN:
        raise SpecError("hidden_act", model.hidden_act, f"one of {sorted(ACT2FN)}")
    extra: dict[str, Any] = {"attn_implementation": attention}
    if model.head_dim is not None:
        extra["head_dim"] = model.head_dim
    return OlmoConfig(
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_position_embeddings,
        hidden_act=model.hidden_act,
        rope_parameters=rope_parameters(model),
        tie_word_embeddings=model.tie_word_embeddings,
        attention_bias=bool(model.biases),
        attention_dropout=model.attention_dropout,
        clip_qkv=model.clip_qkv,
        pad_token_id=model.pad_token_id,
        eos_token_id=None,
        **extra,
    )


@cache
def takes_whole_clips() -> bool:
    """Whether a configuration may say 8 for 8.0. transformer_lens sees to that from 3.9 on."""
    try:
        OlmoConfig(clip_qkv=8)
    except StrictDataclassError:
        return False
    return True


def _fill(parameters: Mapping[str, nn.Parameter], model: ModelSpec) -> None:
    """Draw every weight and bias from the spec's seed, wide enough for clips to bind.

    They are scaled in float32 at least: a float64 model's weights are no float32 numbers.
    """
    generator = torch.Generator().manual_seed(model.weight_seed)
    wide = torch.promote_types(getattr(torch, model.dtype), torch.float32)
    with torch.no_grad():
        drawn = [
            torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(wide)
            for parameter in parameters.values()
        ]
        torch._foreach_mul_(drawn, model.weight_scale)
        torch._foreach_copy_(list(parameters.values()), drawn)


def redraw(subjects: Iterable[Subject], model: ModelSpec) -> None:
    """Give built subjects other weights of the same shapes, in their place: the spec's own."""
    first, *others = subjects
    _fill(first.parameters, model)
    with torch.no_grad():
        for other in others:
            torch._foreach_copy_(list(other.parameters.values()), list(first.parameters.values()))


@cache
def _trained_weights() -> Mapping[str, torch.Tensor]:
    return load_file(TRAINED / "model.safetensors")


def _load(parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy the trained weights, which a model of another shape cannot have."""
    trained = _trained_weights()
    wanted = {name: list(parameter.shape) for name, parameter in parameters.items()}
    shapes = {name: list(tensor.shape) for name, tensor in trained.items()}
    if wanted != shapes:
        others = sorted(name for name in wanted | shapes if wanted.get(name) != shapes.get(name))
        allowed = f"drawn, or the sizes and biases data.trained()'s: {', '.join(others)} differ"
        raise SpecError("weights", "trained", allowed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])


def hf_model(model: ModelSpec, attention: str = "eager") -> OlmoForCausalLM:
    """A fresh Hugging Face model of a spec: equal specs give equal weights.

    The weights are created in the spec's dtype, as `from_pretrained` does; the rotary frequencies
    stay float32.

    Raises:
        SpecError: If trained weights are asked for and the sizes are not theirs.
    """
    with no_init_weights():  # all are drawn below
        built = OlmoForCausalLM._from_config(  # type: ignore[no-untyped-call]
            hf_config(model, attention), dtype=getattr(torch, model.dtype)
        )
    built.tie_weights()
    for layer in built.model.layers if model.biases else ():
        for letter in set(PROJECTIONS) - set(model.biases):
            getattr(layer.self_attn, f"{letter}_proj").bias = None
    parameters = dict(built.named_parameters())
    if model.weights == "trained":
        _load(parameters)
    else:
        _fill(parameters, model)
    built.eval()
    return built  # type: ignore[no-any-return]


def lens_config(model: OlmoForCausalLM) -> TransformerBridgeConfig:
    """The configuration that transformer_lens itself would give an adapter."""
    name, dtype = "olmo-conformance", next(model.parameters()).dtype
    sources = "transformer_lens.model_bridge.sources"
    try:
        builder = import_module(f"{sources}._bridge_builder")
    except ModuleNotFoundError:
        pass
    else:
        config: TransformerBridgeConfig = builder.build_bridge_config_from_hf(
            model.config, ARCHITECTURE, name, dtype
        )
        return config
    # Before 3.5 only a whole `boot`, which wants a checkpoint, does what follows.
    mapped = import_module(f"{sources}.transformers").map_default_transformer_lens_config
    config = TransformerBridgeConfig.from_dict(dict(vars(mapped(model.config))))
    config.architecture, config.model_name, config.dtype = ARCHITECTURE, name, dtype
    return config


def make_adapter(adapter: type[ArchitectureAdapter], model: OlmoForCausalLM) -> ArchitectureAdapter:
    """The adapter under test, on transformer_lens' own configuration of a model."""
    config = lens_config(model)
    with at_work("constructing the adapter"):
        return adapter(config)


def unpatcher(adapter: type[ArchitectureAdapter]) -> Callable[[Any], None] | None:
    """The ``unpatch_model`` that an adapter's package offers, or None."""
    package = sys.modules[adapter.__module__.partition(".")[0]]
    found: Callable[[Any], None] | None = getattr(package, "unpatch_model", None)
    return found


def reference(model: ModelSpec, *, attention: str = "eager") -> Subject:
    """The pristine Hugging Face model."""
    built = hf_model(model, attention)
    clamps = model.clip_qkv is not None
    return Subject(built, dict(built.named_parameters()), clamps=clamps, under_test=False)


def patched(
    model: ModelSpec, adapter: type[ArchitectureAdapter], *, exact_clip: bool | None = None
) -> Subject:
    """A Hugging Face model after the adapter's ``prepare_model``.

    Args:
        model: What to build.
        adapter: The adapter class under test.
        exact_clip: Ask for the exact mode; None calls ``prepare_model(hf_model)`` as documented.
    """
    built = hf_model(model)
    parameters = dict(built.named_parameters())
    mode = {} if exact_clip is None else {"exact_clip": exact_clip}
    with at_work("prepare_model"):
        make_adapter(adapter, built).prepare_model(built, **mode)
    return Subject(built, parameters, clamps=bool(exact_clip) and model.clip_qkv is not None)


def _as_it_is(subject: Subject) -> Subject:
    return subject


_begin: ContextVar[Callable[[Subject], Subject]] = ContextVar("begin", default=_as_it_is)


@contextmanager
def beginning(change: Callable[[Subject], Subject]) -> Iterator[None]:
    """Have every bridge that `bridged` builds meanwhile go through something first."""
    token = _begin.set(change)
    try:
        yield
    finally:
        _begin.reset(token)


def bridged(
    model: ModelSpec,
    adapter: type[ArchitectureAdapter],
    *,
    prepared: bool = True,
    attention: str = "eager",
    tokenizer: PreTrainedTokenizerBase | None = None,
    alter: Callable[[OlmoForCausalLM], None] | None = None,
) -> Subject:
    """A `TransformerBridge` around a Hugging Face model, built with the adapter under test.

    Args:
        model: What to build.
        adapter: The adapter class under test.
        prepared: Call ``prepare_model`` first, as ``boot_transformers`` does.
        attention: Hugging Face's name of the attention that the model was loaded with.
        tokenizer: Of a bridge that takes text; set up as ``boot_transformers`` does it.
        alter: What makes of the model, before all else, one that no spec describes.
    """
    built = hf_model(model, attention)
    if alter is not None:
        alter(built)
    parameters = dict(built.named_parameters())
    with at_work("building the bridge"):
        made = make_adapter(adapter, built)
        if prepared:
            made.prepare_model(built)
        if tokenizer is not None:
            # Older releases have it elsewhere, and no less than a bridge without text.
            from transformer_lens.model_bridge.sources._bridge_builder import configure_tokenizer

            tokenizer = configure_tokenizer(tokenizer, made.cfg)
        bridge = TransformerBridge(built, made, tokenizer)
        if bridge.training:  # else it is left alone: eval() would hide a component in another mode
            bridge.eval()
    declared = tuple(getattr(adapter, "optional_hooks", ()))
    return _begin.get()(Subject(built, parameters, bridge=bridge, optional_hooks=declared))
