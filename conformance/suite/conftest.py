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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first, so that the other workers do not wait for it at the end."""
    items.sort(key=lambda item: "published" not in item.nodeid)


def pytest_collection_finish() -> None:
    """All is imported."""
    rarely_collected()
