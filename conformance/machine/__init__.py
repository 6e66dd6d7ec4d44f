"""The state machine: one bridge, taken from state to state beside fresh Hugging Face models."""

from conformance.machine import changing, hooking, raising, running
from conformance.machine.executor import Machine
from conformance.machine.moves import act, compared, legal, take

__all__ = [
    "Machine",
    "act",
    "changing",
    "compared",
    "hooking",
    "legal",
    "raising",
    "running",
    "take",
]
