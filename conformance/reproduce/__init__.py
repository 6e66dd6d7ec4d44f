"""From a case that fails to one short script that shows it with nothing of this project."""

from conformance.reproduce.known import kept_of
from conformance.reproduce.script import issue_of, script_of
from conformance.reproduce.smaller import as_before, smaller

__all__ = ["as_before", "issue_of", "kept_of", "script_of", "smaller"]
