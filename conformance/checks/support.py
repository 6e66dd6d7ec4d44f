"""What several checks share: what an adapter offers, whether a clip binds, loading by name."""

from __future__ import annotations

import copy
import inspect
import io
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from dataclasses import replace
from typing import Any

import torch
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.utilities.slice import Slice

from conformance.checks.registry import Adapter
from conformance.compare import (
    Gap,
    compare_gradients,
    compare_parameters,
    compare_tensors,
    compare_values,
)
from conformance.observe import arguments, logits_of, module_of, observe, sites_of
from conformance.sites import Site, observable
from conformance.spec import Case
from conformance.subjects import Subject, at_work, reference
from conformance.tolerance import exactly
from conformance.verdict import NotApplicable


def blaming(subject: Subject, stage: str) -> AbstractContextManager[None]:
    """Blame a subject under test for what is raised in here; the reference's errors are ours."""
    return at_work(stage) if subject.under_test else nullcontext()


def in_one_forward(case: Case, **changes: Any) -> Case:
    """The same case with its whole input fed at once, and other changes of its run."""
    run = replace(case.run, chunks=1, **changes)
    return replace(case, run=run, tokens=case.tokens[: run.batch])


def drawing(case: Case) -> Callable[[int], int]:
    """What draws whole numbers below a bound from a case: for choices that the spec has not."""
    generator = torch.Generator().manual_seed(case.run.token_seed)
    return lambda below: int(torch.randint(below, (), generator=generator))


def freeze_some(subject: Subject, draw: Callable[[int], int]) -> bool:
    """Freeze a bridge, in a third of the cases; whether it was.

    It then runs without a graph though gradient mode is on: only its tensors say so.
    """
    frozen = draw(3) == 0
    if frozen:
        bridge_of(subject).requires_grad_(False)
    return frozen


def some_positions(length: int, draw: Callable[[int], int]) -> tuple[Any, Collection[int]]:
    """A pos_slice, and the positions that it picks of ``length``."""
    every = range(length)
    one = draw(2 * length) - length
    start, stop = draw(2 * length + 1) - length, draw(2 * length + 1) - length
    some = [draw(2 * length) - length for _ in range(1 + draw(3))]
    ways: list[tuple[Any, Collection[int]]] = [
        (None, every),
        (one, [every[one]]),
        ((stop,), every[:stop]),
        ((start, stop), every[start:stop]),
        ((start, None, 2), every[start::2]),
        (slice(start, stop), every[start:stop]),
        (some, [every[at] for at in some]),
        (torch.tensor(some), [every[at] for at in some]),
        (Slice((start, stop)), every[start:stop]),
    ]
    return ways[draw(len(ways))]


def sites_to_hook(subject: Subject, case: Case) -> dict[str, Site]:
    """Sites to hook backwards too: all but those inside of the LayerNorms, which have checks."""
    return {name: site for name, site in sites_of(subject, case).items() if not site.derived}


def everywhere_gaps(truth: Subject, subject: Subject, case: Case) -> Iterator[Gap]:
    """All gaps of one run in one forward, and backwards, with everything on it.

    Gradients at sites are those of `sites_to_hook`.
    """
    every, plain = sites_of(subject, case), sites_to_hook(subject, case)
    expected = observe(truth, case, sites=every)
    actual = observe(subject, case, sites=every, gradients_at=plain)
    # Taps fire in an order of their own; what is due of a bridge is the table's.
    due = expected.fired if subject.bridge is None else ()
    yield from compare_values(expected, actual, every, due=due)
    yield from compare_gradients(expected, actual, plain)
    yield from compare_parameters(expected, actual)


