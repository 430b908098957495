"""Passes and pipelines: options, contracts, order, honest errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from graphopt.errors import EquivalenceError, GraphoptError, PassError, UsageError, VerifyError
from graphopt.ir import Builder, Graph, TensorType, parse_graph, types
from graphopt.pass_manager import PASSES, Instrument, Pass, PassContext, make_pass, parse_pipeline, run_passes

TEXT = "graph @g(%x: f32[2]) -> f32[2] {\n%0: f32[2] = exp(%x)\nreturn %0\n}"


class Append(Pass):
    """Appends unused nodes."""

    name = "test-append"
    op: str = "neg"
    count: int = 1

    def run(self, g: Graph, ctx: PassContext) -> bool:
        for _ in range(self.count):
            Builder(g).create(self.op, [g.inputs[0]])
        return self.count > 0


class Damage(Pass):
    """Breaks a type."""

    name = "test-damage"

    def run(self, g: Graph, ctx: PassContext) -> bool:
        next(iter(g)).result.type = TensorType(types.f16, (2,))
        return True


class Picky(Append):
    """Requires a sine before, and promises a cosine after."""

    name = "test-picky"

    def requires(self, g: Graph) -> None:
        if not any(n.op.name == "sin" for n in g):
            raise GraphoptError("there must be a sine")

    def ensures(self, g: Graph) -> None:
        if not any(n.op.name == "cos" for n in g):
            raise GraphoptError("there should be a cosine now")


@pytest.fixture(autouse=True, scope="module")
def unregister() -> Iterator[None]:
    yield
    for name in ("test-append", "test-damage", "test-picky", "test-secretive"):
        PASSES.pop(name, None)


def test_a_pass_is_a_frozen_dataclass_of_its_options() -> None:
    p = Append(op="sin")
    assert p == Append(op="sin") and p != Append() and str(p) == "test-append{op='sin'}" and str(Append()) == "test-append"
    with pytest.raises(AttributeError):
        p.op = "cos"  # type: ignore[misc]
    assert "class Append" in p.key() and p.key() != Append().key()


def test_passes_run_in_order_and_are_timed() -> None:
    g, ctx = parse_graph(TEXT), PassContext()
    assert run_passes(g, [Append("sin"), Append("cos", 2), Append(count=0)], ctx) is True
    assert [n.op.name for n in g] == ["exp", "sin", "cos", "cos"]
    assert [(run.name, run.changed) for run in ctx.runs] == [("test-append", True), ("test-append", True), ("test-append", False)]
    assert all(run.seconds >= 0 for run in ctx.runs)
    assert run_passes(g, []) is False


def test_structure_is_verified_and_the_pass_named() -> None:
    with pytest.raises(VerifyError) as caught:
        run_passes(parse_graph(TEXT), [Append(), Damage()])
    assert "in pass test-damage" in caught.value.__notes__
    run_passes(parse_graph(TEXT), [Damage()], structure=False)


@pytest.mark.parametrize("returned", [None, 1, "yes"])
def test_a_pass_that_does_not_say_whether_it_changed_something(returned: object) -> None:
    class Silent(Pass):
        def run(self, g: Graph, ctx: PassContext) -> bool:
            return returned  # type: ignore[return-value]

        def __str__(self) -> str:
            return "silent"

    for structure in (True, False):
        with pytest.raises(PassError, match=f"^pass silent: run returned {returned!r}; return True if it changed the graph, else False"):
            run_passes(parse_graph(TEXT), [Silent()], structure=structure)


def test_a_pass_that_raises_is_named() -> None:
    with pytest.raises(PassError, match=r"^pass test-append\{op=3\} failed on @g: TypeError: ") as caught:
        run_passes(parse_graph(TEXT), [Append(op=3)])  # type: ignore[arg-type]
    assert isinstance(caught.value.__cause__, TypeError)


def test_requires_and_ensures() -> None:
    with pytest.raises(GraphoptError, match="there must be a sine"):
        run_passes(parse_graph(TEXT), [Picky()])
    with pytest.raises(GraphoptError, match="there should be a cosine"):
        run_passes(parse_graph(TEXT), [Append("sin"), Picky()])
    run_passes(parse_graph(TEXT), [Append("sin"), Picky("cos")])


def test_instruments_see_before_and_after() -> None:
    seen: list[str] = []

    class Ear(Instrument):
        def before(self, p: Pass, g: Graph, ctx: PassContext) -> None:
            seen.append(f"before {p} {len(g)}")

        def after(self, p: Pass, g: Graph, ctx: PassContext, changed: bool) -> None:
            seen.append(f"after {p} {len(g)} {changed}")

    run_passes(parse_graph(TEXT), [Append(), Append(count=0)], instruments=[Ear()])
    assert seen[:2] == ["before test-append 1", "after test-append 2 True"]
    assert seen[2:] == ["before test-append{count=0} 2", "after test-append{count=0} 2 False"]


def test_pipelines_by_name() -> None:
    text = 'test-append, test-append{op="sin", count=3},test-append{op=cos}'
    assert parse_pipeline(text) == [Append(), Append("sin", 3), Append("cos")]
    assert parse_pipeline("") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("test-apend", "there is no pass 'test-apend' (did you mean 'test-append'?)"),
        ("test-append{cuont=1}", "pass test-append has no option 'cuont' (did you mean 'count'?); it has: op, count"),
        ("test-append{count}", "'count' is not of the form option=value"),
        ("test-append;test-append", "expected a pass such as name{option=value}"),
        ("test-append{count=1", "expected a pass such as name{option=value}"),
    ],
)
def test_a_wrong_pipeline_is_explained(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_pipeline(text)
    assert message in str(caught.value)


def test_a_pass_without_a_name_is_not_registered() -> None:
    class Nameless(Append):
        """Inherits a name but has none of its own."""

    assert PASSES["test-append"] is Append
    with pytest.raises(UsageError):
        make_pass("nameless")


class Secretive(Append):
    """Changes the graph and denies it."""

    name = "test-secretive"

    def run(self, g: Graph, ctx: PassContext) -> bool:
        super().run(g, ctx)
        return False


def test_a_pass_that_denies_its_changes_is_caught() -> None:
    with pytest.raises(EquivalenceError, match="changed @g but says that it did not") as caught:
        run_passes(parse_graph(TEXT), [Secretive()])
    assert "in pass test-secretive" in caught.value.__notes__
    run_passes(parse_graph(TEXT), [Secretive(count=0)])
    run_passes(parse_graph(TEXT), [Secretive()], structure=False)


def test_the_key_of_a_pass_covers_its_rules_and_their_files() -> None:
    key = make_pass("canonicalize").key()
    for rule in make_pass("canonicalize").rules():  # type: ignore[attr-defined]
        assert f"class {type(rule).__name__}(" in key
    first = Pass.key(make_pass("views"))
    assert "class MergeReshapes(" in first and first != key
