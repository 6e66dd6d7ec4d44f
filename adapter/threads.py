"""What a bridge is told while it works, by the thread that works."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary


class _Values(threading.local):
    """Values by owner, of the thread that asks."""

    def __init__(self) -> None:
        self.by_owner: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class OfTheThread:
    """An attribute that each thread has for itself, and that no copy takes along."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name, self._values = name, _Values()

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self
        try:
            return self._values.by_owner[owner]
        except KeyError:
            raise AttributeError(self._name) from None

    def __set__(self, owner: Any, value: Any) -> None:
        self._values.by_owner[owner] = value

    def __delete__(self, owner: Any) -> None:
        del self._values.by_owner[owner]
