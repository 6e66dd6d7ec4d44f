"""The adapter class itself: how it is made, what it says, and the ways to get a bridge with it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from hypothesis import strategies as st
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

from conformance.checks.forward import logits_gap
from conformance.checks.registry import Adapter, check
from conformance.checks.script import script
from conformance.checks.support import registry
from conformance.compare import Gap
from conformance.observe import observe
from conformance.parts import TABLE, accessors
from conformance.spec import Case
from conformance.strategies import cases, model_specs
from conformance.subjects import (
    ARCHITECTURE,
    Subject,
    at_work,
    bridged,
    hf_model,
    lens_config,
    make_adapter,
    reference,
)
from conformance.verdict import NotApplicable

# What the contract says of OLMo v1, in transformer_lens' words.
FLAGS = {
    "normalization_type": "LN",
    "positional_embedding_type": "rotary",
    "final_rms": False,
    "uses_rms_norm": False,
    "gated_mlp": True,
    "attn_only": False,
    "attn_implementation": "eager",
}

# Of these transformer_lens' translation knows too little, or a bridge tells them later.
NOT_TRANSLATED = {
    *("clip_qkv", "attention_dropout", "rotary_base", "d_head", "n_key_value_heads"),
    *("tie_word_embeddings", "d_vocab_out", "device", "n_params"),
}


def is_told(name: str, translated: Any) -> bool:
    """Whether transformer_lens' translation says something that an adapter may not change."""
    return name not in NOT_TRANSLATED and translated not in (None, -1)


OPTIONAL_PARAMETERS = (
    "blocks.{i}.attn.b_Q",
    "blocks.{i}.attn.b_K",
    "blocks.{i}.attn.b_V",
    "blocks.{i}.attn.b_O",
    "blocks.{i}.mlp.b_in",
    "blocks.{i}.mlp.b_gate",
    "blocks.{i}.mlp.b_out",
)


