"""The documentation: its code runs, its commands work, its generated parts are up to date, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from graphopt.cli.main import app
from graphopt.pass_manager import PASSES

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, text) of each block of code in a language."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start()) + 2, m[2]) for m in BLOCK.finditer(text) if m[1] == language]


def having(language: str) -> list[Path]:
    return [p for p in PAGES if blocks(p, language)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(autouse=True)
def passes_of_the_page_go() -> Iterator[None]:
    before = dict(PASSES)
    yield
    PASSES.clear()
    PASSES.update(before)


@pytest.mark.parametrize("page", having("python"), ids=name)
def test_python_code_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("docs_page")  # a dataclass looks its module up
    monkeypatch.setitem(sys.modules, "docs_page", module)
    for line, text in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + text, str(page), "exec"), vars(module))


@pytest.mark.parametrize("page", having("console"), ids=name)
def test_commands_work(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _, text in blocks(page, "console"):
        for command, _, output in (part.partition("\n") for part in ("\n" + text).split("\n$ ")[1:]):
            program, *args = shlex.split(command)
            if program != "graphopt":
                continue
            done = CliRunner().invoke(app, args)
            assert done.exit_code == 0, f"{command}\n{done.output}"
            if output.strip():
                assert done.stdout.strip() == output.strip()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name(page)}: {target}"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["ir.md", "passes.md"])
def test_generated_pages_are_up_to_date(page: str) -> None:
    assert (ROOT / "docs" / page).read_text() == generator().pages()[page], "run python docs/generate.py"


def test_every_pass_and_op_is_described() -> None:
    passes, ir = (ROOT / "docs" / "passes.md").read_text(), (ROOT / "docs" / "ir.md").read_text()
    for pass_name, cls in PASSES.items():
        if cls.__module__.startswith("graphopt.passes."):
            assert f"\n## {pass_name}\n" in passes
    for op in generator().OPS:
        assert f"| `{op}` |" in ir
