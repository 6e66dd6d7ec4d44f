"""One thread a worker, and no model hub, as in the suite."""

from conformance.suite import conftest

__all__ = ["conftest"]
