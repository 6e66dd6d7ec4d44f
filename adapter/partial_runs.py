"""Which blocks a call runs is known to that call only: not to one in a hook, a thread, or a copy.

TransformerLens writes ``stop_at_layer`` and ``start_at_layer`` on the blocks, where every call
finds them, and where a call within another takes them away; or it stops a run with a hook.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class Call:
    """One call of a bridge, and what it keeps instead of the blocks.

    Attributes:
        around: The call in which this one is made, by a hook or by TransformerLens, if any.
        kept: Values by owner and name.
        caches: Whether the hooks that are put on in this call itself are for its own run alone.
    """

    def __init__(self, around: Call | None) -> None:
        self.around = around
        self.kept: dict[tuple[Any, str], Any] = {}
        self.caches = False


_CALL: ContextVar[Call | None] = ContextVar("_CALL", default=None)


@contextmanager
def call_of_its_own() -> Iterator[Call]:
    """Run in a new call, also as a decorator."""
    call = Call(_CALL.get())
    token = _CALL.set(call)
    try:
        yield call
    finally:
        _CALL.reset(token)


def current_call() -> Call | None:
    """The innermost call that is running here."""
    return _CALL.get()


def of_another(call: Call | None) -> bool:
    """Whether what runs here is not the run of a call, but of a hook's or of another thread's."""
    now = _CALL.get()
    return call is not None and now is not call and (now is None or now.around is not call)


class OfTheCall:
    """An attribute that each call has for itself; one that no call has set is None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self
        call = _CALL.get()
        # A bridge of another class than ours makes no calls.
        return vars(owner).get(self._name) if call is None else call.kept.get((owner, self._name))

    def __set__(self, owner: Any, value: Any) -> None:
        call = _CALL.get()
        if call is None:
            vars(owner)[self._name] = value
        else:
            call.kept[owner, self._name] = value
