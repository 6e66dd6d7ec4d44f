"""How far two tensors may be apart, and why. Anything not named here may not differ at all."""

from __future__ import annotations

from dataclasses import dataclass

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

# The denominator and the quotient of a LayerNorm, recomputed beside the fused kernel in float32:
# a mean, a sum of squares, a root and a division, each rounded once, over hidden sizes up to some
# dozens (published sizes sum in blocks and stay below too). Measured over 2,000 drawn cases on
# transformer_lens 4.3.0: at most 6 ulp of the greatest entry.
_RECOMPUTED = 16 * FLOAT32_ULP

# Both sides take the mean of the same float32 log-probabilities, in another order: Hugging Face by
# one fused cross entropy, transformer_lens by a log_softmax and a gather. Measured over 2,000 drawn
# cases: at most 4 ulp of the loss.
_LOSS = 16 * FLOAT32_ULP


def exactly(dtype: torch.dtype) -> Allowance:
    """No difference at all: the same operations on the same numbers, in every dtype."""
    return Allowance(0.0, 0.0, f"bitwise: {str(dtype).removeprefix('torch.')} eager")


def of_site(site: Site, dtype: torch.dtype) -> Allowance:
    """The allowance of a site's value or gradient.

    Args:
        site: The site.
        dtype: The reference's dtype there. A derived value that one side rounds to a shorter dtype
            may also fall on the neighbouring number.
    """
    if not site.derived:
        return exactly(dtype)
    rounding = 0.0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
    return Allowance(_RECOMPUTED + rounding, _RECOMPUTED, f"derived: {site.derived}")


def of_loss(dtype: torch.dtype) -> Allowance:
    """The allowance of a loss computed by each side's own formula.

    Args:
        dtype: The logits' dtype. transformer_lens takes the log-softmax in it, Hugging Face always
            in float32.
    """
    rounding = 0.0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
    return Allowance(_LOSS + rounding, 0.0, "another order of summation in float32")


def of_second_derivative(expected: torch.Tensor) -> Allowance:
    """The allowance of a gradient of a gradient, taken through observed LayerNorms.

    Args:
        expected: The reference's. Its entries are sums of terms of either sign as large as the
            greatest of them, added up in another order: measured up to 1e-6 of the greatest over
            300 drawn cases. A wrong formula is off by the greatest itself.
    """
    greatest = float(expected.abs().max()) if expected.numel() else 0.0
    return Allowance(0.0, 1e-5 * greatest, "1e-5 of the greatest entry: another order of summation")


def of_log_probabilities() -> Allowance:
    """The allowance of log-probabilities after weights were processed, in float32.

    Folding and centering change the weights and so the rounding of every product; the function
    stays. Five times the level that was measured on tiny models with weights of size 0.3.
    """
    return Allowance(0.0, 5e-5, "processed weights: other roundings of the same function")
