"""How far two tensors may be apart, and why. Anything not named here may not differ at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch

from conformance.sites import Site


@dataclass(frozen=True)
class Allowance:
    """A bound on ``|actual - expected|``: ``atol + rtol * |expected|``.

    Attributes:
        rtol: Relative part.
        atol: Absolute part.
        reason: Where the bound comes from, shown with every gap.
    """

    rtol: float
    atol: float
    reason: str

    @property
    def exact(self) -> bool:
        """Whether every bit must agree."""
        return self.rtol == 0 and self.atol == 0

    def __str__(self) -> str:
        bound = "0" if self.exact else f"{self.atol:.1e} + {self.rtol:.1e} * |expected|"
        return f"{bound} ({self.reason})"


FLOAT32_ULP = 2.0**-23

# A LayerNorm's inside, recomputed beside the fused kernel: a mean, a sum of squares, a root and a
# division, rounded in another order or, by a float64 model, in float64. What is rounded first is
# the input, so that its greatest entry sets the scale of the error and not its often much smaller
# distance from the mean. In ulp of what `of_value` and `of_gradient` write out, the greatest errors
# of a right LayerNorm, over 800 drawn cases on transformer_lens 4.3.0, were 1.4 for
# hook_normalized, 0.5 for hook_scale and 1.1 for the latter's gradient; on rows of up to 4,096
# entries, some of them nearly constant, 2.2 and 0.7 for the first two. In ulp of the tensor's own
# greatest entry such cases gave 29, and 6,000 for the gradient. An eps of 1e-6 for 1e-5 is off by
# 38 at a variance of 1, by 380 at one of 0.1.
_RECOMPUTED = 8 * FLOAT32_ULP

# Both sides take the mean of the same log-probabilities, in another order: Hugging Face by one
# fused cross entropy, transformer_lens by a log_softmax and a gather. In float32 at most 2.9 ulp of
# the loss over 20,000 drawn logits, and 2.1 over 800 drawn cases.
_LOSS = 8 * FLOAT32_ULP

# A sum of products in another order, in eps of the sum of their sizes: at most 0.51 over 210 drawn
# cases of edits behind flags and of renamed vocabularies, gradients included, in every dtype.
_SUM = 2.0

# Another way of computing the same, in what one rounding of every number moves it and an ulp of the
# greatest together: by a single nudged run at most 0.9 over 280 drawn cases of four relations, but
# 146 in one of 250 padded ones, whose clip left one entry, at which the nudge cancelled. So there
# are four nudged runs, and the greatest of their moves counts.
_NUDGES = 8.0

# Processed weights, in the same: at most 0.6 over 550 drawn cases.
PROCESSED_NUDGES = 2.0


def exactly(dtype: torch.dtype) -> Allowance:
    """No difference at all: the same operations on the same numbers, in every dtype."""
    return Allowance(0.0, 0.0, f"bitwise: {str(dtype).removeprefix('torch.')} eager")


def _eps(dtype: torch.dtype) -> float:
    """The rounding to a dtype shorter than float32; nothing for the others."""
    return 0.0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps


def _greatest(size: torch.Tensor) -> float:
    """The greatest finite entry: an edit may well have put a zero under a fraction."""
    finite = size[size.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


class _Norm:
    """What the reference showed of the LayerNorm that a derived site belongs to, in float64."""

    def __init__(self, site: Site, key: str, values: Mapping[str, torch.Tensor]) -> None:
        self.name, _, hook = site.name.rpartition(".")
        chunk = key.removeprefix(site.name)

        def seen(hook: str) -> torch.Tensor:
            return values[f"{self.name}.{hook}{chunk}"].double()

        self.is_scale = hook == "hook_scale"
        self.input = seen("hook_in").abs().amax(-1, keepdim=True)
        self.scale = seen("hook_scale").abs()
        self.normalized = seen("hook_normalized").abs()


def of_value(site: Site, key: str, values: Mapping[str, torch.Tensor]) -> Allowance:
    """The allowance of a site's value, in ulp where the site is derived.

    With ``x`` for the LayerNorm's input, ``hook_scale`` is allowed some ulp of ``scale + max|x|``,
    and ``hook_normalized`` of ``normalized + max|x| / scale``. Of the latter one side may also keep
    float32 where the other rounds to a shorter dtype, or fall on the neighbouring number.

    Args:
        site: The site.
        key: The value's name, which has the chunk in it.
        values: All that the reference showed.
    """
    dtype = values[key].dtype
    if not site.derived:
        return exactly(dtype)
    norm = _Norm(site, key, values)
    size = norm.input if norm.is_scale else norm.input / norm.scale
    atol = _RECOMPUTED * _greatest(size)
    return Allowance(_RECOMPUTED + _eps(dtype), atol, f"derived: {site.derived}")


def of_gradient(
    site: Site, values: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]
) -> Allowance:
    """The allowance of a site's gradient. Only that of ``hook_scale`` has one.

    It is the sum of ``-gradient * normalized / scale`` over the LayerNorm's output, of terms of
    either sign: an error of some ulp of each stays when they cancel. The gradient of
    ``hook_normalized`` is that of the output, with nothing to round.

    Args:
        site: The site.
        values: All that the reference showed, in one chunk.
        gradients: All the gradients that it showed.
    """
    norm = _Norm(site, site.name, values) if site.derived else None
    if norm is None or not norm.is_scale:
        return exactly(gradients[site.name].dtype)
    arriving = gradients[f"{norm.name}.hook_out"].double().abs()
    terms = arriving * (norm.normalized + norm.input / norm.scale) / norm.scale
    atol = _RECOMPUTED * _greatest(terms.sum(-1))
    return Allowance(_RECOMPUTED, atol, f"derived: {site.derived}")


def of_loss(dtype: torch.dtype) -> Allowance:
    """The allowance of a loss computed by each side's own formula.

    Args:
        dtype: The logits' dtype. transformer_lens takes the log-softmax in it, Hugging Face always
            in float32. In a shorter one the logarithm of a sum near 1 is rounded to an entry of
            size 1, however small the loss: measured up to 0.5 eps beyond the relative part.
    """
    bound = _LOSS + _eps(dtype)
    reason = "another order of summation in float32, or the log-softmax in a shorter dtype"
    return Allowance(bound, _eps(dtype), reason)


def of_second_derivative(expected: torch.Tensor) -> Allowance:
    """The allowance of a gradient of a gradient, taken through observed LayerNorms.

    Args:
        expected: The reference's. Its entries are sums of terms of either sign as large as the
            greatest of them, added up in another order: measured up to 1.8e-6 of the greatest
            over 500 drawn cases of eight entries a position and more. A wrong formula is off by the
            greatest itself.
    """
    greatest = float(expected.abs().max()) if expected.numel() else 0.0
    return Allowance(0.0, 1e-5 * greatest, "1e-5 of the greatest entry: another order of summation")


def of_log_probabilities() -> Allowance:
    """The allowance of log-probabilities after weights were processed, in float32.

    Folding and centering change the weights and so the rounding of every product; the function
    stays. Measured up to 2e-5 on tiny models with weights of size 0.3, over all sets of processing,
    15 geometries and every activation; a bias folded past a binding clamp is off by 1 and more.
    """
    return Allowance(0.0, 5e-5, "processed weights: other roundings of the same function")


def of_sum_by_head(expected: torch.Tensor) -> Allowance:
    """The allowance of what is summed head by head where Hugging Face takes one product.

    Args:
        expected: The reference's logits or gradient, on whose greatest entry the rounding depends.
            This project's adapter needs none of it; upstream's was up to 1e-4 of it off over 150
            drawn cases, where gradients nearly cancel. A bias that is lost is off by a tenth.
    """
    greatest = float(expected.abs().max()) if expected.numel() else 0.0
    return Allowance(0.0, 1e-3 * max(greatest, 1e-3), "summed by head: another order of summation")


def of_other_attention(greatest: float, sdpa: torch.Tensor, eager: torch.Tensor) -> Allowance:
    """The allowance of what an eager bridge and a reference with sdpa attention compute.

    Args:
        greatest: The greatest entry of all that is rounded together: of the logits, or of the
            gradients of all parameters, which may each cancel to nothing. Of eight entries a
            position and more, eager and sdpa references were at most 2.4e-6 and 6.2e-6 of it apart
            over 1,480 drawn cases. A dropped mask or scale is off by a tenth.
        sdpa: What the reference with sdpa attention has.
        eager: What the eager reference has: as far from the other as this, any eager model may be.
            Three blocks may make 2.8e-5 of the greatest entry out of what float32 rounds.
    """
    apart = _greatest((sdpa.double() - eager.double()).abs())
    reason = "2e-5 of the greatest entry, or what Hugging Face's own differ by: another order"
    return Allowance(0.0, max(2e-5 * greatest, apart), reason)


def of_chunks(expected: torch.Tensor) -> Allowance:
    """The allowance of logits that were computed a chunk at a time over a cache.

    Args:
        expected: The reference's, in one forward. The products have other sizes, and so add in
            another order: the reference itself, fed in chunks, was at most 2.8e-6 of the greatest
            entry off over 2,500 drawn cases in float32 and float64. A wrong position or a lost key
            is off by a tenth.
    """
    greatest = float(expected.abs().max()) if expected.numel() else 0.0
    return Allowance(0.0, 1e-5 * greatest, "1e-5 of the greatest entry: products of other sizes")


def of_product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> Allowance:
    """The allowance of a product of matrices that was taken in ``dtype``.

    Args:
        left: The left factor in float64, ``[..., row, inner]``.
        right: The right one, ``[..., inner, column]``.
        dtype: What it was taken in. A sum of products is rounded in eps of the sum of their sizes,
            once or, in another order, some times: of the greatest of these sums at most 1.1 eps in
            float32 and 0.5 in shorter dtypes, over 1,450 drawn models; longer sums wander, 96
            products up to 2.2 eps. Two heads that are mixed up are off by the sum itself.
    """
    greatest = _greatest(left.abs() @ right.abs())
    atol = max(2.0, sqrt(left.shape[-1]) / 2) * torch.finfo(dtype).eps * greatest
    return Allowance(0.0, atol, "a product of matrices: another order of summation")


def of_composition(dtype: torch.dtype) -> Allowance:
    """The allowance of a composition score, a number between 0 and 1.

    Args:
        dtype: What it was computed in: float32 at least. transformer_lens goes through singular
            values where the definition takes norms of dense products: measured up to 4 eps in
            float32, and 11 in float64, where the definition is rounded as much, over 1,450 drawn
            models. A pair of heads that is mixed up is off by a hundredth and more.
    """
    atol = (32 if dtype == torch.float64 else 16) * torch.finfo(dtype).eps
    return Allowance(0.0, atol, "singular values instead of dense products")


def of_eigenvalues(dtype: torch.dtype) -> Allowance:
    """The allowance of the sum of a circuit's eigenvalues, or of their squares.

    Args:
        dtype: What they were computed in: float32 or float64. A sum is told in units of the norm of
            all sizes that were multiplied, or of its square: measured up to 4.4 eps in float32, and
            5.3 in float64, over 500 drawn models and the trained one. A head that is mixed up is
            off by a hundredth and more.
    """
    return Allowance(0.0, 16 * torch.finfo(dtype).eps, "eigenvalues instead of traces")


def of_processed(size: torch.Tensor, dtype: torch.dtype) -> Allowance:
    """The allowance of a weight that processing took a mean out of, or summed a bias into.

    Args:
        size: The sizes of what was summed, in float64.
        dtype: The model's. Shorter ones are processed in float32 and rounded at the end. Measured
            up to 0.95 eps of the greatest size in float32 and float64, over 500 drawn cases; a
            mean along the wrong axis is off by a tenth.
    """
    wide = torch.promote_types(dtype, torch.float32)
    atol = 2 * torch.finfo(wide).eps * _greatest(size.abs())
    return Allowance(_eps(dtype), atol, "processed weights: another order of summation")


def of_head_product(size: torch.Tensor, dtype: torch.dtype) -> Allowance:
    """The allowance of one head's share of an output, which Hugging Face never computes by itself.

    Args:
        size: The sum of the absolute values of its terms, which its rounding depends on.
        dtype: Of the model. In ulp of it, and of the greatest size together with the product, the
            greatest error over 800 drawn cases was 0.5, and 0.01 in the short dtypes, whose
            products are added up in float32.
    """
    eps = torch.finfo(dtype).eps
    return Allowance(eps, eps * _greatest(size), "a head's own product: another order of summation")


def of_loss_gradient(dtype: torch.dtype, pairs: int) -> Allowance:
    """The allowance of the gradient of a loss by the logits, each side having its own formula.

    Args:
        dtype: Of the logits, in which transformer_lens takes the log-softmax and its gradient.
        pairs: How many predictions the loss is the mean of: each has its share of the gradient.
            In ulp of a share and of the entry together the greatest error over 800 drawn cases was
            0.8, in every dtype.
    """
    eps = torch.finfo(dtype).eps
    return Allowance(2 * eps, 2 * eps / pairs, "the log-softmax and its gradient, by each formula")


def of_attribution(size: torch.Tensor, dtype: torch.dtype) -> Allowance:
    """The allowance of a part's share of a logit difference, or of the sum of such shares.

    Args:
        size: The sum of the absolute values of its terms, in float64: of a sum of shares, and of
            what is left when some are taken away, all of theirs.
        dtype: What it was computed in. Each term is rounded in eps of itself: in eps of the
            greatest size at most 0.7 for a share and 0.5 for the sum, over 1,100 drawn cases. A
            head that is taken for another is off by a tenth of the size and more.
    """
    atol = 2 * torch.finfo(dtype).eps * _greatest(size)
    return Allowance(0.0, atol, "a share of a logit, from its own terms")


def of_processed_attribution(size: torch.Tensor) -> Allowance:
    """As `of_attribution`, of a model whose weights were processed in float32.

    Args:
        size: The sum of the absolute values of all parts' terms: each part reads what those before
            it have rounded otherwise, through LayerNorms that enlarge it. Measured up to 17 eps of
            the greatest size for a share, and 2.1 for the sum, over 1,000 drawn cases.
    """
    atol = 64 * FLOAT32_ULP * _greatest(size)
    return Allowance(0.0, atol, "processed weights: other roundings in all parts before")


def of_sum(dtype: torch.dtype, size: float, *, through_norm: bool = False) -> Allowance:
    """The allowance of a sum that may be taken in another order.

    Args:
        dtype: Of what is summed.
        size: How much is added up at most, in absolute terms.
        through_norm: Whether it comes through a LayerNorm, which computes in float32.
    """
    bound = _SUM * max(torch.finfo(dtype).eps, FLOAT32_ULP if through_norm else 0.0)
    return Allowance(bound, bound * size, "another order of summation")


def of_rounding(
    plain: torch.Tensor, nudged: Sequence[torch.Tensor], times: float = _NUDGES
) -> Allowance:
    """The allowance of what is computed by another way that is equal but for its rounding.

    Args:
        plain: What a run gave.
        nudged: What the same run gave, some times, with each value on the way off by about one
            rounding. Where a clip leaves one entry of a tensor, one nudge may well cancel there.
        times: How often the greatest of their moves is allowed.
    """
    # A masked score is the least number there is, and says nothing of the others' size.
    unmasked = plain[plain.abs() < torch.finfo(plain.dtype).max / 2]
    greatest = _greatest(unmasked.abs())
    moved = max(_greatest((plain - other).abs()) for other in nudged)
    atol = times * (moved + FLOAT32_ULP * greatest)
    return Allowance(0.0, atol, "equal but for rounding: as far as roundings move the reference")


def of_pieces(
    size: torch.Tensor,
    dtype: torch.dtype,
    normalized: bool,
    processed: bool,
    *,
    moves: float = 0.0,
) -> Allowance:
    """The allowance of a piece of a residual stream that the reference has in no tensor of its own.

    Args:
        size: The sum of the absolute values of its terms: it grows with their number, and each of
            them is rounded in eps of it. For the sum of a stack it is that of all pieces, once more
            for every layer, which rounds its own sums.
        dtype: The model's. Over 4,200 drawn cases of 7 checks a piece was off by at most 1.4 eps of
            its greatest size (a head of a float64 model), by 1.1 in float32 and 0.9 in the short
            dtypes, and the sum of a stack by 0.25. A head that is another's is off by the size.
        normalized: Whether it was divided by a LayerNorm's scale, which is float32 in every dtype.
        processed: Whether weights were processed, which changes the rounding of all that came
            before: at most 10.2 eps over 600 drawn cases. A mean that is left in a writer is off
            by a tenth of the size.
        moves: By how many eps of its greatest entry roundings move any tensor of the reference's
            run of processed weights, where that is known: much behind a clip so tiny that what it
            leaves is no larger than the rounding of what it is given.
    """
    eps = torch.finfo(dtype).eps
    if normalized:
        eps = max(eps, FLOAT32_ULP)
    times = max(32, PROCESSED_NUDGES * moves) if processed else 3
    atol = times * eps * _greatest(size)
    return Allowance(0.0, atol, "pieces by hand: another order of summation")
