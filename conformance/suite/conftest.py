"""One thread a worker, and no model hub, whoever runs the suite."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first, so that the other workers do not wait for it at the end."""
    items.sort(key=lambda item: "published" not in item.nodeid)


def pytest_collection_finish() -> None:
    """All is imported: what that has made lives on, and need not be looked through for garbage.

    That took a tenth of the time of the tests.
    """
    gc.collect()
    gc.freeze()
