"""The errors a user can cause or meet. Every message says what is wrong, with the value, where, and what to do.

The library raises these; cli.py turns them into one line and an exit code. Knows nothing of files, tensors or verbs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KitError(Exception):
    """Base of every error that is the user's to mend; its text is one line. exit_code: 2 where the input was refused, 1 where work that had begun failed."""

    exit_code = 2


class ConfigError(KitError):
    """A recipe or an option is wrong: unknown key, bad value, two settings that contradict each other."""


class DataError(KitError):
    """A table, corpus or submission is wrong: names the file, row, column and value."""


class BundleError(KitError):
    """A bundle is missing, incomplete or damaged: names the folder and the file."""


class DependencyError(KitError):
    """A package is missing: names the pip command and the setting that avoids it."""


class BudgetError(KitError):
    """The time budget cannot be met as asked."""


class RehearsalError(KitError):
    """A rehearsed notebook or installation failed: names the cell or the package, and what was met. attempts: connections refused until then."""

    exit_code = 1
    attempts: tuple[str, ...] = ()


class PublishError(KitError):
    """The site refused something, or answered success that was none: names the dataset, notebook or submission."""

    exit_code = 1


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the most similar known word, or the list of all known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"
