"""What several checks share: what an adapter offers, whether a clip binds, loading by name."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

from conformance.checks.registry import Adapter
from conformance.observe import observe
from conformance.sites import observable
from conformance.spec import Case
from conformance.subjects import ARCHITECTURE, reference
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


@contextmanager
def registered(adapter: Adapter) -> Iterator[None]:
    """Let ``boot_transformers`` take the adapter for OLMo, for a while.

    The registry belongs to the process. transformer_lens offers no way to take an adapter out
    again, so the one before is put back.
    """
    # Imported first, this module is circular in transformer_lens 4.0.
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory

    before = ArchitectureAdapterFactory._adapters[ARCHITECTURE]
    ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, adapter)
    try:
        yield
    finally:
        ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, before)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep off the screen what transformers and transformer_lens say of their progress."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
