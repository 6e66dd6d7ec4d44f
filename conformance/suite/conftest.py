"""One thread a worker, and no model hub, whoever runs the suite."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from conformance.database import chosen_database
from conformance.garbage import rarely_collected
from conformance.profiles import DATABASE_VARIABLE

torch.set_num_threads(1)

if os.environ.get(DATABASE_VARIABLE):
    # HypoFuzz passes over tests whose database is not the default one.
    settings.register_profile("conformance", database=chosen_database())
    settings.load_profile("conformance")


LONG = ("published", "test_series", "test_machine", "test_interventions", "test_hooks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that the other workers do not wait for them at the end."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))


def pytest_collection_finish() -> None:
    """All is imported."""
    rarely_collected()
