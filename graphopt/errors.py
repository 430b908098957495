"""The errors that graphopt raises on purpose, each with a distinct exit status for the command line.

An error message answers three questions: what is wrong, where (IR, pass, the user's source line), and what to do.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class GraphoptError(Exception):
    """Base of every deliberate error; ``exit_status`` is what the command line exits with."""

    exit_status = 1

    if sys.version_info < (3, 11):

        def add_note(self, note: str) -> None:
            """As in Python 3.11: more context, kept in ``__notes__``."""
            self.__notes__ = [*getattr(self, "__notes__", ()), note]


class UsageError(GraphoptError):
    """The request itself is wrong: an unknown option, pass or file."""

    exit_status = 2


class ParseError(GraphoptError):
    """Malformed IR text. Carries the 1-based line and column, and shows the line with a caret.

    Args:
        message: what was expected or found.
        line, column: 1-based position.
        source: the whole text, to quote the line from.
    """

    exit_status = 3

    def __init__(self, message: str, line: int, column: int, source: str, filename: str = "<text>") -> None:
        lines = source.splitlines()
        quoted = lines[line - 1] if 0 < line <= len(lines) else ""
        super().__init__(f"{filename}:{line}:{column}: {message}\n  {quoted}\n  {' ' * (column - 1)}^")
        self.line, self.column = line, column


class VerifyError(GraphoptError):
    """A graph breaks a structural rule of the IR."""

    exit_status = 4


class TypeInferenceError(VerifyError):
    """Operand types or attributes do not fit an op."""


class EquivalenceError(GraphoptError):
    """A pass changed what a graph computes (or lied about having changed it)."""

    exit_status = 5


class PassError(GraphoptError):
    """A fault of a pass or a rule itself: its code raised, or returned something else than it has to."""

    exit_status = 70


class CaptureError(GraphoptError):
    """A model could not be captured; names the user's source line where there is one."""

    exit_status = 6


class WholeFallback(CaptureError):
    """A graph that cannot be held, for a reason: it runs through library kernels as a whole, and has no calls of its own."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the model runs through library kernels as a whole: {reason}")


class FallbackError(GraphoptError):
    """``strict`` is on and an operation would run through a library kernel that was not asked for."""

    exit_status = 7


class BuildError(GraphoptError):
    """A kernel could not be built."""

    exit_status = 8


class DatabaseError(GraphoptError):
    """The tuning database is damaged, or could not be read or written."""

    exit_status = 9


class DeviceError(UsageError):
    """A device that is not known, or whose kernels do not run here."""

    exit_status = 10


class DiskFullError(DatabaseError):
    """There is no room for a record, or for candidates of the tuner."""

    exit_status = 11


class WorkerError(GraphoptError):
    """A process that builds or runs candidates cannot be started, or has no room for what it should run them on."""

    exit_status = 12


class RemoteError(GraphoptError):
    """A device of another machine is out of reach: its tracker, its server, or what they lent."""

    exit_status = 13


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint `` (did you mean 'x'?)`` for a misspelt word, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its class if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def counted(n: int, noun: str) -> str:
    """``1 operation``, ``2 operations``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
