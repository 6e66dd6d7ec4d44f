"""What the bridge's configuration says of the model, and what a change of the model's own does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from transformer_lens.config import TransformerBridgeConfig
from transformers.models.olmo.modeling_olmo import (
    OlmoAttention,
    OlmoMLP,
    OlmoRotaryEmbedding,
)

from conformance.checks.modes import DROPS
from conformance.checks.registry import Adapter, check
from conformance.checks.support import (
    bridge_of,
    everywhere_gaps,
    has_exact,
    in_one_forward,
    quiet,
)
from conformance.checks.surface import FLAGS, is_told
from conformance.compare import Gap, labelled
from conformance.observe import observe
from conformance.spec import Case, ModelSpec
from conformance.strategies import cases, model_specs
from conformance.subjects import (
    Subject,
    at_work,
    bridged,
    hf_model,
    lens_config,
    patched,
    reference,
    takes_whole_clips,
)
from conformance.taps import LAYER_NORM_EPS


@check(
    "configuration.truth",
    "cfg carries the model's clip_qkv, attention_dropout, rotary_base, d_head, n_key_value_heads, "
    "eps and tying; all else that transformer_lens has translated from the model's configuration, "
    "of the bridge and of each component, is what the adapter says of OLMo, or still that, in "
    "compatibility mode too.",
    cases,
    examples=0.2,
)
def truth(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Field by field, on the bridge and on the configuration each component reads."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    gaps = list(_untrue(subject, case.model, ""))
    yield from gaps
    if not gaps and case.run.token_seed % 2:
        bridge = bridge_of(subject)
        # Value biases cannot always be folded; compatibility.value_biases asks when.
        with at_work("enable_compatibility_mode"), quiet():
            bridge.enable_compatibility_mode(disable_warnings=True, fold_value_biases=False)
            tied = bridge.unembed.W_U.data_ptr() == bridge.embed.W_E.data_ptr()
        model = replace(case.model, tie_word_embeddings=tied)  # what is folded in one unties both
        yield from _untrue(subject, model, " in compatibility mode")


def _untrue(subject: Subject, model: ModelSpec, when: str) -> Iterator[Gap]:
    translated = {
        name: FLAGS.get(name, value)
        for name, value in vars(lens_config(hf_model(model))).items()
        if is_told(name, value)
    }
    bridge = bridge_of(subject)
    known: set[int] = set()
    for path, component in bridge.named_modules():
        config = getattr(component, "config" if path else "cfg", None)
        if not isinstance(config, TransformerBridgeConfig) or id(config) in known:
            continue
        known.add(id(config))
        if config.d_vocab_out not in (-1, model.vocab_size):
            yield Gap(f"cfg.d_vocab_out{when}", "contract", f"{config.d_vocab_out}")
        for name, value in translated.items():
            got = getattr(config, name, "absent")
            if got != value:
                where = f"{path}.config" if path else "cfg"
                told = f"{got!r} instead of {value!r}"
                yield Gap(f"{where}.{name}{when}", "contract", told)
    due = {
        "clip_qkv": model.clip_qkv,
        "attention_dropout": model.attention_dropout,
        "rotary_base": model.rope_theta,
        "d_head": model.d_head,
        "n_heads": model.num_attention_heads,
        "n_key_value_heads": model.num_key_value_heads,
        "n_layers": model.num_hidden_layers,
        "d_model": model.hidden_size,
        "d_mlp": model.intermediate_size,
        "d_vocab": model.vocab_size,
        "n_ctx": model.max_position_embeddings,
        "eps": LAYER_NORM_EPS,
        "tie_word_embeddings": model.tie_word_embeddings,
    }
    holders = {"cfg": bridge.cfg}
    for block in range(model.num_hidden_layers):
        holders[f"blocks.{block}.attn.config"] = bridge.blocks[block].attn.config
    for holder, config in holders.items():
        for name, value in due.items():
            got = getattr(config, name, "absent")
            # Without grouped heads transformer_lens has None for their number.
            if name == "n_key_value_heads" and got is None and value == model.num_attention_heads:
                continue
            if got != value:
                yield Gap(f"{holder}.{name}{when}", "contract", f"{got!r}, the model has {value!r}")


def _set_clip(model: Any, clip: float | None) -> None:
    model.config.clip_qkv = clip


def _all(model: Any, kind: type[torch.nn.Module]) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, kind))


def _set_dropout(model: Any, dropout: float) -> None:
    for attention in _all(model, OlmoAttention):
        attention.attention_dropout = dropout


def _set_scaling(model: Any, factor: float) -> None:
    for attention in _all(model, OlmoAttention):
        attention.scaling *= factor


def _set_frequencies(model: Any, factor: float) -> None:
    for rotation in _all(model, OlmoRotaryEmbedding):
        rotation.inv_freq.mul_(factor)
        rotation.attention_scaling *= factor


def _set_activation(model: Any, activation: torch.nn.Module) -> None:
    for mlp in _all(model, OlmoMLP):
        mlp.act_fn = activation


def _change(case: Case) -> tuple[str, Case, Callable[[Any], None]]:
    """A change of a built model, and the case as it is after it."""
    model, seed = case.model, case.run.token_seed
    # Hugging Face computes the frequencies of this kind anew as a text grows.
    turned = _set_frequencies if model.rope_type != "dynamic" else _set_scaling
    if seed % 3 == 0:
        once = model.clip_qkv
        # The int is as an 8 in the place of 8.0 in a file.
        whole = 1 if takes_whole_clips() else 1.0
        clips: tuple[float | None, ...] = (0.3, whole) if once is None else (None, once / 2, whole)
        clip = clips[seed // 3 % len(clips)]
        after = replace(case, model=replace(model, clip_qkv=clip))
        return f"clip_qkv={clip}", after, lambda hf: _set_clip(hf, clip)
    ways: tuple[tuple[str, Callable[[Any], None]], ...] = (
        ("attention_dropout", lambda hf: _set_dropout(hf, 0.3)),
        ("scaling", lambda hf: _set_scaling(hf, 0.5)),
        ("inv_freq", lambda hf: turned(hf, 1.5)),
        ("act_fn", lambda hf: _set_activation(hf, torch.nn.Tanh())),
    )
    name, change = ways[seed // 3 % len(ways)]
    return name, case, change


def changed_cases() -> SearchStrategy[Case]:
    """Cases with a dropout, so that a change of it shows in train mode."""
    return cases(models=model_specs(dropouts=DROPS))


@check(
    "configuration.live",
    "A change of what Hugging Face reads at every forward, config.clip_qkv, attention's dropout "
    "and scaling, the rotary frequencies or the MLP's activation, acts on a bridge that has run "
    "before, and on an exactly patched model, as on the reference.",
    changed_cases,
    examples=0.25,
)
def live(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """One change, between two forwards."""
    case = in_one_forward(case)
    name, after, change = _change(case)
    subjects = {"bridged": bridged(case.model, adapter, prepared=case.run.prepared)}
    if case.model.clip_qkv is not None and has_exact(adapter):  # else nothing was to be patched
        subjects["patched"] = patched(case.model, adapter, exact_clip=True)

    def changed(subject: Subject) -> Subject:
        observe(subject, case)
        with torch.no_grad():
            change(subject.model)
        taken = subject.clamps or not subject.under_test
        return replace(subject, clamps=taken and after.model.clip_qkv is not None)

    truth = changed(reference(case.model))
    for kind, subject in subjects.items():
        label = f"{kind}, {name} changed"
        yield from labelled(label, everywhere_gaps(truth, changed(subject), after))