def forward_as_it_is(subject: Subject, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward in the mode, with the hooks and under the gradient that the subject is now.

    Returns:
        The logits, ``[batch, pos, d_vocab]``, and PyTorch's random state after the forward.
    """
    given = arguments(subject, case)
    with torch.random.fork_rng(devices=[]), blaming(subject, "a forward"):
        torch.manual_seed(case.run.token_seed)
        return logits_of(module_of(subject)(**given)), torch.get_rng_state()


def needs_patch(adapter: Adapter, *, exact: bool = False) -> None:
    """Say that a check does not apply to an adapter with no patch (or no exact one) of its own."""
    if adapter.prepare_model is ArchitectureAdapter.prepare_model:
        raise NotApplicable("the adapter has no prepare_model of its own")
    if exact and not has_exact(adapter):
        raise NotApplicable("the adapter's prepare_model has no exact_clip mode")


def has_exact(adapter: Adapter) -> bool:
    """Whether the adapter's patch has an exact mode."""
    return "exact_clip" in inspect.signature(adapter.prepare_model).parameters


def within_clip(case: Case) -> bool:
    """Whether no entry of q, k or v exceeds the clip anywhere in the reference's forward."""
    clip = case.model.clip_qkv
    if clip is None:
        return True
    sites = observable(case.model)
    seen = observe(reference(case.model), case, sites=sites, backward=False).values
    projected = (".q.hook_out", ".k.hook_out", ".v.hook_out")
    return all(
        bool((tensor.abs() <= clip).all())
        for key, tensor in seen.items()
        if key.partition("#")[0].endswith(projected)
    )


def turn(subject: Subject, flags: Iterable[str], on: bool, *, by_cfg: bool = False) -> None:
    """Turn flags of a bridge on or off.

    Args:
        subject: The bridge.
        flags: Of `conformance.spec.FLAGS`.
        on: Whether they are on afterwards.
        by_cfg: Assign them on ``bridge.cfg`` instead of calling ``set_use_*``.
    """
    bridge = bridge_of(subject)
    for flag in flags:
        with at_work(f"{'cfg.' if by_cfg else 'set_'}{flag}, {on}"):
            if by_cfg:
                setattr(bridge.cfg, flag, on)
            else:
                getattr(bridge, f"set_{flag}")(on)


def copied(subject: Subject, *, by: Callable[[Any], Any] = copy.deepcopy) -> Subject:
    """A copy of a bridge as a subject of its own.

    Args:
        subject: The bridge.
        by: What copies it.
    """
    assert subject.bridge is not None
    with at_work(f"copying by {by.__name__}"):
        bridge = by(subject.bridge)
        model: Any = bridge.original_model
        # The copy keeps the bridge's names and order; a bridge may have parameters of its own.
        pairs = zip(subject.model.parameters(), model.parameters(), strict=True)
        twins = {id(old): new for old, new in pairs}
        renamed = {name: twins[id(old)] for name, old in subject.parameters.items()}
    return replace(subject, bridge=bridge, model=model, parameters=renamed)


def bridge_of(subject: Subject) -> Any:
    """The bridge of a bridged subject."""
    assert subject.bridge is not None
    return subject.bridge


def exact_gaps(
    expected: Mapping[str, torch.Tensor | None], actual: Mapping[str, Any]
) -> Iterator[Gap]:
    """Tensors by name that must be equal bit for bit; None stands for one that must not be."""
    for name, due in expected.items():
        got = actual.get(name)
        if due is None or got is None:
            if due is not got:
                kind = "missing" if got is None else "extra"
                yield Gap(name, kind, f"is {got!r:.40} instead of {due!r:.40}")
        elif gap := compare_tensors(name, due, got, exactly(due.dtype)):
            yield gap
    for name in actual:
        if name not in expected:
            yield Gap(name, "extra", "nothing of Hugging Face's")


@contextmanager
def registry() -> Iterator[dict[str, Any]]:
    """The process's registry of adapters, by architecture; afterwards it is as it was."""
    # Imported first, this module is circular in transformer_lens 4.0.
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    adapters: dict[str, Any] = ArchitectureAdapterFactory._adapters
    before = dict(adapters)
    try:
        yield adapters
    finally:
        adapters.clear()
        adapters.update(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep off the screen what transformers and transformer_lens print and log meanwhile."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
