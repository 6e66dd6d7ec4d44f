"""What a script does once the models are built, where that is a forward and a backward of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from conformance.compare import Gap
from conformance.reproduce import text
from conformance.reproduce.places import NoTemplateError, Place, edit_function, imports
from conformance.sites import Site, observable
from conformance.spec import Case
from conformance.verdict import Outcome, Verdict


@dataclass(frozen=True)
class Act:
    """The lines of a script that are the template's own.

    Attributes:
        lines: Them.
        imports: What they need beside torch, by module.
        modules: Modules of the standard library that they need.
        feeds: Whether they need tokens.
    """

    lines: list[str]
    imports: dict[str, list[str]] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    feeds: bool = True


# Several acts are choices: the first whose script is short enough is taken.
Template = Callable[[Case, Verdict], Act | Iterator[Act]]
TEMPLATES: dict[str, Template] = {}


_Function = TypeVar("_Function", bound=Template)


def template(*checks: str) -> Callable[[_Function], _Function]:
    """Register a function as the template of some checks."""

    def register(function: _Function) -> _Function:
        TEMPLATES.update(dict.fromkeys(checks, function))
        return function

    return register


def bare(site: str) -> str:
    """A gap's site without what a check puts before or behind it."""
    return site.rpartition(": ")[2].partition("#")[0].partition(" under ")[0]


def _edits(case: Case) -> list[str]:
    """The case's edit, on both models."""
    if not case.run.edits:
        return []
    if len(case.run.edits) > 1:
        raise NoTemplateError("it has more than one edit")
    (edit,) = case.run.edits
    site = observable(case.model).get(edit.site)
    if site is None:
        raise NoTemplateError(f"{edit.site} fires under a flag")
    lines = edit_function(edit, site)
    hook = f'bridge.hook_dict["{edit.site}"].add_hook(lambda x, hook: edit(x))'
    if edit.kind == "in_place":
        lines += ["def in_place(x, hook):", "    x.copy_(edit(x))"]
        hook = f'bridge.hook_dict["{edit.site}"].add_hook(in_place)'
    return [*lines, *Place(site, case.model).edited(), hook]


def _of_logits(case: Case) -> list[str]:
    return [*text.run_model(case), *text.run_bridge(case), *text.verdict("logits")]


def _of_parameter(case: Case, name: str) -> list[str]:
    return [
        *text.run_model(case, "", ".sum().backward()"),
        *text.run_bridge(case, "", ".sum().backward()"),
        f'index = [name for name, _ in model.named_parameters()].index("{name}")',
        "both = (model, bridge.original_model)",
        "due, got = (list(each.parameters())[index].grad for each in both)",
        *text.verdict(f"gradient of {name}"),
    ]


def _of_site(case: Case, gap: Gap, site: Site) -> list[str]:
    """The value at a site, or its gradient, on both models."""
    place, hook = Place(site, case.model), f'bridge.hook_dict["{site.name}"].add_hook'
    shapes = gap.kind == "shape"
    if gap.kind == "gradient":
        return [
            *place.gradient(),
            f'{hook}(lambda grad, hook: seen.append(grad.clone()) or None, dir="bwd")',
            *text.run_model(case, "", ".sum().backward()"),
            *text.run_bridge(case, "", ".sum().backward()"),
            "due, got = seen",
            *text.verdict(f"gradient at {site.name}"),
        ]
    return [
        *place.value(),
        f"{hook}(lambda x, hook: see(x))",
        *text.run_model(case, ""),
        *text.run_bridge(case, ""),
        "due, got = seen",
        *text.verdict(site.name, shapes=shapes, allowed=1e-4 if site.derived else 0),
    ]


def _shown(case: Case, gap: Gap) -> list[str]:
    """How to show one gap of a forward and backward."""
    name, sites = bare(gap.site), observable(case.model)
    if name == "logits":
        return _of_logits(case)
    if name in sites and gap.kind in ("value", "dtype", "shape", "gradient"):
        return _of_site(case, gap, sites[name])
    if gap.kind == "gradient" and name.endswith((".weight", ".bias")):
        return _of_parameter(case, name)
    raise NoTemplateError(f"{gap.site}: {gap.kind}")


def crash(case: Case) -> list[str]:
    """A forward that the bridge does not survive: the traceback is what there is to see."""
    said = 'print("expected logits, as of Hugging Face\'s model:", due)'
    return [*text.run_model(case), said, *text.run_bridge(case)]


@template(
    "biases.forward",
    "clamp.kink",
    "forward.logits",
    "gradients.everywhere",
    "gradients.full_backward_hooks",
    "gradients.parameters",
    "hooks.gradients",
    "hooks.values",
    "interventions.in_place",
    "interventions.returned",
    "layernorm.edits",
    "precision.everywhere",
)
def run(case: Case, verdict: Verdict) -> Iterator[Act]:
    """A forward and backward of both models: any gap that can be seen from outside, in order."""
    if case.run.chunks > 1:
        raise NoTemplateError("it is fed in chunks")
    before = _edits(case)
    if verdict.outcome is Outcome.ERRORED:
        yield Act([*before, *crash(case)], imports(before))
    for gap in verdict.gaps:
        with suppress(NoTemplateError):
            lines = [*before, *_shown(case, gap)]
            yield Act(lines, imports(lines))
