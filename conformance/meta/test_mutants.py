"""Each mutant dies of the check that is named for it; the sound adapter lives where it died."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch

from conformance.checks import REGISTRY
from conformance.mutants import CATALOGUE, Mutant, kill

torch.set_num_threads(1)  # on tiny tensors, threads only wait for each other

# A mutant may survive one seed in ten. And a seed's draws are not for ever: Hypothesis mixes in
# integer literals that it finds in the project's source.
SEEDS = (0, 1, 2)

Snapshot = dict[tuple[Any, str], Any]


def snapshot() -> Snapshot:
    """All that the adapter's and Hugging Face's OLMo modules and classes hold."""
    owners: dict[Any, None] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "adapter" or name.startswith("transformers.models.olmo."):
            owners[module] = None
            classes = [held for held in vars(module).values() if isinstance(held, type)]
            owners.update(dict.fromkeys(base for held in classes for base in held.__mro__))
    return {(owner, name): held for owner in owners for name, held in vars(owner).items()}


def changed(before: Snapshot, after: Snapshot) -> list[tuple[Any, str]]:
    absent = object()
    keys = [key for key in before | after if not key[1].startswith("_abc_")]
    return [key for key in keys if before.get(key, absent) is not after.get(key, absent)]


# All of them are for `olmo-conformance mutants`, and for CI ten others every day.
SAMPLE = list(CATALOGUE.values())[::60]


@pytest.mark.parametrize("mutant", SAMPLE, ids=str)
def test_dies_where_the_sound_adapter_lives(mutant: Mutant) -> None:
    for seed in SEEDS:
        result = kill(mutant, seed=seed)
        print(result)
        if result.verdict is not None:
            break
        warnings.warn(f"seed {seed}: {result}", stacklevel=1)
    assert result.killed, f"{result}; {mutant.breaks}; trigger: {mutant.trigger}"


def test_each_changes_one_thing_of_the_adapter_and_leaves_no_trace() -> None:
    before = snapshot()
    for mutant in CATALOGUE.values():
        with mutant.apply():
            touched = changed(before, snapshot())
        assert len(touched) == 1, (mutant.name, touched)
        owner = touched[0][0]
        home = owner.__module__ if isinstance(owner, type) else owner.__name__
        assert home.split(".")[0] == "adapter", f"{mutant} touches {home}"
        with pytest.raises(ZeroDivisionError), mutant.apply():
            raise ZeroDivisionError
        assert not changed(before, snapshot()), mutant.name


def test_every_check_has_a_mutant_that_it_must_kill() -> None:
    killers = {mutant.killer for mutant in CATALOGUE.values()}
    assert killers == set(REGISTRY)


def test_every_mutant_says_what_it_is() -> None:
    for name, mutant in CATALOGUE.items():
        assert mutant.name == name
        assert "." in name
        assert mutant.breaks, name
        assert mutant.trigger, name


def test_a_survivor_is_reported() -> None:
    harmless = CATALOGUE["clamp.zero_is_none"]
    result = kill(harmless, examples=1)  # the first case is always the simplest: no clip
    assert (result.killed, result.by, result.cases) == (False, None, 1)
    assert "SURVIVED forward.logits" in str(result)


def test_draws_are_the_same_every_time() -> None:
    twice = [kill(CATALOGUE["clamp.zero_is_none"], seed=5) for _ in range(2)]
    assert twice[0].verdict is not None
    assert twice[1].verdict is not None
    assert twice[0].verdict.case == twice[1].verdict.case
