"""Each allowance lets a right computation through, and no mutant just above it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss

from conformance.compare import compare_tensors
from conformance.sites import sites
from conformance.spec import ModelSpec
from conformance.tolerance import (
    FLOAT32_ULP,
    Allowance,
    exactly,
    of_attribution,
    of_chunks,
    of_composition,
    of_gradient,
    of_head_product,
    of_log_probabilities,
    of_loss,
    of_loss_gradient,
    of_other_attention,
    of_pieces,
    of_processed,
    of_processed_attribution,
    of_product,
    of_rounding,
    of_second_derivative,
    of_sum,
    of_sum_by_head,
    of_value,
)

torch.set_num_threads(1)  # on small tensors, threads only wait for each other

ULP = FLOAT32_ULP
TABLE = sites(ModelSpec())
SCALE, NORMALIZED = TABLE["ln_final.hook_scale"], TABLE["ln_final.hook_normalized"]
LONG = (torch.float32, torch.float64)
SHORT = (torch.bfloat16, torch.float16)
EPS = 1e-5

Tensors = dict[str, torch.Tensor]


def agree(expected: torch.Tensor, actual: torch.Tensor, allowance: Allowance) -> bool:
    return compare_tensors("site", expected, actual, allowance, any_wider=True) is None


def scratch(x: torch.Tensor, *, eps: float = EPS, unbiased: bool = False) -> Tensors:
    """A LayerNorm's sites from its definition, in the dtype of ``x``, by a reciprocal root."""
    variance = x.var(-1, keepdim=True, unbiased=unbiased) + eps
    normalized = (x - x.mean(-1, keepdim=True)) * variance.rsqrt()
    return {"ln_final.hook_scale": variance.sqrt(), "ln_final.hook_normalized": normalized}


def reference(x: torch.Tensor) -> Tensors:
    """A LayerNorm's sites as Hugging Face's float32 kernel has them and the taps recompute them."""
    wide = x.float()
    centered = wide - wide.mean(-1, keepdim=True)
    return {
        "ln_final.hook_in": x,
        "ln_final.hook_scale": (centered.pow(2).mean(-1, keepdim=True) + EPS).sqrt(),
        "ln_final.hook_normalized": F.layer_norm(wide, x.shape[-1:], eps=EPS).to(x.dtype),
    }


ROWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda x: x,
    "far from zero": lambda x: x + 30,
    "nearly constant": lambda x: 3 + 3e-3 * x,
    "small": lambda x: 1e-3 * x,
}


