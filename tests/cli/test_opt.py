"""``graphopt opt``: passes on text; every wrong request gets its message and exit status."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from graphopt.cli.main import app
from graphopt.cli.opt import EXAMPLE
from graphopt.ir import Graph, parse_graph, print_graph, structurally_equal
from graphopt.ir.ops import OPS
from graphopt.pass_manager import PASSES, Pass, PassContext
from graphopt.testing import random_graph

NEGS = """graph @g(%x: f32[B]) -> f32[B]
where 1 <= B {
  %0: f32[B] = neg(%x)  // m.py:1
  %1: f32[B] = neg(%0)  // m.py:2
  return %1
}
"""


@pytest.fixture(scope="module", autouse=True)
def wrong_pass() -> Iterator[None]:
    class Wrong(Pass):
        """Drops everything."""

        name = "test-wrong"

        def run(self, g: Graph, ctx: PassContext) -> bool:
            g.set_outputs([g.inputs[0]])
            for node in reversed(g):
                g.erase(node)
            return True

    yield
    del PASSES["test-wrong"]


def run(*args: str, text: str | None = None) -> Result:
    return CliRunner().invoke(app, ["opt", *args], input=text)


def test_a_graph_goes_through_unchanged() -> None:
    done = run(text=EXAMPLE)
    assert done.exit_code == 0 and done.stdout == EXAMPLE


def test_passes_run_and_the_result_can_be_read_again(tmp_path: Path) -> None:
    source, target = tmp_path / "a.gir", tmp_path / "b.gir"
    source.write_text(NEGS)
    done = run(str(source), "--pipeline", "algebra,dce", "-o", str(target), "--verify")
    assert done.exit_code == 0, done.output
    assert done.stdout == "" and len(parse_graph(target.read_text())) == 0


def test_levels_and_random_graphs() -> None:
    for seed in range(6):
        g = random_graph(seed, max_nodes=8)
        done = run("--level", "2", text=print_graph(g))
        assert done.exit_code == 0, done.output
        parse_graph(done.stdout)
        assert structurally_equal(parse_graph(run(text=print_graph(g)).stdout), g)


def test_fuel_and_skipping() -> None:
    assert "neg" in run("-p", "algebra", "--fuel", "0", text=NEGS).stdout
    assert "neg" in run("-p", "algebra", "--skip-rewrite", "1", text=NEGS).stdout
    assert "neg" not in run("-p", "algebra", "--fuel", "1", text=NEGS).stdout


def test_printing_and_remarks_go_to_stderr() -> None:
    done = run("-p", "algebra,dce", "--print-after-all", "--remarks", "all", text=NEGS)
    assert "// after algebra\ngraph @g" in done.stderr and "// after dce (no change)" in done.stderr
    assert "passed algebra/" in done.stderr and "[m.py:2]" in done.stderr
    parse_graph(done.stdout)


def test_passes_are_listed_with_their_options() -> None:
    done = run("--list-passes")
    assert done.exit_code == 0 and "canonicalize" in done.stdout and "max_nodes: int = " in done.stdout


@pytest.mark.parametrize(
    ("args", "text", "status", "message"),
    [
        (["-p", "canonicalise"], NEGS, 2, "there is no pass 'canonicalise' (did you mean 'canonicalize'?)"),
        (["-p", "fuse{max_node=3}"], NEGS, 2, "pass fuse has no option 'max_node' (did you mean 'max_nodes'?)"),
        (["--level", "7"], NEGS, 2, "level"),
        (["--level", "1", "-p", "dce"], NEGS, 2, "--pipeline and --level exclude each other"),
        (["/nowhere/at/all.gir"], None, 2, "cannot read /nowhere/at/all.gir: No such file or directory"),
        (["-o", "/nowhere/at/all.gir"], NEGS, 2, "cannot write /nowhere/at/all.gir"),
        (["--levl", "2"], NEGS, 2, "--levl"),
        ([], NEGS.replace("neg(%0)", "neg(%9)"), 3, "<stdin>:4:20: %9 is not defined"),
        ([], NEGS.replace("neg(%0)", "neg(%9)"), 3, "\n    %1: f32[B] = neg(%9)  // m.py:2\n                     ^"),
        ([], NEGS.replace("neg(%x)", "ngg(%x)"), 3, "there is no op 'ngg' (did you mean 'neg'?)"),
        ([], NEGS.replace("where 1 <= B ", ""), 4, "the symbol B of %x: f32[B] has no range"),
        (["-p", "test-wrong", "--verify"], NEGS.replace("neg(%0)", "exp(%0)"), 5, "pass test-wrong changed what @g computes"),
    ],
)
def test_wrong_requests(args: list[str], text: str | None, status: int, message: str) -> None:
    done = run(*args, text=text)
    assert done.exit_code == status, done.output
    assert message in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_debug_shows_the_traceback_and_exits_as_without() -> None:
    done = CliRunner().invoke(app, ["opt", "-p", "nothing-like-it", "--debug"], input=NEGS)
    assert done.exit_code == 2 and "Traceback" in done.stderr and "in make_pass" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("graphopt: error: there is no pass 'nothing-like-it'")


def test_faults_of_our_own_are_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(self: Pass, g: Graph, ctx: PassContext) -> bool:
        raise KeyError("lost")

    monkeypatch.setattr(PASSES["test-wrong"], "run", fault)
    done = run("-p", "test-wrong", text=NEGS)
    assert done.exit_code == 70 and "pass test-wrong failed on @g: KeyError: 'lost'" in done.stderr
    monkeypatch.setattr("graphopt.cli.opt.parse_graph", fault)
    done = run("-p", "test-wrong", text=NEGS)
    assert done.exit_code == 70 and "internal error: " in done.stderr and "--debug" in done.stderr


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "graphopt", "opt", "-p", "dce"], input=NEGS, text=True, capture_output=True, check=False)
    assert done.returncode == 0 and "graph @g(" in done.stdout, done.stderr


def test_every_op_is_listed_with_its_attributes() -> None:
    done = run("--list-ops")
    assert done.exit_code == 0, done.output
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert set(lines) == set(OPS)
    for name, op in OPS.items():
        assert all(a in lines[name] for a in op.attrs) and op.doc in lines[name]
