"""The state machine: drawn ahead as a list of steps, and step by step by Hypothesis' own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from conformance.checks import judge, machine
from conformance.compare import Gap
from conformance.machine import Machine, act, compared, legal
from conformance.machine.drawing import ROWS, starts
from conformance.run import property_settings
from conformance.spec import DTYPES, EDITS, FLAGS, Case, Step
from conformance.suite.properties import as_test, judged

test_steps = as_test(machine.steps)

SEEDS = st.sampled_from(range(2**10))
PLACES = st.builds(
    lambda row, block: (row, block), st.sampled_from(ROWS), st.sampled_from(range(2))
)
EDIT_KINDS = st.sampled_from(EDITS)


def kinds(*names: str) -> st.SearchStrategy[str]:
    return st.sampled_from(names)


def allowed(kind: str) -> Callable[[Any], bool]:
    """The state allows a step of this kind."""
    return lambda self: legal(self.machine, Step(kind=kind))


class BridgeMachine(RuleBasedStateMachine):
    """A bridge under test beside fresh Hugging Face models in the same state.

    A gap is raised as the check's own error. The case that it carries has the steps so far, so that
    ``olmo-conformance replay`` takes them again.
    """

    hooked: Bundle[str] = Bundle("hooked")

    def judge(self, found: Callable[[], Iterable[Gap]]) -> None:
        """Raise a verdict against the adapter, if that is what the gaps come to."""
        case = replace(self.case, run=replace(self.case.run, steps=tuple(self.taken)))
        verdict = judge(machine.steps, judged(), case, found=found)
        if verdict.bad:
            raise machine.steps.error(verdict)

    def take(self, kind: str, seed: int = 0, **fields: str) -> bool:
        """Do what a step says; whether the state allows it."""
        step = Step(kind=kind, seed=seed, **fields)
        if not legal(self.machine, step):
            return False
        self.taken.append(step)
        self.judge(lambda: act(self.machine, step))
        return True

    def at(self, place: tuple[str, int]) -> str:
        """The site of a row of the table in one of the blocks that there are."""
        row, block = place
        return row.replace("{i}", str(block % self.case.model.num_hidden_layers))

    @initialize(case=starts())
    def start(self, case: Case) -> None:
        self.case, self.taken = case, list[Step]()

        def build() -> Iterable[Gap]:
            self.machine = Machine(judged(), case)
            return ()

        self.judge(build)

    @invariant()
    def equals_a_fresh_reference(self) -> None:
        self.judge(lambda: compared(self.machine))

    @rule(kind=kinds("forward", "backward", "zero_grad", "optimize"), seed=SEEDS)
    def run(self, kind: str, seed: int) -> None:
        self.take(kind, seed)

    @rule(kind=kinds("run_with_cache", "output_attentions", "generate"), seed=SEEDS)
    def call(self, kind: str, seed: int) -> None:
        self.take(kind, seed)

    @rule(
        kind=kinds("run_with_hooks", "hooks_context", "failing_hook", "failing_backward_hook"),
        place=PLACES,
        edit=EDIT_KINDS,
        seed=SEEDS,
    )
    def call_with_a_hook(self, kind: str, place: tuple[str, int], edit: str, seed: int) -> None:
        self.take(kind, seed, site=self.at(place), edit=edit)

    @rule(
        target=hooked,
        kind=kinds("add_hook", "add_permanent_hook", "add_backward_hook"),
        place=PLACES,
        edit=EDIT_KINDS,
        seed=SEEDS,
    )
    def hook(
        self, kind: str, place: tuple[str, int], edit: str, seed: int
    ) -> str | MultipleResults[str]:
        site = self.at(place)
        return site if self.take(kind, seed, site=site, edit=edit) else multiple()

    @rule(site=hooked, kind=kinds("add_hook", "add_permanent_hook"), edit=EDIT_KINDS, seed=SEEDS)
    def hook_beside_another(self, site: str, kind: str, edit: str, seed: int) -> None:
        self.take(kind, seed, site=site, edit=edit)

    @rule(site=consumes(hooked), seed=SEEDS)
    def unhook(self, site: str, seed: int) -> None:
        self.take("remove_hooks", seed, site=site)

    @rule(kind=kinds("reset_hooks", "reset_all_hooks"), seed=SEEDS)
    def reset(self, kind: str, seed: int) -> None:
        self.take(kind, seed)

    @rule(name=st.sampled_from(FLAGS), seed=SEEDS)
    def flag(self, name: str, seed: int) -> None:
        self.take("flag", seed, flag=name)

    @rule(kind=kinds("train", "eval"))
    def mode(self, kind: str) -> None:
        self.take(kind)

    @rule(dtype=st.sampled_from(DTYPES), seed=SEEDS)
    def cast(self, dtype: str, seed: int) -> None:
        self.take("cast", seed, dtype=dtype)

    @rule(kind=kinds("load", "freeze", "thaw"), seed=SEEDS)
    def weights(self, kind: str, seed: int) -> None:
        self.take(kind, seed)

    @rule(seed=SEEDS)
    def copy(self, seed: int) -> None:
        self.take("deepcopy", seed)

    @precondition(allowed("pickle"))
    @rule(seed=SEEDS)
    def pickle(self, seed: int) -> None:
        self.take("pickle", seed)

    @precondition(allowed("compatibility"))
    @rule(seed=SEEDS)
    def compatibility(self, seed: int) -> None:
        self.take("compatibility", seed)

    @rule(kind=kinds("prepare", "unpatch"))
    def patch(self, kind: str) -> None:
        self.take(kind)


TestBridgeMachine = BridgeMachine.TestCase
TestBridgeMachine.settings = property_settings(machine.steps)
