"""How components are found, and wired to be called alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from conformance.checks.forward import logits_gap
from conformance.checks.registry import Adapter, check
from conformance.checks.support import exact_gaps, turn
from conformance.compare import Gap, compare_parameters
from conformance.observe import observe
from conformance.parts import accessors, parts
from conformance.points import hook_points
from conformance.spec import FLAGS, Case, ModelSpec
from conformance.strategies import WIDE_DTYPES, cases, model_specs
from conformance.subjects import Subject, at_work, bridged, hf_model, make_adapter, reference


@check(
    "components.lookup",
    "For the path of every component and weight the adapter gives the module, and the name, that "
    "Hugging Face has for it, on a bridged model too; of an unknown path an error that names it. "
    "The bridge tells what is in its blocks.",
    cases,
    examples=0.15,
)
def lookup(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Every way to ask, for every path."""
    model = case.model
    plain = hf_model(model)
    bridge = bridged(model, adapter, prepared=case.run.prepared).bridge
    assert bridge is not None
    made = make_adapter(adapter, plain)
    for part in parts(model):
        due = plain.get_submodule(part.module), bridge.get_submodule(part.path)
        with at_work(f"looking up {part.path}"):
            found = {
                "get_component": (made.get_component(plain, part.path), due[0]),
                "get_component, bridged": (made.get_component(bridge, part.path), due[1]),
                "get_remote_component": (made.get_remote_component(plain, part.module), due[0]),
            }
            translated = made.translate_transformer_lens_path(part.path)
            last = made.translate_transformer_lens_path(part.path, last_component_only=True)
            template = made.get_generalized_component(part.path)
        for way, (got, wanted) in found.items():
            if got is not wanted:
                kind = type(got).__name__
                yield Gap(f"{way}({part.path!r})", "contract", f"a {kind}, not {part.module}")
        if (translated, last) != (part.module, part.module.rpartition(".")[2]):
            told = f"{translated} and {last}, not {part.module}"
            yield Gap(f"translate_transformer_lens_path({part.path!r})", "contract", told)
        if not isinstance(template, part.role):
            told = f"a {type(template).__name__}, not a {part.role.__name__}"
            yield Gap(f"get_generalized_component({part.path!r})", "contract", told)
    yield from _structure_gaps(bridge, model)
    for full, name, _ in accessors(model):
        with at_work(f"translating {full}"):
            translated = made.translate_transformer_lens_path(full)
        if translated != name:
            told = f"{translated}, not {name}"
            yield Gap(f"translate_transformer_lens_path({full!r})", "contract", told)
    ways: dict[str, Callable[[str], Any]] = {
        "get_component": lambda path: made.get_component(plain, path),
        "translate_transformer_lens_path": made.translate_transformer_lens_path,
        "get_generalized_component": made.get_generalized_component,
    }
    for way, ask in ways.items():
        for path in ("nothing", "blocks.0.nothing", "blocks.0.attn.nothing"):
            yield from _unknown(f"{way}({path!r})", partial(ask, path))


def _structure_gaps(bridge: Any, model: ModelSpec) -> Iterator[Gap]:
    """What a bridge says of its blocks: all have the same."""
    every = range(model.num_hidden_layers)

    def modules(names: Iterable[str]) -> set[str]:
        return {name for name in names if name != "hook_mlp_in"}  # which 4.3 takes for one

    asked: dict[str, tuple[Callable[[], Any], Any]] = {
        "layer_types": (
            lambda: [modules(kind.split("+")) for kind in bridge.layer_types()],
            [{"attn", "mlp"}] * len(every),
        ),
        "block_submodules": (
            lambda: [modules(bridge.block_submodules(i)) for i in every],
            [{"ln1", "attn", "ln2", "mlp"}] * len(every),
        ),
        "composition_layer_indices": (lambda: bridge.composition_layer_indices(), list(every)),
        "blocks_with('mlp')": (lambda: bridge.blocks_with("mlp"), list(enumerate(bridge.blocks))),
        "blocks_with('nothing')": (lambda: bridge.blocks_with("nothing"), []),
    }
    for name, (ask, due) in asked.items():
        if not hasattr(bridge, name.partition("(")[0]):
            continue  # an older release has none
        with at_work(name):
            got = ask()
        if got != due:
            yield Gap(name, "contract", f"is {got!r:.60} instead of {due!r:.60}")


def _unknown(name: str, ask: Callable[[], Any]) -> Iterator[Gap]:
    try:
        got = ask()
    except (ValueError, AttributeError) as error:
        if "nothing" not in str(error):
            yield Gap(name, "contract", f"the error does not name it: {error}")
    except Exception as error:
        yield Gap(name, "contract", f"{type(error).__name__} instead of a ValueError: {error}")
    else:
        yield Gap(name, "contract", f"gives {got!r:.40} instead of an error")


