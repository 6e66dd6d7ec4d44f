"""How many cases are drawn, and whether they are the same every time. Light: no torch here.

The choices travel through the environment, so that every process of a run makes the same ones:
pytest-xdist's workers, and HypoFuzz, which knows nothing of pytest's options.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from conformance.fields import SpecError
from conformance.spec import DTYPES

FAILURES = "conformance-failures"  # the folder that replay lines point into
DEFAULT_ADAPTER = "adapter:OlmoArchitectureAdapter"
ADAPTER_VARIABLE = "OLMO_CONFORMANCE_ADAPTER"
PROFILE_VARIABLE = "OLMO_CONFORMANCE_PROFILE"
DTYPES_VARIABLE = "OLMO_CONFORMANCE_DTYPES"
LEDGER_VARIABLE = "OLMO_CONFORMANCE_LEDGER"
LEDGER_OFF = "off"
DATABASE_VARIABLE = "OLMO_CONFORMANCE_EXAMPLE_DATABASE"


@dataclass(frozen=True)
class Profile:
    """How a run draws.

    Attributes:
        name: What it is called.
        examples: Cases of a check of weight 1.
        deterministic: The same cases every time.
        stores: Keep failing cases in Hypothesis' example database.
        steps: Most steps of the state machine in one example.
    """

    name: str
    examples: int
    deterministic: bool
    stores: bool
    steps: int = 10


PROFILES = {
    "ci": Profile("ci", 60, deterministic=True, stores=False),
    "dev": Profile("dev", 40, deterministic=False, stores=True),
    "deep": Profile("deep", 600, deterministic=False, stores=True, steps=25),
}
DEFAULT_PROFILE = "ci"


def profile(name: str) -> Profile:
    """The profile of a name.

    Raises:
        SpecError: If there is none.
    """
    if name not in PROFILES:
        raise SpecError("profile", name, f"one of {sorted(PROFILES)}")
    return PROFILES[name]


def chosen() -> Profile:
    """The profile that the environment names, or the default."""
    return profile(os.environ.get(PROFILE_VARIABLE, DEFAULT_PROFILE))


def dtypes(names: str) -> tuple[str, ...]:
    """The dtypes of a comma-separated list, simplest first.

    Raises:
        SpecError: If one is unknown, or there is none.
    """
    picked = [name.strip() for name in names.split(",") if name.strip()]
    if not picked or not set(picked) <= set(DTYPES):
        raise SpecError("dtypes", names, f"a comma-separated choice of {DTYPES}")
    return tuple(name for name in DTYPES if name in picked)


def chosen_dtypes() -> tuple[str, ...]:
    """The dtypes that the environment names, or all."""
    return dtypes(os.environ.get(DTYPES_VARIABLE, ",".join(DTYPES)))


def uses_ledger() -> bool:
    """Whether what the ledger of known defects explains counts as known: unless turned off."""
    return os.environ.get(LEDGER_VARIABLE) != LEDGER_OFF
