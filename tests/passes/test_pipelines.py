"""Pipelines: the default ones, and edits with their errors."""

from __future__ import annotations

from typing import Any

import pytest

from graphopt.errors import UsageError
from graphopt.ir import Graph
from graphopt.pass_manager import Pass
from graphopt.passes.expand import Expand
from graphopt.passes.fusion import Fuse
from graphopt.passes.layout import PackWeights
from graphopt.passes.pipelines import default_pipeline, edit_pipeline
from graphopt.rewrite import PassContext


class Idle(Pass):
    """Does nothing; has no name, so it is not registered."""

    def run(self, g: Graph, ctx: PassContext) -> bool:
        return False


BASE = [Expand(), Fuse(), Expand(), PackWeights()]


def names(passes: list[Pass]) -> list[str]:
    return [p.name or type(p).__name__ for p in passes]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_default_pipelines(level: int) -> None:
    found = names(default_pipeline(level))
    assert found.index("expand") < found.index("fuse")
    assert found.count("fuse") == 1 and ("pack-weights" in found) == (level == 2)
    assert (level == 0) == ("cse" not in found)


def test_no_such_level() -> None:
    with pytest.raises(UsageError, match="level 7; levels are 0, 1, 2"):
        default_pipeline(7)


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (None, "expand fuse expand pack-weights"),
        ("fuse{max_nodes=8},expand", "fuse expand"),
        (["expand", Idle()], "expand Idle"),
        (Fuse, "fuse"),
        ([], ""),
        ({"before": {"fuse": [Idle()]}}, "expand Idle fuse expand pack-weights"),
        ({"after": {"expand": "fuse"}}, "expand fuse expand fuse pack-weights"),
        ({"before": {"expand": Idle()}}, "expand fuse Idle expand pack-weights"),
        ({"replace": {"expand": []}}, "fuse pack-weights"),
        ({"replace": {"fuse": [Idle(), Idle]}, "after": {"pack-weights": Idle()}}, "expand Idle Idle expand pack-weights Idle"),
    ],
)
def test_edits(edits: Any, expected: str) -> None:
    assert " ".join(names(edit_pipeline(BASE, edits))) == expected
    assert names(BASE) == ["expand", "fuse", "expand", "pack-weights"]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"befor": {"fuse": Idle()}}, "no edit 'befor' .did you mean 'before'"),
        ({"before": {"fusion": Idle()}}, "no such pass in it .did you mean 'fuse'..; it has expand, fuse, pack-weights"),
        ({"before": [Idle()]}, "'before' takes"),
        ({"before": {"fuse": [3]}}, "before 'fuse': 3 is no pass"),
        (3, "pipeline: 3 is no pass"),
        ("fuze", "there is no pass 'fuze' .did you mean 'fuse'"),
        ("fuse{max_node=3}", "no option 'max_node' .did you mean 'max_nodes'"),
    ],
)
def test_bad_edits(edits: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        edit_pipeline(BASE, edits)
