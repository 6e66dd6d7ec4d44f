"""What every value of a spec is asked when it is made, and the one error that says no."""

from __future__ import annotations

import math
from collections.abc import Iterable


class SpecError(ValueError):
    """A value no model or run can have: names the field, the value and what is allowed."""

    def __init__(self, field_name: str, value: object, allowed: str) -> None:
        """Keep the three parts of the message, which is all that a caller needs."""
        super().__init__(f"{field_name}={value!r}: must be {allowed}")
        self.field, self.value, self.allowed = field_name, value, allowed

    def __reduce__(self) -> tuple[type[SpecError], tuple[str, object, str]]:
        """Pickle by the parts: pytest-xdist sends exceptions between processes."""
        return type(self), (self.field, self.value, self.allowed)


def require(holds: bool, field_name: str, value: object, allowed: str) -> None:
    """Raise a `SpecError` unless it holds."""
    if not holds:
        raise SpecError(field_name, value, allowed)


def integer(spec: object, names: Iterable[str], low: int, high: int | None = None) -> None:
    """Require integers, no booleans, of at least ``low`` and at most ``high``."""
    allowed = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
    for name in names:
        value = getattr(spec, name)
        good = type(value) is int and value >= low and (high is None or value <= high)
        require(good, name, value, allowed)


def finite(value: object) -> bool:
    """Whether it is a number that a float can hold (an integer of JSON may be any size)."""
    try:
        return type(value) in (int, float) and math.isfinite(float(value))  # type: ignore[arg-type]
    except OverflowError:
        return False


def positive(spec: object, *names: str) -> None:
    """Require finite numbers above 0."""
    for name in names:
        value = getattr(spec, name)
        require(finite(value) and value > 0, name, value, "a finite number above 0")


def boolean(spec: object, *names: str) -> None:
    """Require true or false, and not 1 or 0."""
    for name in names:
        require(type(getattr(spec, name)) is bool, name, getattr(spec, name), "true or false")


def one_of(spec: object, name: str, allowed: tuple[str, ...]) -> None:
    """Require one of these values."""
    require(getattr(spec, name) in allowed, name, getattr(spec, name), f"one of {allowed}")


def subset(spec: object, name: str, allowed: tuple[str, ...]) -> None:
    """Normalise a list of names to a tuple in the order of ``allowed``."""
    value = getattr(spec, name)
    good = isinstance(value, (tuple, list)) and all(item in allowed for item in value)
    require(good and len(set(value)) == len(value), name, value, f"a subset of {allowed}")
    object.__setattr__(spec, name, tuple(item for item in allowed if item in value))


def tuple_of(spec: object, name: str, kind: type, allowed: str) -> None:
    """Normalise a list of specs to a tuple."""
    value = getattr(spec, name)
    good = isinstance(value, (tuple, list)) and all(isinstance(item, kind) for item in value)
    require(good, name, value, allowed)
    object.__setattr__(spec, name, tuple(value))
