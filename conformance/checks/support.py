"""What several checks share: what an adapter offers, and whether a clip binds."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

from conformance.checks.registry import Adapter
from conformance.compare import Gap, compare_tensors
from conformance.observe import observe
from conformance.sites import observable
from conformance.spec import Case
from conformance.subjects import reference
from conformance.tolerance import exactly
from conformance.verdict import NotApplicable


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