def _rotations(attention: Any, length: int, dtype: torch.dtype) -> Any:
    """The cosines and sines of the random inputs that an attention offers for itself."""
    return attention.get_random_inputs(2, length, dtype=dtype)["position_embeddings"]


def _surroundings(subject: Subject, model: ModelSpec) -> dict[str, Any]:
    """All of a bridge that wiring may not change."""
    bridge = subject.bridge
    assert bridge is not None
    return {
        "state_dict": list(bridge.state_dict()),  # type: ignore[no-untyped-call]
        "parameters": [id(each) for each in bridge.parameters()],
        "hooks": list(hook_points(subject)),
        "training": {p.path: bridge.get_submodule(p.path).training for p in parts(model)},
        "flags": [getattr(bridge.cfg, flag) for flag in FLAGS],
        "listeners": [len(each.fwd_hooks) for each in hook_points(subject).values()],
    }


@check(
    "components.wiring",
    "setup_component_testing gives the model's rotary embedding to every attention of the bridge "
    "and to the adapter's template, forces eager attention, works without a bridge and twice, and "
    "changes nothing else: a later forward is what it was.",
    lambda: cases(models=model_specs(dtypes=WIDE_DTYPES)),
    examples=0.2,
)
def wiring(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """The model given is another one, with a rotation of its own and another attention."""
    model, length = case.model, case.run.seq_len
    other = replace(model, rope_theta=model.rope_theta * 3)
    given: Any = hf_model(other)
    given.set_attn_implementation("sdpa")
    modules, state = list(given.modules()), {k: v.clone() for k, v in given.state_dict().items()}
    subject = bridged(model, adapter, prepared=case.run.prepared)
    bridge: Any = subject.bridge
    turn(subject, FLAGS[:1], True)
    hook_points(subject)["ln_final.hook_in"].add_hook(lambda tensor, hook: None)
    before, surroundings = observe(subject, case), _surroundings(subject, model)
    dtype = getattr(torch, model.dtype)
    alone: Any = make_adapter(adapter, given)
    with at_work("setup_component_testing"):
        said = [
            bridge.adapter.setup_component_testing(given, bridge_model=bridge),
            bridge.adapter.setup_component_testing(given, bridge),
            alone.setup_component_testing(given),
        ]
    if said != [None] * 3:
        yield Gap("setup_component_testing", "contract", f"returns {said}")
    truth = reference(other).model.model
    # The very one, not a copy of it: all follow its frequencies.
    factor = 1.0 if other.rope_type == "dynamic" else 0.5  # that kind computes them anew
    for rotation in (given.model.rotary_emb, truth.rotary_emb):
        rotation.inv_freq.mul_(factor)
    cos, sin = truth.rotary_emb(given.lm_head.weight, torch.arange(length)[None])
    holders = {f"blocks.{i}.attn": block.attn for i, block in enumerate(bridge.blocks)}
    holders["the template"] = bridge.adapter.get_generalized_component("blocks.0.attn")
    holders["the template without a bridge"] = alone.get_generalized_component("blocks.0.attn")
    for name, attention in holders.items():
        with at_work(f"get_random_inputs of {name}"):
            got = dict(zip(("cos", "sin"), _rotations(attention, length, dtype), strict=True))
        for gap in exact_gaps({"cos": cos, "sin": sin}, got):
            yield replace(gap, site=f"{name}: {gap.site} of the rotary embedding given")
    given.model.rotary_emb.inv_freq.div_(factor)
    layers = [layer.self_attn for layer in given.model.layers]
    for name, config in (("model", given.config), *(("attention", a.config) for a in layers)):
        if config._attn_implementation != "eager":
            told = f"{config._attn_implementation}, not eager"
            yield Gap(f"{name}.config._attn_implementation", "contract", told)
    if list(given.modules()) != modules:
        yield Gap("the model given", "contract", "has other modules than before")
    yield from exact_gaps(state, given.state_dict())
    for name, thing in _surroundings(subject, model).items():
        if thing != surroundings[name]:
            yield Gap(f"the bridge's {name}", "contract", "not as before")
    after = observe(subject, case)
    yield from logits_gap(before, after, "logits after setup_component_testing")
    yield from compare_parameters(before, after)
    with at_work("bridging after setup_component_testing without a bridge"):
        parameters = dict(given.named_parameters())
        late = TransformerBridge(given, alone, None)
    wired = Subject(given, parameters, bridge=late, optional_hooks=subject.optional_hooks)
    expected = observe(reference(other), case, backward=False)
    actual = observe(wired, case, backward=False)
    yield from logits_gap(expected, actual, "logits of a bridge with a wired template")
