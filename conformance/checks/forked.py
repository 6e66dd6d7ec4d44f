"""A bridge under flags, and beside it the reference, led through copies where the flags ask."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from transformer_lens.hook_points import HookPoint

from conformance.checks.gates import FORKS, OTHERS
from conformance.checks.registry import Adapter
from conformance.checks.support import bridge_of, drawing, turn
from conformance.compare import Gap, compare_gradients, compare_parameters, compare_values, labelled
from conformance.edits import edited_head
from conformance.forks import Forks
from conformance.observe import observe, sites_of
from conformance.recorder import Observation, Recorder
from conformance.sites import Site, behind_flags, sites
from conformance.spec import Case, Edit
from conformance.subjects import Subject, at_work, reference
from conformance.tolerance import Allowance, of_sum

_KINDS = ("zero", "scale", "noise")


def is_exact(adapter: Adapter) -> bool:
    """Whether an adapter declares that its flags change no bit where nothing is edited."""
    return bool(getattr(adapter, "exact_flags", False))


def without_edits(case: Case) -> Case:
    """The same case with nothing edited."""
    return replace(case, run=replace(case.run, edits=()))


def under_flags(
    case: Case, draw: Callable[[int], int], blocks: Collection[int] | None = None
) -> Case:
    """The same case under drawn flags, with an edit behind each of them and no other.

    Args:
        case: The case.
        draw: Draws whole numbers below a bound.
        blocks: Those that are edited; None for all.
    """
    flags = (*FORKS[draw(len(FORKS))], *OTHERS[1 + draw(len(OTHERS) - 1)])
    made = []
    for flag in flags:
        behind = behind_flags(case.model, [flag])
        sites = [name for name in behind if blocks is None or int(name.split(".")[1]) in blocks]
        kind, site = _KINDS[draw(len(_KINDS))], sites[draw(len(sites))]
        made.append(Edit(site=site, kind=kind, seed=draw(2**16)))
    return replace(case, run=replace(case.run, flags=flags, edits=tuple(made)))


def firing(subject: Subject, case: Case) -> dict[str, Site]:
    """Every site that fires under the flags of a case, in the order of execution."""
    there = {**sites_of(subject, case), **behind_flags(case.model, case.run.flags)}
    return {name: site for name, site in sites(case.model).items() if name in there}


def edit_behind_flags(subject: Subject, case: Case) -> None:
    """Perform the edits of a case at hooks of a bridge. `observe` removes them."""

    def hook_of(edit: Edit) -> Callable[..., torch.Tensor | None]:
        def hook(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor | None:
            new = edited_head(edit, tensor)
            if edit.kind != "in_place":
                return new
            tensor.copy_(new)
            return None

        return hook

    assert subject.bridge is not None
    for edit in case.run.edits:
        with at_work(f"adding a hook at {edit.site}"):
            # By this name: in compatibility mode a hook point's own is a legacy one.
            subject.bridge.hook_dict[edit.site].add_hook(hook_of(edit))


def led_allowances(forks: Forks, case: Case) -> dict[str, Allowance]:
    """The allowances of values that were computed through copies in the model's dtype."""
    dtype = getattr(torch, case.model.dtype)
    return {name: of_sum(dtype, size) for name, size in forks.sizes.items()}


