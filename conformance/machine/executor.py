"""A bridge under test beside the state that it should be in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

from conformance.edits import edited
from conformance.fields import SpecError
from conformance.machine.state import Hook, State, fresh
from conformance.observe import observe, started
from conformance.points import canonical_points
from conformance.recorder import Observation, Recorder
from conformance.sites import Site, observable, sites
from conformance.spec import MAX_SEED, Case, Edit, Step, blinds
from conformance.subjects import Subject, bridged
from conformance.taps import TappedCache, Taps

# How the wrapping of a bridge shows in the names of its parameters.
_WRAPPED = "._original_component"

HookFunction = Callable[..., "torch.Tensor | None"]


@dataclass(frozen=True)
class Original:
    """What a deep copy was made of: it must stay as it was.

    Attributes:
        bridge: The bridge.
        state: Its state, from now on.
        case: A run of it.
        logits: What that gives.
    """

    bridge: TransformerBridge
    state: State
    case: Case
    logits: torch.Tensor


class _Chains(Recorder):
    """Performs all edits of a site, one after the other, where a plain one knows the last."""

    def begin(self, case: Case) -> None:
        """Sort the run's edits."""
        super().begin(case)
        self._chains = {name: [e for e in case.run.edits if e.site == name] for name in self.edits}

    def edit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor that all edits of a site leave."""
        for edit in self._chains.get(name, ()):
            tensor = edited(edit, tensor)
        return tensor


def named_parameters(bridge: TransformerBridge) -> dict[str, nn.Parameter]:
    """A bridge's parameters under Hugging Face's names."""
    return {name.replace(_WRAPPED, ""): held for name, held in bridge.named_parameters()}


class Machine:
    """One bridge, taken from step to step (see `conformance.machine.moves.take`).

    Args:
        adapter: The adapter class under test.
        case: The model, and the run whose sizes bound every input. Its steps are not taken.

    Attributes:
        bridge: The bridge under test.
        state: The state that it should be in.
        taken: The steps so far.
        heard: Each firing of a hook of the state, with what a backward one saw.
        sites: What a plain forward must fire.
        known: What an OLMo of this size can fire at all.
        bare: How many hooks each hook point had when the bridge was built.
        original: What the bridge is a deep copy of.
        kept: What that was copied from, and so on.
    """

    def __init__(self, adapter: type[ArchitectureAdapter], case: Case) -> None:
        self.adapter, self.case = adapter, case
        built = bridged(case.model, adapter, prepared=case.run.prepared)
        assert built.bridge is not None
        self.bridge: TransformerBridge = built.bridge
        weights = {name: weight.detach().clone() for name, weight in built.parameters.items()}
        self.state = State(case.model, weights)
        self.taken: list[Step] = []
        self.heard: list[tuple[Hook, torch.Tensor | None]] = []
        self.known: dict[str, Site] = sites(case.model)
        self.sites: dict[str, Site] = observable(case.model, built.optional_hooks)
        self.bare = self.hook_counts(self.bridge)
        self.original: Original | None = None
        self.kept: list[TransformerBridge] = []
        self._truth: tuple[State, Subject] | None = None
        self._shown: tuple[State, Case, Observation] | None = None

    def now(self, **changed: Any) -> None:
        """Change the state."""
        self.state = replace(self.state, **changed)

    def as_subject(self, bridge: TransformerBridge) -> Subject:
        """A bridge as a subject whose gradients are left to accumulate."""
        declared = tuple(getattr(self.adapter, "optional_hooks", ()))
        model: Any = bridge.original_model
        return Subject(model, {}, bridge=bridge, optional_hooks=declared)

    @property
    def subject(self) -> Subject:
        """The bridge under test as a subject."""
        return self.as_subject(self.bridge)

    def gradients(self) -> dict[str, torch.Tensor | None]:
        """The bridge's gradients as they are now."""
        held = named_parameters(self.bridge).items()
        return {name: None if p.grad is None else p.grad.detach().clone() for name, p in held}

    def truth(self) -> Subject:
        """A fresh reference in the state, kept while nothing that it is made of has changed."""
        kept, state = self._truth, self.state
        parts = ("weights", "frozen", "casts")
        if kept is None or any(getattr(kept[0], p) is not getattr(state, p) for p in parts):
            kept = self._truth = (state, fresh(state))
        return kept[1]

    @property
    def news(self) -> bool:
        """Whether the state has changed since it was last `shown`."""
        return self._shown is None or self._shown[0] is not self.state

    def shown(self) -> tuple[Case, Observation]:
        """A run, and all that the reference shows in it; the same until the state changes."""
        kept = self._shown
        if kept is None or self.news:
            case = self.probe(len(self.taken))
            kept = self._shown = (self.state, case, self.expected(case, looks=True))
        return kept[1:]

    def probe(self, seed: int) -> Case:
        """A run of the bridge. Other tokens each time, and now and then fewer rows or positions.

        No query is left without a key where that is beyond comparison: Hugging Face's float64 model
        makes NaN of it, and in compatibility mode its pattern is zero.
        """
        run, padding = self.case.run, self.case.run.padding
        length = max(run.seq_len - (seed % 3 == 2), 1)
        if blinds(padding, length) and (self.state.compatible or self.state.dtype == "float64"):
            padding = "right"
        run = replace(
            run,
            token_seed=(run.token_seed + seed) % MAX_SEED,
            batch=1 if seed % 3 == 1 else run.batch,
            seq_len=length,
            padding=padding,
            chunks=1,
            training=self.state.training,
            edits=(),
            steps=(),
        )
        return Case(model=self.case.model, run=run)

    def _as_reference(self, case: Case, *more: Hook) -> Case:
        """The same run with the edits that the hooks, and some more, make on the reference."""
        hooked = replace(self.state, hooks=(*self.state.hooks, *more))
        return replace(case, run=replace(case.run, edits=hooked.edits))

    def expected(
        self, case: Case, *more: Hook, looks: bool = False, backward: bool = False
    ) -> Observation:
        """The reference under the edits of the state's hooks, and of some more.

        Args:
            case: The run.
            more: Further hooks.
            looks: Whether values and gradients of the sites are wanted.
            backward: Whether gradients are.
        """
        case = self._as_reference(case, *more)
        sites = self.sites if looks or case.run.edits else None
        return observe(self.truth(), case, sites=sites, backward=backward, recorder=_Chains())

    @contextmanager
    def tapped(self, case: Case) -> Iterator[tuple[Any, Callable[[], TappedCache]]]:
        """The reference under the hooks of the state, to be called in other ways than `observe`'s.

        Yields:
            The model, and what makes the caches that it must be given: they see the keys.
        """
        case, truth, recorder = self._as_reference(case), self.truth(), _Chains()
        recorder.begin(case)
        model, d_head, clamps = truth.model, case.model.d_head, truth.clamps
        taps = Taps(model, self.sites, recorder.visit, d_head=d_head, clamps=clamps)
        taps.cached = True
        with taps.attached(), started(truth, case), torch.no_grad():
            yield model, partial(TappedCache, taps, config=model.config)

    def fires(self, name: str) -> bool:
        """Whether a forward of the bridge fires a site in the state.

        Raises:
            SpecError: If no OLMo of this size has it.
        """
        if name not in self.known:
            allowed = f"a hook of an OLMo of {self.case.model.num_hidden_layers} layers"
            raise SpecError("site", name, allowed)
        return name in self.sites or self.known[name].flag in self.state.flags

    def hook_of(self, step: Step, **how: bool) -> Hook:
        """The hook that a step is about. On the copies of single heads it only looks."""
        looks = self.known[step.site].flag not in ("", "use_hook_mlp_in")
        kind = "identity" if looks else step.edit
        return Hook(step.site, Edit(site=step.site, kind=kind, seed=step.seed), **how)

    def function_of(self, held: Hook) -> HookFunction:
        """A hook as the function that a bridge takes."""

        def function(tensor: torch.Tensor, hook: HookPoint) -> torch.Tensor | None:
            self.heard.append((held, tensor.detach().clone() if held.backward else None))
            if held.backward:
                return None
            new = edited(held.edit, tensor)
            if held.edit.kind != "in_place":
                return new
            tensor.copy_(new)
            return None

        return function

    def point(self, site: str) -> HookPoint:
        """The bridge's hook point of a site."""
        return canonical_points(self.bridge, self.known)[site]

    def name_of(self, site: str, seed: int) -> str:
        """One of the names of a site: the canonical one for seed 0."""
        names = (site, *self.known[site].aliases)
        return names[seed % len(names)]

    def hook_counts(self, bridge: TransformerBridge) -> dict[str, tuple[int, int, int, int]]:
        """How many hooks each hook point has, as transformer_lens and as PyTorch keep them."""
        points = canonical_points(bridge, self.known).items()
        return {
            name: (
                *(len(point.fwd_hooks), len(point.bwd_hooks)),
                len(point._forward_hooks),
                len(point._backward_hooks) + len(point._backward_pre_hooks),
            )
            for name, point in points
        }
