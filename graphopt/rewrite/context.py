"""What a pass works with besides the graph: fuel, and a place to say what it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from graphopt.ir.graph import Node
from graphopt.ir.printer import print_node
from graphopt.remarks import Kind, Remark


class Fuel:
    """Counts rewrites, so that any can be switched off by number: ``limit`` stops after that many, ``skip`` leaves some out.

    Bisecting a miscompile: halve ``limit`` until the fault goes away; the last rewrite made is the culprit.
    """

    def __init__(self, limit: int | None = None, skip: Iterable[int] = ()) -> None:
        self.limit, self.skip, self.used = limit, frozenset(skip), 0

    def take(self) -> int | None:
        """The number of the next rewrite (from 1), or None if it must not be made."""
        self.used += 1
        if (self.limit is not None and self.used > self.limit) or self.used in self.skip:
            return None
        return self.used


class PassRun(NamedTuple):
    """One run of a pass: its time, whether it changed the graph, and which of the remarks are its own (``first:last``)."""

    name: str
    seconds: float
    changed: bool
    first: int
    last: int


@dataclass
class PassContext:
    """What a pass may use besides the graph.

    Attributes:
        target: the device compiled for, or None when that does not matter.
        owns_weights: what is compiled will own its weights: one that nothing reads at run time is let go.
        variants: there are other programs of the same graph, for other sizes, that read the same weights.
        fuel: shared by all passes of a run.
        remarks: what was said so far, in order.
        runs: the passes that ran, in order.
    """

    target: Any = None
    owns_weights: bool = False
    variants: bool = False
    fuel: Fuel = field(default_factory=Fuel)
    remarks: list[Remark] = field(default_factory=list)
    runs: list[PassRun] = field(default_factory=list)
    pass_name: str = ""

    def say(self, kind: Kind, rule: str, message: str, node: Node | None = None, number: int | None = None) -> None:
        """Add a remark about a node."""
        text, loc = (print_node(node), str(node.loc or "")) if node is not None else ("", "")
        self.remarks.append(Remark(kind, self.pass_name, rule, message, text, loc, number))

    def passed(self, rule: str, message: str, node: Node | None = None, number: int | None = None) -> None:
        self.say("passed", rule, message, node, number)

    def missed(self, rule: str, message: str, node: Node | None = None) -> None:
        self.say("missed", rule, message, node)

    def analysis(self, rule: str, message: str, node: Node | None = None) -> None:
        self.say("analysis", rule, message, node)