class _Returning(Recorder):
    """Returns other gradients behind flags than those that it was given."""

    edits_gradients = True

    def __init__(self, edits: Collection[Edit]) -> None:
        self.gradient_edits = {edit.site: edit for edit in edits}

    def gradient(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Keep a gradient as it comes, and send on an edited one."""
        super().gradient(name, tensor)
        edit = self.gradient_edits.get(name)
        return None if edit is None else edited_head(edit, tensor)


@dataclass(frozen=True)
class Pair:
    """What a bridge under flags showed, and what it should have.

    Attributes:
        expected: The reference's, of every site, those behind the flags included.
        actual: The bridge's.
        firing: Every site that fires.
        comparable: The sites whose gradients can be compared.
        values: Allowances of values.
        gradients: Allowances of gradients at sites.
        parameters: Allowances of gradients of parameters.
    """

    expected: Observation
    actual: Observation
    firing: Mapping[str, Site]
    comparable: Mapping[str, Site]
    values: Mapping[str, Allowance]
    gradients: Mapping[str, Allowance]
    parameters: Mapping[str, Allowance]

    def gaps(self) -> Iterator[Gap]:
        """Everything, in the order of execution."""
        yield from compare_values(self.expected, self.actual, self.firing, allowances=self.values)
        if self.actual.parameter_gradients:
            yield from compare_gradients(
                self.expected, self.actual, self.comparable, self.gradients
            )
            yield from compare_parameters(self.expected, self.actual, self.parameters)


def paired(
    adapter: Adapter,
    subject: Subject,
    case: Case,
    *,
    backward: bool = True,
    dtype: torch.dtype | None = None,
    of_gradients: Collection[Edit] = (),
) -> Pair:
    """Run a bridge, its flags on, and the reference, both with the case's edits behind the flags.

    Args:
        adapter: The bridge's.
        subject: The bridge.
        case: What runs.
        backward: Go backwards, if the run is in one chunk and no edit in place.
        dtype: What is computed in; None for the model's.
        of_gradients: Edits of gradients behind the flags. They make none greater.
    """
    backward &= case.run.chunks == 1 and all(edit.kind != "in_place" for edit in case.run.edits)
    exact, bare, every = is_exact(adapter), without_edits(case), firing(subject, case)
    plain = {name: site for name, site in every.items() if not site.flag}
    edit_behind_flags(subject, case)
    watched = {name: site for name, site in every.items() if not site.derived}
    recorder = _Returning(of_gradients)
    actual = observe(subject, bare, sites=watched, backward=backward, recorder=recorder)
    truth, pure = reference(case.model), exact and not case.run.edits and not of_gradients
    everywhere = pure or not exact
    forks = Forks(
        case, truth, actual, exact=exact, everywhere=everywhere, of_gradients=of_gradients
    )
    expected = observe(truth, bare, sites=plain, backward=backward, recorder=forks)
    if pure:  # then copies are for what only they have
        untouched = observe(truth, bare, sites=plain, backward=backward)
        expected = replace(
            untouched,
            values={**expected.values, **untouched.values},
            gradients={**expected.gradients, **untouched.gradients},
        )

    def allowed(sizes: Mapping[str, float], through_norm: bool = False) -> dict[str, Allowance]:
        rounded = dtype or getattr(torch, case.model.dtype)
        return {
            name: of_sum(rounded, size, through_norm=through_norm)
            for name, size in sizes.items()
            if not pure or name.partition("#")[0] in forks.gates
        }

    return Pair(
        expected,
        actual,
        every,
        {name: site for name, site in watched.items() if pure or forks.has_gradient(name)},
        allowed(forks.sizes),
        allowed(forks.gradient_sizes, through_norm=True),
        allowed(forks.parameter_sizes),
    )


def behind_flags_too(
    adapter: Adapter,
    subject: Subject,
    case: Case,
    *,
    backward: bool = True,
    dtype: torch.dtype | None = None,
    passing: bool = False,
) -> Iterator[Gap]:
    """A third of the cases: what edits behind drawn flags come to, however the bridge is run.

    Only of adapters that declare exact flags: what those of others do `flags.edits` says. Where
    something is computed again, hooks may fire again.

    Args:
        adapter: As in `paired`.
        subject: As in `paired`.
        case: As in `paired`.
        backward: As in `paired`.
        dtype: As in `paired`.
        passing: A hook behind the last block turns the flags off.
    """
    draw = drawing(case)
    if draw(3) or not is_exact(adapter):
        return
    case = under_flags(case, draw)
    flags = case.run.flags
    turn(subject, flags, True)
    if passing:
        last = bridge_of(subject).hook_dict["ln_final.hook_out"]
        last.add_hook(lambda tensor, hook: turn(subject, flags, False))
    pair = paired(adapter, subject, case, backward=backward, dtype=dtype)
    if passing:
        last.remove_hooks()
    once = replace(pair.actual, fired=tuple(dict.fromkeys(pair.actual.fired)))
    turn(subject, flags, False)
    for edit in case.run.edits:
        bridge_of(subject).hook_dict[edit.site].remove_hooks()
    yield from labelled(f"under {', '.join(flags)}", replace(pair, actual=once).gaps())


def edited_gaps(
    adapter: Adapter, subject: Subject, case: Case, of_gradients: Collection[Edit] = ()
) -> Iterator[Gap]:
    """What edits behind flags come to. What goes silent is for `flags.hooks` to say."""
    edited = {edit.site for edit in (*case.run.edits, *of_gradients)}
    gaps = paired(adapter, subject, case, of_gradients=of_gradients).gaps()
    yield from (gap for gap in gaps if gap.kind != "missing" or gap.site in edited)
