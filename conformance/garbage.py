"""Python's garbage collector, in processes that build and drop small models all the time."""

from __future__ import annotations

import gc


def rarely_collected() -> None:
    """Look for garbage a hundred times less often, and never in what is imported by now.

    A built model is thousands of objects that refer to each other, so that the collector's own
    thresholds make it walk through every module again and again: a tenth of a run's time. For
    processes of our own only; their memory grows by some tens of MiB.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
