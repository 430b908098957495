"""The layers: who may import whom, what importing graphopt loads, how long a file may be, who may read the environment."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"graphopt": "graphopt", "passes": "graphopt.passes", "backends": "graphopt.backends", "autotune": "graphopt.autotune"}
FILES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
MAX_LINES = 500

# layer -> the layers that it may import; the longest prefix of a module's name decides its layer
BASE = ("errors",)
IR = ("ir", *BASE)
REWRITE = ("rewrite", "remarks", *IR)
PASSES = ("passes", "pass_manager", "target", *REWRITE)
COMPILER = ("compiler", "capture", "passes", "backends", "autotune", "autotune.space", "verification", *PASSES)
ALLOWED = {
    "errors": BASE,
    "ir": IR,
    "remarks": REWRITE,
    "rewrite": REWRITE,
    "target": ("target", *BASE),
    "pass_manager": ("pass_manager", "target", *REWRITE),
    "passes": PASSES,
    "autotune.space": ("autotune.space", "target", *IR),
    "autotune": ("autotune", "autotune.space", "target", *IR),
    "backends": ("backends", "autotune.space", "target", *IR),
    "verification": ("verification", "pass_manager", "target", *REWRITE),
    "testing": ("testing", "verification", "pass_manager", "target", *REWRITE),
    "capture": ("root", *COMPILER),
    "compiler": ("root", *COMPILER),
    "bench": ("root", "bench", *COMPILER),
    "cli": ("root", "cli", "bench", "testing", *COMPILER),
    "root": ("root", *COMPILER),  # graphopt/__init__ itself: light, everything by name
}
MEMBERS = {
    "graphopt.sampling": "verification",
    "graphopt.value_check": "verification",
    "graphopt.monte_carlo": "verification",
    "graphopt.bounds": "rewrite",
    "graphopt.child_process": "target",
    "graphopt.files": "target",
    "graphopt.openmp": "target",
    "graphopt.processors": "target",
    "graphopt.run_delay": "target",
    "graphopt.accelerators": "target",
    "graphopt.__main__": "cli",
    "graphopt": "root",
}  # modules whose layer is not their first name; whatever else stands in graphopt/ belongs to the compiler

# imports inside functions that are meant, and why
DELAYED = {
    ("graphopt/capture/dynamo.py", "graphopt.compiler"): "the backend's entry point; the compiler imports capture's data types",
    ("graphopt/capture/dynamo.py", "graphopt"): "from graphopt import compiler, as above",
}

OPTIONAL = {"tvm", "tvm_ffi", "triton", "hypothesis", "transformers", "onnx", "onnxruntime", "onnxscript", "openvino", "matplotlib",
            "nncf", "torchao", "xgboost"}  # fmt: skip


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join([FOLDERS[folder], *rest])
    return name.removesuffix(".__init__")


def layer(module: str) -> str:
    """The layer of a module, by the longest known prefix."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in MEMBERS and (end == len(parts) or prefix != "graphopt"):
            return MEMBERS[prefix]
        if prefix.removeprefix("graphopt.") in ALLOWED and prefix != "graphopt":
            return prefix.removeprefix("graphopt.")
    return "compiler"


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(tree: ast.AST, package: str) -> list[tuple[int, str]]:
    """(line, module) of every import in a tree; names imported from a package count as its modules where they are some."""
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([base] if base else [])])
            out += [(node.lineno, f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base) for alias in node.names]
    return out


def is_module(name: str) -> bool:
    return any(module_name(p) == name for p in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_stay_within_their_layers(path: Path) -> None:
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    own = layer(module)
    for line, name in imports(parsed(path), package):
        if name == "graphopt" or name.startswith("graphopt."):
            wanted = layer(name)
            assert wanted in ALLOWED[own], f"{path.relative_to(ROOT)}:{line}: layer {own} may not import {name} (layer {wanted})"
        assert name.split(".")[0] not in ("passes", "backends", "autotune"), f"{path}:{line}: import graphopt.{name}"


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "backends")], ids=lambda p: str(p.relative_to(ROOT)))
def test_backends_know_nothing_of_each_other(path: Path) -> None:
    own = module_name(path).split(".")[2:3]
    for line, name in imports(parsed(path), module_name(path).rpartition(".")[0]):
        other = name.removeprefix("graphopt.backends.").split(".")[0]
        if name.startswith("graphopt.backends.") and other in ("tvm", "triton", "eager"):
            assert [other] == own, f"{path.relative_to(ROOT)}:{line}: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_optional_packages_are_imported_inside_functions(path: Path) -> None:
    for function in ast.walk(parsed(path)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for line, name in imports(function, ""):
                if name.split(".")[0] in OPTIONAL or name.startswith("graphopt.backends."):
                    continue  # a backend is loaded when it is first used
                where = str(path.relative_to(ROOT))
                assert (where, name) in DELAYED, f"{where}:{line}: {name} is imported inside a function"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_not_imported_at_the_top(path: Path) -> None:
    if "backends/tvm" in str(path) or "backends/triton" in str(path):
        return  # a backend is imported when it is first used
    guarded = [n for n in parsed(path).body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))]
    for statement in guarded:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for line, name in imports(statement, ""):
                assert name.split(".")[0] not in OPTIONAL, f"{path.relative_to(ROOT)}:{line}: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_stand_alone(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    for word in ("TODO", "FIXME", "XXX"):
        assert word not in text
    if text.strip():
        assert ast.get_docstring(parsed(path)), "a module says what it is for"


@pytest.mark.parametrize("path", [p for p in FILES if "cli" not in p.relative_to(ROOT).parts], ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_below_the_command_line_reads_the_environment(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"):
            raise AssertionError(f"{path.relative_to(ROOT)}:{node.lineno}: reads the environment")


def test_importing_graphopt_loads_neither_tvm_nor_triton() -> None:
    code = "import sys, graphopt; print([m for m in ('tvm', 'tvm_ffi', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_folders_install_under_graphopt_alone() -> None:
    packages = (ROOT / "pyproject.toml").read_text().split("packages = [")[1].split("]")[0]
    listed = [p.strip().strip('"') for p in packages.replace("\n", " ").split(",") if p.strip()]
    found = sorted({module_name(p) for p in FILES if p.name == "__init__.py"})
    assert sorted(listed) == found


# the test of the test


@pytest.mark.parametrize(
    ("module", "imported", "fine"),
    [
        ("graphopt.passes.fusion.fuse", "graphopt.backends.base", False),
        ("graphopt.passes.simplify.cse", "graphopt.rewrite", True),
        ("graphopt.backends.tvm.code", "graphopt.passes", False),
        ("graphopt.backends.tvm.code", "graphopt.autotune.space", True),
        ("graphopt.backends.tvm.code", "graphopt.autotune.search", False),
        ("graphopt.ir.graph", "graphopt.rewrite", False),
        ("graphopt.rewrite.driver", "graphopt.pass_manager", False),
        ("graphopt.autotune.search", "graphopt.backends.tvm", False),
        ("graphopt.lower", "graphopt.backends.base", True),
        ("graphopt.lower", "graphopt.cli.main", False),
        ("graphopt.cli.main", "graphopt.compiler", True),
    ],
)
def test_the_layer_rules_themselves(module: str, imported: str, fine: bool) -> None:
    assert (layer(imported) in ALLOWED[layer(module)]) is fine
