"""From two observations to their gaps: every disagreement, in the order of execution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from conformance.recorder import Observation
from conformance.sites import Site
from conformance.tolerance import Allowance, exactly, of_gradient, of_value

NOTHING_SPECIAL: Mapping[str, Allowance] = {}


@dataclass(frozen=True)
class Gap:
    """One disagreement between a subject and the reference.

    Attributes:
        site: Hook name, parameter name, or what else was compared.
        kind: missing, extra, order, count, shape, dtype, value, gradient or contract.
        detail: What differs, in words and numbers.
        greatest: Greatest absolute difference, where there is one.
        index: Where it is.
    """

    site: str
    kind: str
    detail: str
    greatest: float | None = None
    index: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.site}: {self.kind}: {self.detail}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _alike(expected: torch.Tensor, actual: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype, device and entries, as nearly all have."""
    return (
        actual.dtype is expected.dtype
        and actual.device == expected.device
        and torch.equal(actual, expected)
    )


def compare_tensors(
    name: str,
    expected: torch.Tensor,
    actual: torch.Tensor,
    allowance: Allowance | Callable[[], Allowance],
    *,
    kind: str = "value",
    any_wider: bool = False,
) -> Gap | None:
    """Compare two tensors: shape, dtype, device, then every entry. Two NaN in one place agree.

    Args:
        name: What the gap is called.
        expected: The reference's tensor.
        actual: The subject's.
        allowance: How far an entry may be off; a function is only called if some entry is off.
        kind: The kind of a gap between entries: ``value`` or ``gradient``.
        any_wider: Accept float32 and float64 where the reference is shorter or float32: a derived
            value has the precision it was recomputed in.
    """
    if _alike(expected, actual):
        return None
    if actual.shape != expected.shape:
        return Gap(name, "shape", f"{list(actual.shape)} instead of {list(expected.shape)}")
    wider = any_wider and actual.dtype in (torch.float32, torch.float64)
    if actual.dtype != expected.dtype and not wider:
        return Gap(name, "dtype", f"{_short(actual.dtype)} instead of {_short(expected.dtype)}")
    if actual.device != expected.device:
        return Gap(name, "contract", f"on {actual.device} instead of {expected.device}")
    if wider and torch.equal(actual, expected):
        return None
    with torch.no_grad():
        return _compare_entries(name, expected, actual, allowance, kind)


def _compare_entries(
    name: str,
    expected: torch.Tensor,
    actual: torch.Tensor,
    allowance: Allowance | Callable[[], Allowance],
    kind: str,
) -> Gap | None:
    if callable(allowance):
        allowance = allowance()
    wide_actual, wide_expected = actual.detach().double(), expected.detach().double()
    difference = (wide_actual - wide_expected).abs()
    same = (wide_actual == wide_expected) | (wide_actual.isnan() & wide_expected.isnan())
    bound = allowance.atol + allowance.rtol * wide_expected.abs()
    # An infinity is within no bound, not even one that an infinite expectation makes infinite.
    wrong = ~same & ~(difference.isfinite() & (difference <= bound))
    count = int(wrong.sum())
    if not count:
        return None
    # A NaN or an infinity on one side only is the greatest difference there is.
    size = torch.where(wrong, difference.nan_to_num(nan=torch.inf, posinf=torch.inf), -1.0)
    flat = int(size.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), size.shape))
    greatest = float(size.flatten()[flat])
    size_there = float(wide_expected.flatten()[flat].abs())
    shown = 0 < size_there < torch.inf
    relative = f" (relative {greatest / size_there:.1e})" if shown else ""
    where = f" at {index}" if index else ""
    detail = (
        f"{count} of {expected.numel()} differ, greatest {greatest:.1e}{where}{relative}, "
        f"allowed {allowance}"
    )
    return Gap(name, kind, detail, greatest, index)


def bitwise(
    name: str, due: torch.Tensor, got: torch.Tensor, *, kind: str = "value"
) -> Iterator[Gap]:
    """The gap between two tensors that may not differ at all, if there is one."""
    return within(exactly(due.dtype), name, due, got, kind=kind)


def within(
    allowance: Allowance, name: str, due: torch.Tensor, got: torch.Tensor, *, kind: str = "value"
) -> Iterator[Gap]:
    """The gap between two tensors that differ by more than is allowed, if there is one."""
    gap = compare_tensors(name, due, got, allowance, kind=kind)
    yield from [gap] if gap else []


def labelled(label: str, gaps: Iterable[Gap]) -> Iterator[Gap]:
    """The same gaps, with what they were found in told first."""
    for gap in gaps:
        yield replace(gap, site=f"{label}: {gap.site}")


