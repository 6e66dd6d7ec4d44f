"""What several checks share: what an adapter offers, and whether a clip binds."""

from __future__ import annotations

import inspect

from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

from conformance.checks.registry import Adapter
from conformance.observe import observe
from conformance.sites import observable
from conformance.spec import Case
from conformance.subjects import reference
from conformance.verdict import NotApplicable


def has_exact_patch(adapter: Adapter) -> bool:
    """Whether the adapter has a ``prepare_model`` with an exact mode."""
    return "exact_clip" in inspect.signature(adapter.prepare_model).parameters


def needs_patch(adapter: Adapter, *, exact: bool = False) -> None:
    """Say that a check does not apply to an adapter with no patch (or no exact one) of its own."""
    if adapter.prepare_model is ArchitectureAdapter.prepare_model:
        raise NotApplicable("the adapter has no prepare_model of its own")
    if exact and not has_exact_patch(adapter):
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
