"""Hooks at every step of a generation, and what a generation leaves behind: nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from transformer_lens.hook_points import HookPoint
from transformers import Cache

from conformance.checks.chunks import hooks_at, tapping
from conformance.checks.forked import (
    edit_behind_flags,
    firing,
    is_exact,
    led_allowances,
    under_flags,
    without_edits,
)
from conformance.checks.generation import (
    bridge_options,
    by_bridge,
    by_hf_generate,
    by_hugging_face,
    differing_texts,
    generating,
    generating_runs,
    steps_of,
)
from conformance.checks.interventions import edited_runs
from conformance.checks.registry import Adapter, check
from conformance.checks.support import bridge_of, drawing, turn
from conformance.compare import Gap, bitwise, compare_values
from conformance.forks import Forks
from conformance.inputs import Inputs, inputs
from conformance.observe import sites_of
from conformance.points import OnPurposeError, hook_points
from conformance.recorder import Observation, Recorder
from conformance.spec import Case, ModelSpec, RunSpec
from conformance.strategies import cases, model_specs
from conformance.subjects import Subject, at_work, reference

FIRST = "embed.hook_in"  # of every forward
_NOTHING = torch.empty(0)


class StepRecorder(Recorder):
    """A recorder to which every forward is a chunk of its own."""

    def begin(self, case: Case) -> None:
        """Forget the last run; the next forward is the first."""
        super().begin(case)
        self.chunk, self.rows = -1, case.run.batch

    def edit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """As a recorder does, of the rotation row by row."""
        return super().edit(name, self._by_row(name, tensor)) if name in self.edits else tensor

    def value(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a site's tensor as one of this step's."""
        self.chunk += name == FIRST
        super().value(name, self._by_row(name, tensor))

    def _by_row(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """One row of cosines or positions may stand for all rows, where they have the same."""
        one_for_all = name.endswith(("hook_cos", "hook_sin")) and tensor.shape[0] == 1
        return tensor.expand(self.rows, *tensor.shape[1:]) if one_for_all else tensor


class _Led(Forks, StepRecorder):
    """Of a reference that generates while it is led through copies."""


def edited_generations() -> SearchStrategy[Case]:
    """Generations under one or two edits."""

    def runs(model: ModelSpec) -> SearchStrategy[RunSpec]:
        return generating_runs(model, edits=edited_runs(model).map(lambda run: run.edits))

    return cases(runs=runs)


@check(
    "generation.hooks",
    "During a generation, by generate or hf_generate, every hook fires once at each step, and sees "
    "what Hugging Face's model computes there at that step; an edit, behind a flag too, changes "
    "all steps' logits and tokens as it does there, also where a hook generates.",
    edited_generations,
    examples=0.35,
)
def hooks(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Hugging Face's own generate, tapped and edited from outside, beside the bridge's.

    Of adapters that declare exact flags, a third of the cases are under some. In half of
    them a hook generates, too.
    """
    data, draw = inputs(case), drawing(case)
    by = by_hf_generate if draw(2) else by_bridge
    # Of dynamic RoPE, which remembers lengths, another generation would change this one.
    if within := draw(2) == 0 and case.model.rope_type != "dynamic":
        by = by_bridge
    subject = generating(case, adapter)
    plain, bare = sites_of(subject, case), case
    if is_exact(adapter) and draw(3) == 0:
        case = under_flags(case, draw)
        bare = without_edits(case)
        turn(subject, case.run.flags, True)
        edit_behind_flags(subject, case)
    sites, ours = firing(subject, case), StepRecorder()
    ours.begin(bare)
    listening = hooks_at(sites, ours)
    if within:
        listening.insert(0, (FIRST, _generating(subject, bare, data, ours)))
    with bridge_of(subject).hooks(fwd_hooks=listening):
        actual = by(subject, bare, data)
    seen = Observation(_NOTHING, ours.values, fired=tuple(ours.fired))
    theirs = _Led(case, reference(case.model), seen, exact=True, everywhere=False)
    expected = by_hugging_face(bare, data, lambda truth: tapping(truth, bare, plain, theirs))
    due, allowances = Observation(_NOTHING, theirs.values), led_allowances(theirs, case)
    yield from compare_values(due, seen, sites, allowances=allowances)
    yield from differing_texts(expected, actual)


def _generating(subject: Subject, case: Case, data: Inputs, recorder: StepRecorder) -> Any:
    """A hook that generates once, before anything is recorded of the generation around it."""
    ran = False

    def hook(tensor: torch.Tensor, hook: HookPoint) -> None:
        nonlocal ran
        if not ran:
            ran = True
            with torch.random.fork_rng(devices=[]):
                by_bridge(subject, case, data)
            recorder.begin(case)

    return hook


def _state(subject: Subject, *, drawn: bool) -> dict[str, Any]:
    """What a generation must leave as it was, by what it is called."""
    bridge = bridge_of(subject)
    modules = dict(bridge.named_modules())
    hooks = {
        name: [handle.hook.id for handle in (*point.fwd_hooks, *point.bwd_hooks)]
        for name, point in hook_points(subject).items()
    }
    return {
        "train or eval mode": {name: module.training for name, module in modules.items()},
        "hooks": hooks,
        "hook.ctx": {name: dict(point.ctx) for name, point in hook_points(subject).items()},
        "PyTorch's hooks": {name: len(module._forward_hooks) for name, module in modules.items()},
        "requires_grad": {name: p.requires_grad for name, p in bridge.named_parameters()},
        "gradient mode": torch.is_grad_enabled(),
        "cfg": dict(vars(bridge.cfg)),
        "the model's configuration": subject.model.config.to_dict(),
        "the generation's configuration": subject.model.generation_config.to_dict(),
        "random state": None if drawn else torch.get_rng_state().tolist(),
        "caches": [
            f"{name}.{attribute}"
            for name, module in modules.items()
            for attribute, held in vars(module).items()
            if isinstance(held, Cache)
        ],
    }


def settled_models() -> SearchStrategy[ModelSpec]:
    """Models that do not remember how long a text was, as dynamic RoPE does."""
    return model_specs(rope_types=st.sampled_from(("default", "linear", "llama3", "yarn")))


def settled_cases() -> SearchStrategy[Case]:
    """Generations of `settled_models`."""
    return cases(models=settled_models(), runs=generating_runs)


@check(
    "generation.leaves_nothing",
    "A generation, one that a hook's error ends and a stream that is abandoned leave modes, hooks, "
    "configurations, the random state, what hooks keep in hook.ctx and the user's tensors as they "
    "were, and no cache.",
    settled_cases,
    examples=0.15,
)
def leaves_nothing(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """With two hooks of a user on, one of them permanent. The next generation is as the first."""
    data = inputs(case)
    before = [x.clone() for x in (data.tokens, data.attention_mask) if x is not None]
    expected = by_hugging_face(case, data)
    subject = generating(case, adapter)
    bridge = bridge_of(subject)
    bridge.train(case.run.training)
    asked = bridge_options(case, data)
    points = hook_points(subject)
    seen: list[str] = []
    user = ("blocks.0.attn.hook_rot_k", "unembed.hook_out")

    def listen(tensor: torch.Tensor, hook: HookPoint) -> None:
        seen.append(str(hook.name))

    def trouble(tensor: torch.Tensor, hook: HookPoint) -> None:
        if len(seen) >= len(user):  # both have fired: this is the second step
            raise OnPurposeError

    def plain() -> None:
        bridge.generate(data.tokens, **asked)

    def troubled() -> None:
        with suppress(OnPurposeError), bridge.hooks(fwd_hooks=[("ln_final.hook_in", trouble)]):
            bridge.generate(data.tokens, **asked)

    def abandoned() -> None:
        stream = bridge.generate_stream(data.tokens, max_tokens_per_yield=1, **asked)
        next(stream)
        stream.close()

    ways: dict[str, tuple[Callable[[], None], tuple[int, int]]] = {
        "generate": (plain, (steps_of(case), steps_of(case))),
        "an error in a hook": (troubled, (2, 1)),
        "an abandoned stream": (abandoned, (1, 1)),
    }
    drawn = case.run.training and case.model.attention_dropout > 0
    try:
        for name, permanent in zip(user, (False, True), strict=True):
            points[name].add_hook(listen, is_permanent=permanent)
            points[name].ctx["kept"] = name
        for way, (act, firings) in ways.items():
            state = _state(subject, drawn=drawn)
            seen.clear()
            with at_work(way), torch.random.fork_rng(devices=[], enabled=drawn):
                act()
            left = _state(subject, drawn=drawn)
            for what in state:
                if left[what] != state[what]:
                    yield Gap(what, "contract", f"is not what it was before {way}")
            for name, due in zip(user, firings, strict=True):
                if seen.count(name) != due:
                    yield Gap(name, "count", f"fired {seen.count(name)} times in {way}, not {due}")
        with at_work("a forward"), torch.no_grad():
            bridge(data.tokens)
        if held := _state(subject, drawn=True)["caches"]:
            yield Gap("caches", "extra", f"a later forward leaves one in {held[0]}")
        yield from differing_texts(expected, by_bridge(subject, case, data))
    finally:
        for point in points.values():
            point.remove_hooks("both", including_permanent=True)
    after = [x for x in (data.tokens, data.attention_mask) if x is not None]
    for name, kept, now in zip(("tokens", "attention_mask"), before, after, strict=False):
        yield from bitwise(f"the user's {name}", kept, now)