def compare_firing(expected: Iterable[str], actual: Iterable[str]) -> Iterator[Gap]:
    """Each expected hook fires exactly once, no other fires, in the expected order."""
    wanted, fired = list(expected), list(actual)
    counts = Counter(fired)
    for name in wanted:
        if counts[name] == 0:
            yield Gap(name, "missing", "never fired")
        elif counts[name] > 1:
            yield Gap(name, "count", f"fired {counts[name]} times instead of once")
    known = set(wanted)
    for name in dict.fromkeys(fired):
        if name not in known:
            yield Gap(name, "extra", "fired, but neither the contract nor the adapter declares it")
    met = [name for name in dict.fromkeys(fired) if name in known]
    due = [name for name in wanted if counts[name]]
    for name, instead in zip(due, met, strict=True):
        if name != instead:
            yield Gap(instead, "order", f"fired where {name} was due")
            return


def in_order(sites: Mapping[str, Site], keys: Collection[str]) -> list[str]:
    """Observation keys, ``name`` or ``name#chunk``, in the order of execution."""
    ordered = [name for name in sites if name in keys]
    if len(ordered) == len(keys):  # all of one chunk
        return ordered
    place = {name: index for index, name in enumerate(sites)}

    def rank(key: str) -> tuple[int, int]:
        name, _, chunk = key.partition("#")
        return int(chunk or 0), place.get(name, len(place))

    return sorted(keys, key=rank)


def compare_values(
    expected: Observation,
    actual: Observation,
    sites: Mapping[str, Site],
    *,
    due: Sequence[str] = (),
    allowances: Mapping[str, Allowance] = NOTHING_SPECIAL,
) -> tuple[Gap, ...]:
    """Firing, shape, dtype and value of every site, in the order of execution.

    Args:
        expected: The reference's observation.
        actual: The subject's.
        sites: The sites compared.
        due: The order of firing; the table's order if empty. Taps fire in an order of their own.
        allowances: Of values that have another one than their site.
    """
    due = due or in_order(sites, expected.values)
    gaps = [] if tuple(due) == actual.fired else list(compare_firing(due, actual.fired))
    for key in due:
        wanted, got = expected.values[key], actual.values.get(key)
        if got is None or _alike(wanted, got):
            continue
        site = sites[key.partition("#")[0]]
        allowance = allowances.get(key) or partial(of_value, site, key, expected.values)
        gap = compare_tensors(key, wanted, got, allowance, any_wider=bool(site.derived))
        gaps += [gap] if gap else []
    gap = compare_tensors("logits", expected.logits, actual.logits, exactly(expected.logits.dtype))
    gaps += [gap] if gap else []
    rank = {key: index for index, key in enumerate([*due, "logits"])}
    return tuple(sorted(gaps, key=lambda gap: rank.get(gap.site, len(rank))))


def compare_gradients(
    expected: Observation,
    actual: Observation,
    sites: Mapping[str, Site],
    allowances: Mapping[str, Allowance] = NOTHING_SPECIAL,
) -> tuple[Gap, ...]:
    """Every site's gradient, and that it came exactly once, in the order of the backward pass."""
    gaps: list[Gap] = []
    counts = Counter(actual.fired_backward)
    for name in reversed(list(sites)):
        if name not in expected.gradients:
            if counts[name]:
                gaps.append(Gap(name, "extra", "has a gradient that the reference has not"))
        elif not counts[name]:
            gaps.append(Gap(name, "missing", "no gradient reached the backward hook"))
        elif counts[name] > 1:
            gaps.append(Gap(name, "count", f"fired backwards {counts[name]} times"))
        elif not _alike(wanted := expected.gradients[name], got := actual.gradients[name]):
            allowance = allowances.get(name) or partial(
                of_gradient, sites[name], expected.values, expected.gradients
            )
            derived = bool(sites[name].derived)
            gap = compare_tensors(name, wanted, got, allowance, kind="gradient", any_wider=derived)
            gaps += [gap] if gap else []
    return tuple(gaps)


def compare_parameters(
    expected: Observation,
    actual: Observation,
    allowances: Mapping[str, Allowance] = NOTHING_SPECIAL,
) -> tuple[Gap, ...]:
    """The gradient of every parameter, last layers first."""
    gaps: list[Gap] = []
    for name in reversed(list(expected.parameter_gradients)):
        wanted, got = expected.parameter_gradients[name], actual.parameter_gradients.get(name)
        if wanted is None or got is None:
            if wanted is not got:
                has = "none" if got is None else "one"
                gaps.append(Gap(name, "missing" if got is None else "extra", f"gradient: {has}"))
            continue
        if _alike(wanted, got):
            continue
        allowance = allowances.get(name) or partial(exactly, wanted.dtype)
        gap = compare_tensors(name, wanted, got, allowance, kind="gradient")
        gaps += [gap] if gap else []
    return tuple(gaps)