def rows(kind: str, width: int, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator().manual_seed(width)
    return ROWS[kind](torch.randn(50, width, generator=draw, dtype=torch.float64)).to(dtype)


# --- the edges


@pytest.mark.parametrize(
    "allowance",
    [
        Allowance(0.0, 0.25, "only absolute"),
        Allowance(0.25, 0.0, "only relative"),
        Allowance(0.125, 0.5, "both"),
        of_loss(torch.float32),
        of_loss(torch.bfloat16),
        of_second_derivative(torch.tensor([3.0, -5.0])),
        of_log_probabilities(),
    ],
    ids=str,
)
def test_just_inside_passes_and_just_above_dies(allowance: Allowance) -> None:
    for entry in (3.0, -5.0):
        expected = torch.tensor([0.0, entry], dtype=torch.float64)
        bound = allowance.atol + allowance.rtol * abs(entry)
        assert bound > 0
        for side in (-1, 1):
            off = torch.tensor([0.0, side * bound], dtype=torch.float64)
            assert agree(expected, expected + off * (1 - 1e-6), allowance)
            assert not agree(expected, expected + off * (1 + 1e-6), allowance)


@pytest.mark.parametrize("dtype", [*LONG, *SHORT])
def test_nothing_that_is_not_named_may_differ(dtype: torch.dtype) -> None:
    allowance = exactly(dtype)
    assert allowance.exact
    one = torch.ones(1, dtype=dtype)
    for towards in (0.0, 2.0):
        near = torch.nextafter(one, torch.full_like(one, towards))
        assert not agree(one, near, allowance)
    for name, site in TABLE.items():
        if not site.derived:
            assert of_value(site, name, {name: one}).exact
            assert of_gradient(site, {}, {name: one}).exact


def test_an_allowance_says_what_it_is() -> None:
    assert str(exactly(torch.float64)) == "0 (bitwise: float64 eager)"
    assert str(Allowance(1e-5, 2e-6, "why")) == "2.0e-06 + 1.0e-05 * |expected| (why)"
    assert not Allowance(0.0, 1e-9, "why").exact
    assert not Allowance(1e-9, 0.0, "why").exact
    x = torch.ones(1, 2)
    for site in (SCALE, NORMALIZED):
        assert site.derived in str(of_value(site, site.name, reference(x)))


# --- what is derived: hook_scale and hook_normalized


def test_the_bounds_of_derived_values_are_those_of_the_formula() -> None:
    x = torch.tensor([[2.0, -4.0], [0.5, 0.25]])
    values = {
        "ln_final.hook_in": x,
        "ln_final.hook_scale": torch.tensor([[8.0], [0.25]]),
        "ln_final.hook_normalized": torch.ones(2, 2),
    }
    scale = of_value(SCALE, SCALE.name, values)
    assert (scale.rtol, scale.atol) == (8 * ULP, 8 * ULP * 4.0)
    normalized = of_value(NORMALIZED, NORMALIZED.name, values)
    assert (normalized.rtol, normalized.atol) == (8 * ULP, 8 * ULP * 2.0)
    for dtype in SHORT:
        short = values | {NORMALIZED.name: torch.ones(2, 2, dtype=dtype)}
        allowance = of_value(NORMALIZED, NORMALIZED.name, short)
        assert allowance.rtol == 8 * ULP + torch.finfo(dtype).eps


def test_the_bound_of_a_chunk_comes_of_that_chunk() -> None:
    values = {f"{name}#1": tensor for name, tensor in reference(torch.tensor([[1.0, 5.0]])).items()}
    values |= reference(torch.tensor([[1.0, 2.0]]))
    assert of_value(SCALE, SCALE.name, values).atol == 8 * ULP * 2.0
    assert of_value(SCALE, f"{SCALE.name}#1", values).atol == 8 * ULP * 5.0


def test_an_edited_scale_of_zero_allows_no_more() -> None:
    values = reference(torch.tensor([[1.0, 2.0], [3.0, 1.0]]))
    values[SCALE.name] = torch.tensor([[0.0], [0.5]])
    assert of_value(NORMALIZED, NORMALIZED.name, values).atol == 8 * ULP * 6.0
    values[SCALE.name] = torch.zeros(2, 1)
    assert of_value(NORMALIZED, NORMALIZED.name, values).atol == 0


def test_the_bound_of_a_scale_s_gradient_counts_the_terms_and_not_their_sum() -> None:
    values = {
        "ln_final.hook_in": torch.tensor([[2.0, -4.0]]),
        "ln_final.hook_scale": torch.tensor([[0.5]]),
        "ln_final.hook_normalized": torch.tensor([[1.0, 1.0]]),
    }
    gradients = {
        "ln_final.hook_out": torch.tensor([[3.0, -3.0]]),
        "ln_final.hook_scale": torch.tensor([[0.0]]),
        "ln_final.hook_normalized": torch.tensor([[3.0, -3.0]]),
    }
    allowance = of_gradient(SCALE, values, gradients)
    assert allowance.rtol == 8 * ULP
    assert allowance.atol == 8 * ULP * 2 * 3.0 * (1 + 4.0 / 0.5) / 0.5
    assert of_gradient(NORMALIZED, values, gradients).exact


@pytest.mark.parametrize("dtype", LONG)
@pytest.mark.parametrize("width", [2, 3, 24, 4096])
@pytest.mark.parametrize("kind", ROWS)
def test_a_right_layer_norm_with_other_roundings_passes(
    kind: str, width: int, dtype: torch.dtype
) -> None:
    x = rows(kind, width, dtype)
    expected = reference(x)
    for own in (x, x.float()):
        actual = scratch(own)
        for site in (SCALE, NORMALIZED):
            allowance = of_value(site, site.name, expected)
            assert agree(expected[site.name], actual[site.name].to(dtype), allowance), site.name


@pytest.mark.parametrize("dtype", SHORT)
def test_a_short_dtype_may_be_rounded_or_not(dtype: torch.dtype) -> None:
    x = rows("plain", 24, dtype)
    expected = reference(x)
    allowance = of_value(NORMALIZED, NORMALIZED.name, expected)
    wide = scratch(x.float())[NORMALIZED.name]
    due = expected[NORMALIZED.name]
    assert agree(due, wide, allowance)
    assert agree(due, torch.nextafter(due, torch.full_like(due, 9.0)), allowance)
    assert not agree(due, due + 4 * torch.finfo(dtype).eps, allowance)


@pytest.mark.parametrize("width", [2, 24, 4096])
@pytest.mark.parametrize("mutant", [{"eps": 1e-6}, {"eps": 1.5e-5}, {"unbiased": True}], ids=str)
def test_a_wrong_layer_norm_dies(mutant: dict[str, float | bool], width: int) -> None:
    x = 0.3 * rows("plain", width, torch.float32)  # of the size that drawn embeddings have
    expected, actual = reference(x), scratch(x, **mutant)  # type: ignore[arg-type]
    for site in (SCALE, NORMALIZED):
        allowance = of_value(site, site.name, expected)
        assert not agree(expected[site.name], actual[site.name], allowance), site.name


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("width", [2, 24, 4096])
def test_a_scale_s_gradient_from_scratch_passes_and_a_wrong_one_dies(kind: str, width: int) -> None:
    x = rows(kind, width, torch.float32)
    values = reference(x)
    arriving = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    scale = values[SCALE.name].clone().requires_grad_()
    ((x - x.mean(-1, keepdim=True)) / scale).backward(arriving)  # type: ignore[no-untyped-call]
    assert scale.grad is not None
    gradients = {"ln_final.hook_out": arriving, SCALE.name: scale.grad}
    allowance = of_gradient(SCALE, values, gradients)
    wide = x.double() - x.double().mean(-1, keepdim=True)
    right = -(arriving.double() * wide).sum(-1, keepdim=True) / scale.detach().double() ** 2
    assert agree(scale.grad, right.float(), allowance)
    assert not agree(scale.grad, torch.zeros_like(scale.grad), allowance)
    assert not agree(scale.grad, (right * scale.detach()).float(), allowance)
    if kind != "nearly constant":
        assert not agree(scale.grad, (1.01 * right).float(), allowance)


# --- the loss


def losses(dtype: torch.dtype, *, confident: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hugging Face's and transformer_lens' loss of the same drawn logits."""
    draw = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(1, 4, 10, generator=draw)).to(dtype)
    tokens = torch.randint(0, 10, (1, 4), generator=draw)
    if confident:
        tokens[:, 1:] = logits.argmax(-1)[:, :-1]
    due = F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:])
    return due, lm_cross_entropy_loss(logits, tokens).float()


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *SHORT])
def test_transformer_lens_loss_passes(dtype: torch.dtype, confident: bool) -> None:
    for seed in range(100):
        due, got = losses(dtype, confident=confident, seed=seed)
        assert agree(due, got, of_loss(dtype)), (due, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SHORT])
def test_a_loss_over_other_pairs_dies(dtype: torch.dtype) -> None:
    for seed in range(20):
        due, _ = losses(dtype, confident=False, seed=seed)
        assert not agree(due, due * 31 / 32, of_loss(dtype))  # one pair too many of 31


def test_a_float32_loss_may_not_be_rounded_to_a_shorter_dtype() -> None:
    due = torch.tensor(1.2345)
    for dtype in SHORT:
        assert not agree(due, due.to(dtype).float(), of_loss(torch.float32))


# --- the others


def test_a_second_derivative_is_measured_by_its_greatest_entry() -> None:
    expected = torch.tensor([100.0, 1e-6, -1.0])
    allowance = of_second_derivative(expected)
    assert agree(expected, expected + 0.9e-3, allowance)
    assert not agree(expected, expected + 1.1e-3, allowance)
    assert of_second_derivative(torch.zeros(3)).exact
    assert of_second_derivative(torch.zeros(0)).exact


def test_log_probabilities_have_an_absolute_bound() -> None:
    for expected in torch.tensor([-20.0, -0.1]):
        assert agree(expected, expected + 4e-5, of_log_probabilities())
        assert not agree(expected, expected + 6e-5, of_log_probabilities())


# --- each bound, in numbers: nobody widens one by accident

F32, F64, BF16 = 2.0**-23, 2.0**-52, 2.0**-7
SIZES = torch.tensor([[1.0, -4.0], [torch.inf, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "rtol", "atol", "reason"),
    [
        (lambda: exactly(torch.bfloat16), 0, 0, "bitwise: bfloat16 eager"),
        (lambda: of_loss(torch.float32), 8 * F32, 0, "another order of summation in float32"),
        (
            lambda: of_loss(torch.bfloat16),
            8 * F32 + BF16,
            BF16,
            "the log-softmax in a shorter dtype",
        ),
        (
            lambda: of_second_derivative(torch.tensor([3.0, -5.0])),
            0,
            5e-5,
            "1e-5 of the greatest entry",
        ),
        (of_log_probabilities, 0, 5e-5, "processed weights: other roundings"),
        (lambda: of_sum_by_head(torch.tensor([2.0, -3.0])), 0, 3e-3, "summed by head"),
        (lambda: of_sum_by_head(torch.tensor([1e-9])), 0, 1e-6, "summed by head"),
        (lambda: of_sum_by_head(torch.zeros(0)), 0, 1e-6, "summed by head"),
        (
            lambda: of_other_attention(4.0, torch.zeros(2), torch.tensor([1e-5, -7e-5])),
            0,
            8e-5,
            "2e-5 of the greatest entry, or",
        ),
        (
            lambda: of_other_attention(4.0, torch.ones(2), torch.tensor([1.5, float("nan")])),
            0,
            0.5,
            "what Hugging Face's own differ by",
        ),
        (
            lambda: of_chunks(torch.tensor([2.0, -3.0])),
            0,
            3e-5,
            "1e-5 of the greatest entry: products",
        ),
        (lambda: of_chunks(torch.zeros(0)), 0, 0, "products of other sizes"),
        # [1, 4] @ [1, 2] and [1, 4] @ [3, 4] are 9 and 19; [2, 1] has 4 and 10.
        (
            lambda: of_product(
                torch.tensor([[1.0, -4.0], [2.0, 1.0]]),
                torch.tensor([[1.0, -3.0], [-2.0, 4.0]]),
                torch.float32,
            ),
            0,
            2 * F32 * 19,
            "a product of matrices",
        ),
        (
            lambda: of_product(torch.ones(5, 64), torch.ones(64, 1), torch.float32),
            0,
            4 * F32 * 64,
            "another order of summation",
        ),
        (lambda: of_composition(torch.float32), 0, 16 * F32, "singular values"),
        (lambda: of_composition(torch.float64), 0, 32 * F64, "singular values"),
        (lambda: of_processed(SIZES, torch.float32), 0, 2 * F32 * 4, "processed weights"),
        (lambda: of_processed(SIZES, torch.float64), 0, 2 * F64 * 4, "another order of summation"),
        (lambda: of_processed(SIZES, torch.bfloat16), BF16, 2 * F32 * 4, "processed weights"),
        (
            lambda: of_head_product(SIZES.abs(), torch.bfloat16),
            BF16,
            BF16 * 4,
            "a head's own product",
        ),
        (lambda: of_loss_gradient(torch.float32, 4), 2 * F32, 2 * F32 / 4, "by each formula"),
        (lambda: of_attribution(SIZES.abs(), torch.float32), 0, 8 * F32, "a share of a logit"),
        (lambda: of_attribution(SIZES.abs(), torch.bfloat16), 0, 8 * BF16, "from its own terms"),
        (lambda: of_processed_attribution(SIZES.abs()), 0, 256 * F32, "in all parts before"),
        (
            lambda: of_pieces(SIZES.abs(), torch.float64, False, False),
            0,
            12 * F64,
            "pieces by hand",
        ),
        (lambda: of_pieces(SIZES.abs(), torch.float64, True, False), 0, 12 * F32, "pieces by hand"),
        (lambda: of_pieces(SIZES.abs(), torch.bfloat16, True, True), 0, 128 * BF16, "summation"),
        (lambda: of_sum(torch.float64, 3.0), 2 * F64, 6 * F64, "another order of summation"),
        (lambda: of_sum(torch.float64, 3.0, through_norm=True), 2 * F32, 6 * F32, "summation"),
        (lambda: of_sum(torch.bfloat16, 3.0, through_norm=True), 2 * BF16, 6 * BF16, "summation"),
    ],
)
def test_a_bound_is_what_was_measured(
    make: Callable[[], Allowance], rtol: float, atol: float, reason: str
) -> None:
    allowance = make()  # here, so that a mutated bound is the one that is looked at
    assert allowance.rtol == pytest.approx(rtol, rel=1e-12, abs=0)
    assert allowance.atol == pytest.approx(atol, rel=1e-12, abs=0)
    assert reason in allowance.reason


def test_a_rounding_is_the_greatest_of_the_nudged_runs_and_masked_scores_have_no_size() -> None:
    lowest = torch.finfo(torch.float32).min
    plain = torch.tensor([1.0, -4.0, lowest])
    nudged = [plain.clone(), plain + torch.tensor([0.0, 2.0**-10, 0.0])]
    allowance = of_rounding(plain, nudged)
    assert allowance.rtol == 0
    assert allowance.atol == pytest.approx(8 * (2.0**-10 + 4 * F32), rel=1e-12, abs=0)
    twice = of_rounding(plain, nudged, 2.0)
    assert twice.atol == pytest.approx(2 * (2.0**-10 + 4 * F32), rel=1e-12, abs=0)
    assert "as far as roundings move the reference" in allowance.reason


@pytest.mark.parametrize("dtype", [*LONG, *SHORT], ids=str)
def test_pieces_may_be_summed_in_another_order_and_no_term_is_missed(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(7)
    for _ in range(200):
        terms = torch.randn((8, 16), generator=draw).to(dtype)
        due, size = terms.double().sum(0), terms.double().abs().sum(0)
        got = (torch.ones(8, dtype=dtype) @ terms).double()
        allowance = of_pieces(size, dtype, False, False)
        assert agree(due, got, allowance)
        assert not agree(due, got + 4 * torch.finfo(dtype).eps * size.max(), allowance)


def test_the_allowance_of_pieces_knows_a_float32_scale_and_processing() -> None:
    size = torch.tensor([0.5, 2.0], dtype=torch.double)
    for normalized, processed, factor in (
        (False, False, 3 * 2.0**-52),
        (True, False, 3 * ULP),
        (True, True, 32 * ULP),
    ):
        allowance = of_pieces(size, torch.float64, normalized, processed)
        assert (allowance.atol, allowance.rtol) == (2 * factor, 0)
    for moves, factor in ((3.0, 32), (500.0, 1000)):
        allowance = of_pieces(size, torch.float32, False, True, moves=moves)
        assert (allowance.atol, allowance.rtol) == (2 * factor * ULP, 0)
    assert of_pieces(size, torch.float32, False, False, moves=500.0).atol == 6 * ULP
