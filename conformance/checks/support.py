"""What several checks share: what an adapter offers, and whether a clip binds."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

from conformance.checks.registry import Adapter
from conformance.observe import observe
from conformance.sites import observable
from conformance.spec import Case
from conformance.subjects import Subject, at_work, reference
from conformance.verdict import NotApplicable


def needs_patch(adapter: Adapter, *, exact: bool = False) -> None:
    """Say that a check does not apply to an adapter with no patch (or no exact one) of its own."""
    if adapter.prepare_model is ArchitectureAdapter.prepare_model:
        raise NotApplicable("the adapter has no prepare_model of its own")
    if exact and "exact_clip" not in inspect.signature(adapter.prepare_model).parameters:
        raise NotApplicable("the adapter's prepare_model has no exact_clip mode")


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
    bridge: Any = subject.bridge
    for flag in flags:
        with at_work(f"{'cfg.' if by_cfg else 'set_'}{flag}, {on}"):
            if by_cfg:
                setattr(bridge.cfg, flag, on)
            else:
                getattr(bridge, f"set_{flag}")(on)


def copied(subject: Subject) -> Subject:
    """A deep copy of a bridge as a subject of its own."""
    assert subject.bridge is not None
    with at_work("copy.deepcopy"):
        bridge = copy.deepcopy(subject.bridge)
        model: Any = bridge.original_model
        # The copy keeps the bridge's names: match them by order, which parameters() keeps.
        renamed = dict(zip(subject.parameters, model.parameters(), strict=True))
    return replace(subject, bridge=bridge, model=model, parameters=renamed)
