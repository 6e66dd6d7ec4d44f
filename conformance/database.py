"""Where Hypothesis keeps failing examples: a folder, or a Redis that many machines share."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase

from conformance.fields import SpecError
from conformance.profiles import DATABASE_VARIABLE


@cache
def example_database(place: str) -> ExampleDatabase:
    """The database of a place.

    Args:
        place: ``redis://host:port/number`` (or ``rediss://`` or ``unix://``), or a folder.

    Raises:
        SpecError: If there is no Redis there, or no client for one.
    """
    if "://" not in place:
        return DirectoryBasedExampleDatabase(place)
    try:
        from hypothesis.extra.redis import RedisExampleDatabase
        from redis import Redis, RedisError
    except ImportError:
        allowed = "a folder; for a Redis, pip install 'olmo-conformance[redis]' first"
        raise SpecError("example-database", place, allowed) from None
    try:
        client = Redis.from_url(place, socket_connect_timeout=5)
        client.ping()
    except (RedisError, ValueError) as error:
        told = str(error).splitlines()[0]
        raise SpecError("example-database", place, f"a Redis that answers ({told})") from None
    return RedisExampleDatabase(client)


def chosen_database() -> ExampleDatabase:
    """The database that the environment names, or the folder that Hypothesis itself takes.

    Said in full: Hypothesis takes none where CI is set in the environment. HypoFuzz runs only tests
    whose database is Hypothesis' default one, by its absolute path.
    """
    folder = Path.cwd() / ".hypothesis" / "examples"
    return example_database(os.environ.get(DATABASE_VARIABLE) or str(folder))
