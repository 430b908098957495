"""Rule: one rewrite. ``pattern`` says what, ``check`` says no with a reason, ``rewrite`` builds the replacement."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from graphopt.ir.graph import Node, Value
from graphopt.rewrite.pattern import Match, OpPattern
from graphopt.rewrite.rewriter import Rewriter


class Numerics(Enum):
    """What a rewrite may do to the numbers, and the factor on eager's own error that its budget allows."""

    BITWISE = 1.0  # the same bits
    REASSOCIATES = 4.0  # the same sum or product in another order, or fewer roundings
    APPROXIMATE = 16.0  # another formula for the same function
    LOSSY = math.inf  # other numbers, because the user asked for them: types, shapes and nan are compared, values are not


@dataclass(frozen=True)
class Reject:
    """Why a rule declines, and the value or node that is in the way.

    An empty reason says that this is not what the rule is about at all; it is not told.
    """

    reason: str
    culprit: Value | Node | None = None


class Rule(ABC):
    """A rewrite of one pattern.

    Class attributes: ``pattern``, ``numerics``, and ``near``: how many nodes must fit before a failed match is told as a
    near miss. The first line of the docstring is the equation. A rule keeps no state: all that ``rewrite`` needs is in
    the match.
    """

    pattern: ClassVar[OpPattern]
    numerics: ClassVar[Numerics]
    near: ClassVar[int] = 2

    @property
    def name(self) -> str:
        return type(self).__name__

    def check(self, m: Match) -> Reject | None:
        """None to go on, or the reason to decline. Must not change the graph."""
        return None

    @abstractmethod
    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        """Build the replacement of the root's result, at the root, and return it."""

    @property
    def equation(self) -> str:
        """The first line of the docstring."""
        return (type(self).__doc__ or self.name).strip().splitlines()[0]
