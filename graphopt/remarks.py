"""Remarks: what a pass did, what it declined and why, what it found out. After LLVM's optimization remarks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["passed", "missed", "analysis"]


@dataclass(frozen=True)
class Remark:
    """One remark.

    Attributes:
        kind: ``passed`` (a rewrite was made), ``missed`` (it nearly was; ``message`` says what was in the way) or
            ``analysis`` (a finding).
        pass_name, rule: who speaks.
        message: in words.
        node: the IR line it is about.
        loc: the user's source line, ``file:line``, or an empty string.
        number: the rewrite's number for ``fuel``, for ``passed`` ones made by rules.
    """

    kind: Kind
    pass_name: str
    rule: str
    message: str
    node: str = ""
    loc: str = ""
    number: int | None = None

    def __str__(self) -> str:
        number = f" #{self.number}" if self.number is not None else ""
        where = f"  [{self.loc}]" if self.loc else ""
        node = f"\n      {self.node}" if self.node else ""
        return f"{self.kind} {self.pass_name}/{self.rule}{number}: {self.message}{where}{node}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
