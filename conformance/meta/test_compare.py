"""Every kind of disagreement is found, counted, placed, put in order and worded as documented."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from conformance.compare import (
    Gap,
    bitwise,
    compare_firing,
    compare_gradients,
    compare_parameters,
    compare_tensors,
    compare_values,
    in_order,
    labelled,
    within,
)
from conformance.recorder import Observation
from conformance.sites import Port, Site, sites
from conformance.spec import ModelSpec
from conformance.tolerance import Allowance, exactly

NAN, INF = math.nan, math.inf
BITWISE = exactly(torch.float32)
SITES = {name: Site(name, "module", Port.OUT) for name in ("first", "unseen", "second", "third")}
TABLE = sites(ModelSpec())


def tensor(*entries: float) -> torch.Tensor:
    return torch.tensor(entries)


NEAR = torch.nextafter(tensor(1.0, 1.0), tensor(2.0, 2.0))


def observed(**changes: object) -> Observation:
    """Three sites, each with a value and a gradient, and logits."""
    values = {name: tensor(1.0, 2.0) for name in ("first", "second", "third")}
    parameters: dict[str, torch.Tensor | None] = {"w": tensor(1.0), "b": None}
    plain = Observation(
        logits=tensor(1.0, 2.0),
        values=values,
        gradients=dict(reversed(values.items())),
        parameter_gradients=parameters,
        fired=tuple(values),
        fired_backward=tuple(reversed(values)),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def kinds(gaps: object) -> list[tuple[str, str]]:
    return [(gap.site, gap.kind) for gap in gaps]  # type: ignore[attr-defined]


# --- two tensors


def test_equal_tensors_have_no_gap() -> None:
    for entries in ((), (1.0, -0.0), (NAN, INF, -INF)):
        assert compare_tensors("site", tensor(*entries), tensor(*entries), BITWISE) is None
    assert compare_tensors("site", tensor(0.0), tensor(-0.0), BITWISE) is None


def test_the_shape_is_told_before_the_dtype_and_the_dtype_before_the_values() -> None:
    expected = torch.zeros(2, 3)
    gap = compare_tensors("site", expected, torch.ones(3, 2, dtype=torch.float64), BITWISE)
    assert gap == Gap("site", "shape", "[3, 2] instead of [2, 3]")
    gap = compare_tensors("site", expected, torch.ones(2, 3, dtype=torch.float64), BITWISE)
    assert gap == Gap("site", "dtype", "float64 instead of float32")
    # An equal shape is asked for, not one that broadcasts.
    gap = compare_tensors("site", torch.zeros(1, 3), torch.zeros(3), BITWISE)
    assert gap is not None
    assert gap.kind == "shape"


def test_a_tensor_elsewhere_is_told_and_not_compared() -> None:
    gap = compare_tensors("site", torch.zeros(2), torch.zeros(2, device="meta"), BITWISE)
    assert gap == Gap("site", "contract", "on meta instead of cpu")


@pytest.mark.parametrize(
    ("actual", "any_wider", "agrees"),
    [
        (torch.float32, True, True),
        (torch.float64, True, True),
        (torch.float16, True, False),
        (torch.float32, False, False),
        (torch.float64, False, False),
    ],
)
def test_only_a_derived_value_may_be_wider(
    actual: torch.dtype, any_wider: bool, agrees: bool
) -> None:
    expected = torch.ones(2, dtype=torch.bfloat16)
    got = torch.ones(2, dtype=actual)
    gap = compare_tensors("site", expected, got, exactly(expected.dtype), any_wider=any_wider)
    assert (gap is None) == agrees


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("towards", [-INF, INF])
def test_one_ulp_is_a_difference(dtype: torch.dtype, towards: float) -> None:
    expected = torch.tensor([0.5, 1.0, 3.0], dtype=dtype)
    for index in range(3):
        actual = expected.clone()
        actual[index] = torch.nextafter(actual[index], torch.tensor(towards, dtype=dtype))
        gap = compare_tensors("site", expected, actual, exactly(dtype))
        assert gap is not None
        assert gap.index == (index,)
        assert gap.greatest == abs(float(actual[index]) - float(expected[index]))


def test_the_smallest_denormal_is_a_difference() -> None:
    gap = compare_tensors("site", tensor(0.0), tensor(2.0**-149), BITWISE)
    assert gap is not None
    assert gap.greatest == 2.0**-149


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_what_is_not_finite_on_one_side_only_is_the_greatest_difference(wrong: float) -> None:
    generous = Allowance(1.0, 1.0, "a test")
    for expected, actual in (
        (tensor(1.0, 2.0, 9.0), tensor(1.0, wrong, 0.0)),
        (tensor(1.0, wrong, 9.0), tensor(1.0, 2.0, 0.0)),
    ):
        for allowance, count in ((BITWISE, 2), (generous, 1)):
            gap = compare_tensors("site", expected, actual, allowance)
            assert gap is not None
            assert gap.greatest == INF
            assert gap.index == (1,)
            assert gap.detail.startswith(f"{count} of 3 differ")


def test_infinities_of_either_sign_and_a_nan_are_three_different_values() -> None:
    for expected, actual in ((INF, -INF), (INF, NAN), (NAN, -INF)):
        for allowance in (BITWISE, Allowance(1.0, 1.0, "a test")):
            assert compare_tensors("site", tensor(expected), tensor(actual), allowance) is not None


def test_count_index_and_sizes() -> None:
    expected = torch.ones(2, 3, 4)
    actual = expected.clone()
    actual[0, 1, 2], actual[1, 2, 3], actual[1, 0, 0] = 1.5, -1.0, 1.25
    gap = compare_tensors("site", expected, actual, BITWISE, kind="gradient")
    assert gap == Gap(
        "site",
        "gradient",
        "3 of 24 differ, greatest 2.0e+00 at (1, 2, 3) (relative 2.0e+00), allowed 0 "
        "(bitwise: float32 eager)",
        2.0,
        (1, 2, 3),
    )


def test_what_is_within_the_allowance_is_not_counted() -> None:
    allowance = Allowance(0.0, 0.25, "a test")
    expected, actual = tensor(0.0, 0.0, 0.0), tensor(0.25, 0.2500001, -0.3)
    gap = compare_tensors("site", expected, actual, allowance)
    assert gap is not None
    assert gap.detail.startswith("2 of 3 differ, greatest 3.0e-01 at (2,)")


def test_a_difference_above_its_own_bound_is_told_though_another_is_greater() -> None:
    allowance = Allowance(0.1, 0.0, "a test")
    gap = compare_tensors("site", tensor(100.0, 1.0), tensor(105.0, 2.0), allowance)
    assert gap is not None
    assert (gap.index, gap.greatest) == ((1,), 1.0)


def test_a_scalar_and_a_difference_from_zero_leave_out_what_they_have_not() -> None:
    gap = compare_tensors("loss", torch.tensor(0.0), torch.tensor(0.5), BITWISE)
    assert gap is not None
    assert (
        str(gap)
        == "loss: value: 1 of 1 differ, greatest 5.0e-01, allowed 0 (bitwise: float32 eager)"
    )


def test_the_message_is_the_documented_one() -> None:
    expected = torch.zeros(1, 4, 8, 8)
    actual = expected.clone()
    actual.view(-1)[:41] = 0.1
    actual[0, 0, 2, 5] = 0.31
    gap = compare_tensors("blocks.1.attn.q.hook_out", expected, actual, BITWISE)
    assert str(gap) == (
        "blocks.1.attn.q.hook_out: value: 41 of 256 differ, greatest 3.1e-01 at (0, 0, 2, 5), "
        "allowed 0 (bitwise: float32 eager)"
    )
    loose = Allowance(1e-5, 1e-6, "a reason")
    gap = compare_tensors("site", expected, actual, loose)
    assert gap is not None
    assert gap.detail.endswith("allowed 1.0e-06 + 1.0e-05 * |expected| (a reason)")


# --- which hooks fire


@pytest.mark.parametrize(
    ("fired", "gaps"),
    [
        ("abc", []),
        ("ac", [("b", "missing")]),
        ("abbc", [("b", "count")]),
        ("abxc", [("x", "extra")]),
        ("xxabc", [("x", "extra")]),
        ("acb", [("c", "order")]),
        ("cba", [("c", "order")]),
        ("", [("a", "missing"), ("b", "missing"), ("c", "missing")]),
        ("cbbx", [("a", "missing"), ("b", "count"), ("x", "extra"), ("c", "order")]),
    ],
)
def test_firing(fired: str, gaps: list[tuple[str, str]]) -> None:
    assert kinds(compare_firing("abc", fired)) == gaps


def test_the_count_is_told() -> None:
    (gap,) = compare_firing("ab", "abab"[:3])
    assert str(gap) == "a: count: fired 2 times instead of once"


def test_chunks_come_one_after_the_other() -> None:
    keys = ["second", "third#1", "unknown", "first#1", "unseen", "first"]
    ordered = ["first", "unseen", "second", "unknown", "first#1", "third#1"]
    assert in_order(SITES, keys) == ordered
    assert in_order(SITES, {"third", "first"}) == ["first", "third"]


# --- whole observations


def test_equal_observations_have_no_gap() -> None:
    assert not compare_values(observed(), observed(), SITES)
    assert not compare_gradients(observed(), observed(), SITES)
    assert not compare_parameters(observed(), observed())


def test_gaps_of_values_come_in_the_order_of_execution() -> None:
    actual = observed(
        values={
            "third": tensor(1.0, 2.0, 3.0),
            "second": tensor(1.0, 9.0),
            "unknown": tensor(1.0),
        },
        fired=("unknown", "second", "third", "third"),
        logits=tensor(1.0, 9.0),
    )
    assert kinds(compare_values(observed(), actual, SITES)) == [
        ("first", "missing"),
        ("second", "value"),
        ("third", "count"),
        ("third", "shape"),
        ("logits", "value"),
        ("unknown", "extra"),
    ]


def test_the_caller_may_give_the_order_that_is_due() -> None:
    taps = ("second", "first", "third")
    actual = observed(fired=taps)
    assert kinds(compare_values(observed(), actual, SITES)) == [("second", "order")]
    assert not compare_values(observed(), actual, SITES, due=taps)


def test_every_chunk_is_compared() -> None:
    values = {"first": tensor(1.0), "first#1": tensor(1.0)}
    expected = observed(values=values, fired=tuple(values))
    actual = observed(values={**values, "first#1": tensor(2.0)}, fired=tuple(values))
    assert kinds(compare_values(expected, actual, SITES)) == [("first#1", "value")]


def test_only_a_derived_site_has_an_allowance_and_may_be_wider() -> None:
    layer_norm = {name: site for name, site in TABLE.items() if name.startswith("ln_final")}
    values = dict.fromkeys(layer_norm, tensor(1.0, 1.0))
    expected = observed(values=values, gradients=values, fired=tuple(values))
    for name, site in layer_norm.items():
        for changed, kind in ((NEAR, "value"), (values[name].double(), "dtype")):
            actual = replace(expected, values={**values, name: changed})
            gaps = [] if site.derived else [(name, kind)]
            assert kinds(compare_values(expected, actual, layer_norm)) == gaps


def test_only_a_scale_s_gradient_has_an_allowance_and_only_a_derived_one_may_be_wider() -> None:
    layer_norm = {name: site for name, site in TABLE.items() if name.startswith("ln_final")}
    values = dict.fromkeys(layer_norm, tensor(1.0, 1.0))
    expected = observed(values=values, gradients=values, fired_backward=tuple(values))
    for name, site in layer_norm.items():
        actual = replace(expected, gradients={**values, name: NEAR})
        gaps = [] if name.endswith("hook_scale") else [(name, "gradient")]
        assert kinds(compare_gradients(expected, actual, layer_norm)) == gaps
        wide = replace(expected, gradients={**values, name: values[name].double()})
        gaps = [] if site.derived else [(name, "dtype")]
        assert kinds(compare_gradients(expected, wide, layer_norm)) == gaps


def test_gaps_of_gradients_come_in_the_order_of_the_backward_pass() -> None:
    actual = observed(
        gradients={"first": tensor(1.0, 9.0), "second": tensor(1.0, 2.0)},
        fired_backward=("second", "second", "unseen", "first"),
    )
    gaps = compare_gradients(observed(), actual, SITES)
    assert kinds(gaps) == [
        ("third", "missing"),
        ("second", "count"),
        ("unseen", "extra"),
        ("first", "gradient"),
    ]


def test_gaps_of_parameters_are_told_from_the_last_layer_to_the_first() -> None:
    expected = observed(
        parameter_gradients={"a": tensor(1.0), "b": None, "c": tensor(1.0), "d": tensor(1.0)}
    )
    actual = observed(parameter_gradients={"a": tensor(2.0), "b": tensor(0.0), "c": None})
    assert kinds(compare_parameters(expected, actual)) == [
        ("d", "missing"),
        ("c", "missing"),
        ("b", "extra"),
        ("a", "gradient"),
    ]


def test_every_gap_says_what_is_wrong() -> None:
    """What a reader sees first."""
    there = observed(fired=("second", "first", "first", "extra"), fired_backward=("third", "third"))
    fewer = observed(gradients={"second": tensor(1.0, 2.0)}, fired_backward=("second",))
    other = observed(parameter_gradients={"w": None, "b": tensor(1.0)})
    said = [
        *compare_values(observed(), there, SITES),
        *compare_gradients(observed(), there, SITES),
        *compare_gradients(fewer, observed(), SITES),
        *compare_parameters(observed(), other),
        *compare_values(observed(), observed(logits=NEAR.flip(0) * 2), SITES),
    ]
    assert [str(gap) for gap in said] == [
        "first: count: fired 2 times instead of once",
        "second: order: fired where first was due",
        "third: missing: never fired",
        "extra: extra: fired, but neither the contract nor the adapter declares it",
        "third: count: fired backwards 2 times",
        "second: missing: no gradient reached the backward hook",
        "first: missing: no gradient reached the backward hook",
        "third: extra: has a gradient that the reference has not",
        "first: extra: has a gradient that the reference has not",
        "b: extra: gradient: one",
        "w: missing: gradient: none",
        "logits: value: 2 of 2 differ, greatest 1.0e+00 at (0,) (relative 1.0e+00), "
        "allowed 0 (bitwise: float32 eager)",
    ]


def test_every_dtype_is_named_where_it_must_be_bitwise() -> None:
    for dtype, name in ((torch.float64, "float64"), (torch.bfloat16, "bfloat16")):
        ones = torch.ones(2, dtype=dtype)
        (gap,) = compare_values(observed(logits=ones), observed(logits=ones * 2), SITES)
        assert f"allowed 0 (bitwise: {name} eager)" in gap.detail
        gradients = {"second": ones}
        due, got = observed(gradients=gradients), observed(gradients={"second": ones * 2})
        gaps = [gap for gap in compare_gradients(due, got, SITES) if gap.site == "second"]
        assert [f"bitwise: {name} eager" in gap.detail for gap in gaps] == [True]
        due, got = (observed(parameter_gradients={"w": ones * scale}) for scale in (1, 2))
        (gap,) = compare_parameters(due, got)
        assert f"bitwise: {name} eager" in gap.detail


def test_a_difference_from_an_infinity_has_no_relative_size() -> None:
    gap = compare_tensors("site", tensor(INF, 4.0), tensor(1.0, 4.0), BITWISE)
    assert gap is not None
    assert gap.detail == "1 of 2 differ, greatest inf at (0,), allowed 0 (bitwise: float32 eager)"
    quarter = compare_tensors("site", tensor(4.0), tensor(5.0), BITWISE)
    assert quarter is not None
    assert "(relative 2.5e-01)" in quarter.detail


def test_one_tensor_s_gap_if_there_is_one() -> None:
    assert not list(bitwise("site", tensor(1.0), tensor(1.0)))
    (gap,) = bitwise("site", tensor(1.0), NEAR[:1], kind="gradient")
    assert (gap.site, gap.kind) == ("site", "gradient")
    assert "allowed 0 (bitwise: float32 eager)" in gap.detail
    assert [gap.kind for gap in bitwise("site", tensor(1.0), NEAR[:1])] == ["value"]
    loose = Allowance(0.0, 1e-3, "loose")
    assert not list(within(loose, "site", tensor(1.0), NEAR[:1]))
    (gap,) = within(loose, "site", tensor(1.0), tensor(1.1), kind="gradient")
    assert (gap.site, gap.kind) == ("site", "gradient")
    assert [gap.kind for gap in within(loose, "site", tensor(1.0), tensor(1.1))] == ["value"]


def test_a_label_stands_before_the_site_and_changes_nothing_else() -> None:
    gap = Gap("site", "value", "off", 1.0, (2,))
    assert (
        list(labelled("in a copy", [gap, gap]))
        == [Gap("in a copy: site", "value", "off", 1.0, (2,))] * 2
    )


@pytest.mark.parametrize("what", ["values", "gradients", "parameter_gradients"])
def test_an_allowance_of_its_own_is_of_one_name(what: str) -> None:
    names = ("first", "second")
    due = {name: tensor(1.0, 2.0) for name in names}
    off = {name: tensor(1.0, 2.5) for name in names}
    expected = observed(**{what: due}, fired=names, fired_backward=names[::-1])
    actual = replace(expected, **{what: off})  # type: ignore[arg-type]
    allowed = {"second": Allowance(0.0, 1.0, "half is nothing")}
    gaps = {
        "values": lambda: compare_values(expected, actual, SITES, allowances=allowed),
        "gradients": lambda: compare_gradients(expected, actual, SITES, allowed),
        "parameter_gradients": lambda: compare_parameters(expected, actual, allowed),
    }[what]()
    assert [gap.site for gap in gaps] == ["first"]


def test_a_parameter_that_is_alike_does_not_end_the_comparison() -> None:
    due = {"a": tensor(1.0), "b": None, "c": tensor(1.0), "d": None, "e": tensor(1.0)}
    expected = observed(parameter_gradients=due)
    actual = replace(expected, parameter_gradients={**due, "a": tensor(2.0)})
    assert kinds(compare_parameters(expected, actual)) == [("a", "gradient")]
