"""What several checks share: what an adapter offers, whether a clip binds, one tensor compared."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

from conformance.checks.registry import Adapter
from conformance.compare import Gap, compare_tensors
from conformance.observe import observe
from conformance.sites import observable
from conformance.spec import Case
from conformance.subjects import Subject, reference
from conformance.tolerance import Allowance, exactly
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


def differing(
    name: str,
    expected: torch.Tensor,
    actual: torch.Tensor,
    allowance: Allowance | None = None,
    *,
    kind: str = "value",
) -> Iterator[Gap]:
    """The gap between two tensors, if there is one; bit for bit where nothing is allowed."""
    allowed = allowance if allowance is not None else exactly(expected.dtype)
    gap = compare_tensors(name, expected, actual, allowed, kind=kind)
    yield from [gap] if gap else []


def bridge_of(subject: Subject) -> Any:
    """The bridge of a bridged subject."""
    assert subject.bridge is not None
    return subject.bridge
