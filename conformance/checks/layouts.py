"""How tensors that hooks return lie in memory, which must not matter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, cast

import torch
from hypothesis import strategies as st

from conformance.checks.registry import Adapter, check
from conformance.checks.support import drawing
from conformance.compare import (
    Gap,
    compare_gradients,
    compare_parameters,
    compare_values,
)
from conformance.observe import observe, sites_of
from conformance.recorder import Recorder
from conformance.sites import observable
from conformance.spec import Case, Edit
from conformance.strategies import cases, run_specs
from conformance.subjects import bridged, reference


def _reordered(x: torch.Tensor, seed: int) -> torch.Tensor:
    """The same values, with the axes in another order in memory."""
    order = torch.randperm(x.ndim, generator=torch.Generator().manual_seed(seed)).tolist()
    back = [order.index(dim) for dim in range(x.ndim)]
    return x.permute(order).contiguous().permute(back)


def _cut_out(x: torch.Tensor, seed: int) -> torch.Tensor:
    """The same values, from the middle of something larger."""
    dim = seed % x.ndim
    return torch.cat([x, x, x], dim).narrow(dim, x.shape[dim], x.shape[dim])


def _expanded(x: torch.Tensor, seed: int) -> torch.Tensor:
    """The mean along one axis, whose entries are then one in memory: mean ablation."""
    dim = seed % (x.ndim - 1)  # not the last: a LayerNorm behind it would leave nothing
    one = x.mean(dim, keepdim=True) if x.is_floating_point() else x.narrow(dim, 0, 1)
    return one.expand_as(x)


_LAYOUTS = (_reordered, _cut_out, _expanded)


class _LaidGradient(torch.autograd.Function):
    """The same tensor, whose gradient flows on in a layout of its own.

    Which of two gradients is added to the other decides how their sum lies in memory, and that
    decides how a later sum along an axis is rounded; neither is promised.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, seed: int) -> torch.Tensor:
        """The tensor as it lies."""
        ctx.seed = seed
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient in the drawn layout, whatever its own was."""
        lay = (_reordered, _cut_out)[ctx.seed % 2]
        return lay(gradient.clone(memory_format=torch.contiguous_format), ctx.seed // 2), None


class _Laid(Recorder):
    """Leaves a tensor of a drawn layout at every site.

    Args:
        sites: The sites.
        draw: What the layouts are drawn with.
    """

    def __init__(self, sites: Collection[str], draw: Callable[[int], int]) -> None:
        self._ways = {name: (_LAYOUTS[draw(len(_LAYOUTS))], draw(12)) for name in sorted(sites)}

    def begin(self, case: Case) -> None:
        """Edit every site."""
        super().begin(case)
        self.edits = {name: Edit(site=name) for name in self._ways}

    def edit(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The site's tensor as it is drawn to lie."""
        if name not in self.edits:
            return tensor
        lay, seed = self._ways[name]
        # A copy: how a product is rounded also depends on where in memory its factors begin.
        laid = lay(tensor.clone(memory_format=torch.contiguous_format), seed)
        return cast(torch.Tensor, _LaidGradient.apply(laid, seed))  # type: ignore[no-untyped-call]


@check(
    "interventions.layouts",
    "What hooks return may lie in memory in any way, expanded, its axes reordered or cut out of "
    "something larger, at all sites at once: the effect is that of such tensors in Hugging Face's "
    "model.",
    lambda: cases(runs=partial(run_specs, chunks=st.just(1))),
    examples=0.2,
)
def layouts(adapter: Adapter, case: Case) -> Iterator[Gap]:
    """Each site in a layout of its own, the same on both: by it depends how a sum is rounded."""
    subject = bridged(case.model, adapter, prepared=case.run.prepared)
    every, required = sites_of(subject, case), observable(case.model)
    plain = {name: site for name, site in every.items() if not site.derived}
    # Not behind the clamp: what Hugging Face clamps in place stays where it lies.
    laid = _Laid(plain.keys() & required.keys(), drawing(case))
    expected = observe(reference(case.model), case, sites=every, recorder=laid)
    actual = observe(subject, case, sites=plain, recorder=laid)
    yield from compare_values(expected, actual, every)
    yield from compare_gradients(expected, actual, plain)
    yield from compare_parameters(expected, actual)