def _signature(call: Any, required: list[str], optional: Mapping[str, Any]) -> str:
    """What is wrong with a signature, in words; empty if it can be called as documented."""
    given = inspect.signature(call).parameters
    must = [n for n, p in given.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if must != required and len(must) != len(required):
        return f"requires {must} instead of {required}"
    for name, default in optional.items():
        if name not in given or given[name].default != default:
            return f"has no {name}={default}"
    return ""


def _mapped(components: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every component of a map by its path, as `conformance.parts.TABLE` has it."""
    found = {}
    for name, component in components.items():
        path = f"{prefix}{name}" + (".{i}" if component.is_list_item else "")
        found[path] = component
        found |= _mapped(component.submodules, f"{path}.")
    return found


def _template_paths() -> dict[str, tuple[type, str]]:
    """The role and Hugging Face's name, below its parent, of every component, by its path."""
    full = {part.path: part.module.replace(".{i}", "") for part in TABLE}
    found = {}
    for part in TABLE:
        parent = full.get(part.path.rpartition(".")[0], "")
        name = full[part.path].removeprefix(f"{parent}.") if parent else full[part.path]
        found[part.path] = (part.role, name)
    return found


@check(
    "surface.constructor",
    "The adapter is made of a configuration, which it keeps and completes: a LayerNorm, rotary "
    "positions, a gated MLP, eager attention, and all else as it was; it supports what a bridge "
    "can do; its component map has each of OLMo's components, of the right kind, where Hugging "
    "Face has it, and no other; two adapters share nothing.",
    cases,
    examples=0.2,
)
def constructor(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """No bridge is needed for any of it."""
    with at_work("reading the constructor's signature"):
        if wrong := _signature(adapter, ["cfg"], {}):
            yield Gap(f"{adapter.__name__}()", "contract", wrong)
    config = lens_config(hf_model(case.model))
    with at_work("constructing the adapter"):
        made: Any = adapter(config)
        other: Any = adapter(lens_config(hf_model(case.model)))
    if made.cfg is not config:
        yield Gap("cfg", "contract", "not the configuration that was given")
    for name, due in {**vars(lens_config(hf_model(case.model))), **FLAGS}.items():
        got = getattr(made.cfg, name, "absent")
        if got != due and is_told(name, due):
            yield Gap(f"cfg.{name}", "contract", f"{got!r} instead of {due!r}")
    for name in vars(ArchitectureAdapter):
        if name.startswith("supports_") and not getattr(made, name, False):
            yield Gap(name, "contract", "OLMo does")
    with at_work("reading the component map"):
        mapped, twin = _mapped(made.get_component_mapping()), _mapped(other.component_mapping)
    due_paths = _template_paths()
    for path in dict.fromkeys((*due_paths, *mapped)):
        if path not in mapped or path not in due_paths:
            kind = "missing" if path not in mapped else "extra"
            yield Gap(path, kind, "in the component map")
            continue
        role, name = due_paths[path]
        component = mapped[path]
        if not isinstance(component, role):
            told = f"a {type(component).__name__}, not a {role.__name__}"
            yield Gap(path, "contract", told)
        if component.name != name:
            yield Gap(path, "contract", f"looks for {component.name!r}, not {name!r}")
        if component is twin[path]:
            yield Gap(path, "contract", "one component in the maps of two adapters")


@check(
    "surface.methods",
    "prepare_model(hf_model), with exact_clip=False where there is an exact mode, and "
    "setup_component_testing(hf_model, bridge_model=None) can be called so, and return nothing.",
    cases,
    examples=0.1,
)
def methods(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Called by position and by keyword."""
    model = hf_model(case.model)
    made: Any = make_adapter(adapter, model)
    modes = inspect.signature(made.prepare_model).parameters.keys() & {"exact_clip"}
    optional: dict[str, dict[str, Any]] = {
        "prepare_model": dict.fromkeys(modes, False),
        "setup_component_testing": {"bridge_model": None},
    }
    for name, defaults in optional.items():
        method = getattr(made, name)
        if wrong := _signature(method, ["hf_model"], defaults):
            yield Gap(name, "contract", wrong)
            continue
        with at_work(f"calling {name}"):
            said = [method(model), method(hf_model=model, **defaults)]
        if said != [None, None]:
            yield Gap(name, "contract", f"returns {said}")


@check(
    "surface.optional_parameters",
    "The adapter lists the parameters that may be missing, as data: the four biases of attention "
    "and the three of the MLP, under the names that it finds Hugging Face's by.",
    cases,
    examples=0.05,
)
def optional_parameters(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """On the class, on an instance, and in its package where that has the list too."""
    if not hasattr(adapter, "optional_parameters"):
        raise NotApplicable("the adapter has no list optional_parameters")
    made: Any = make_adapter(adapter, hf_model(case.model))
    lists = {
        f"{adapter.__name__}.optional_parameters": adapter.optional_parameters,
        "optional_parameters of an instance": made.optional_parameters,
    }
    package = _package(adapter)
    if hasattr(package, "OPTIONAL_PARAMETERS"):
        lists[f"{package.__name__}.OPTIONAL_PARAMETERS"] = package.OPTIONAL_PARAMETERS
    for name, found in lists.items():
        if sorted(found) != sorted(OPTIONAL_PARAMETERS):
            wrong = sorted(set(found) ^ set(OPTIONAL_PARAMETERS)) or "one of them twice"
            yield Gap(name, "contract", f"not the seven: {wrong}")
    sources = {full: name for full, name, _ in accessors(case.model)}
    for pattern in OPTIONAL_PARAMETERS:
        path = pattern.replace("{i}", "0")
        with at_work(f"translating {path}"):
            got = made.translate_transformer_lens_path(path)
        if got != sources[path]:
            yield Gap(pattern, "contract", f"is {got} of Hugging Face's, not {sources[path]}")


def _package(adapter: Adapter) -> ModuleType:
    return sys.modules[adapter.__module__.partition(".")[0]]


@check(
    "surface.entrances",
    "The package's bridge(hf_model) wraps that very model, exactly, with a tokenizer if there is "
    "one, whose padding side stays, with a cfg of its own, and registers nothing; after its "
    "register(), once or twice, and not before, transformer_lens builds every OLMo with this "
    "adapter.",
    lambda: cases(models=model_specs(ties=st.sampled_from((False, True)))),
    examples=0.2,
)
def entrances(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The registry belongs to the process: it is put back."""
    package: Any = _package(adapter)
    if not callable(getattr(package, "bridge", None)) or not hasattr(package, "register"):
        raise NotApplicable(f"{package.__name__} has no bridge() and register() of its own")
    expected = observe(reference(case.model), case, backward=False)
    with registry() as adapters:
        before = dict(adapters)
        if before[ARCHITECTURE] is adapter:
            yield Gap("import", "contract", "has registered the adapter")
        bridged(case.model, adapter, prepared=case.run.prepared)
        model, told = hf_model(case.model), script(case)
        parameters = list(model.parameters())
        tokenizer = told.tokenizer() if case.run.token_seed % 4 else None
        with at_work("bridge(hf_model)"):
            bridge, twin = package.bridge(model, tokenizer), package.bridge(hf_model(case.model))
        if adapters != before:
            yield Gap("bridge(hf_model)", "contract", "has registered something")
        with at_work("register()"):
            for _ in range(1 + case.run.token_seed % 3):
                package.register()
        changed = {name for name in adapters if adapters[name] is not before.get(name)}
        if changed != {ARCHITECTURE}:
            yield Gap("register()", "contract", f"has registered {sorted(changed)}")
        other = hf_model(case.model)
        with at_work("building a bridge after register()"):
            from transformer_lens.model_bridge.sources._bridge_builder import (  # since 3.5
                build_bridge_from_module,
            )

            booted = build_bridge_from_module(other, ARCHITECTURE, hf_config=other.config)
    for name, its_model, found in (
        ("bridge(hf_model)", model, bridge),
        ("a bridge after register()", other, booted),
    ):
        if not isinstance(found, TransformerBridge) or type(found.adapter) is not adapter:
            yield Gap(name, "contract", f"a {type(found).__name__}, of another adapter")
            return
        if found.original_model is not its_model:
            yield Gap(name, "contract", "does not wrap the model that was given")
        actual = observe(Subject(its_model, {}, bridge=found), case, backward=False)
        yield from logits_gap(expected, actual, f"logits of {name}")
    if [id(each) for each in bridge.parameters()] != [id(each) for each in parameters]:
        yield Gap("bridge(hf_model)", "contract", "has other parameters than the model had")
    where = torch.device(bridge.cfg.device or "meta")
    if (bridge.cfg.dtype, where) != (parameters[0].dtype, parameters[0].device):
        said = f"says {bridge.cfg.dtype} on {bridge.cfg.device}"
        yield Gap("bridge(hf_model).cfg", "contract", said)
    if bridge.cfg is twin.cfg:
        yield Gap("bridge(hf_model).cfg", "contract", "is that of the bridge of another model")
    if tokenizer is not None:
        if bridge.tokenizer.padding_side != told.own_side:
            yield Gap("padding_side", "contract", f"is no longer the tokenizer's {told.own_side}")
        text, row = told.texts[0], told.rows()[0]
        with at_work("reading a text"):
            got = bridge.to_tokens(text, prepend_bos=told.prepend)[0].tolist()
        if got != row:
            yield Gap(f"to_tokens({text!r})", "contract", f"{got} instead of {row}")
