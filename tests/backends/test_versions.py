"""A kernel in a cache counts only while the code that emits it is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.backends import versions


@pytest.mark.parametrize("changed", ["tvm/a.py", "forms/b.py"])
def test_kernels_are_known_by_the_source_of_their_backend_and_of_forms(changed: str, tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    for name in ("tvm/a.py", "forms/b.py", "triton/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "versions.py"))
    source_hash = versions.source_hash.__wrapped__
    before = source_hash("tvm")
    (tmp_path / "triton/c.py").write_text("x = 1")
    assert source_hash("tvm") == before
    (tmp_path / changed).write_text("x = 1")
    assert source_hash("tvm") != before


def test_a_package_that_is_not_there() -> None:
    assert versions.package_version("no-such-package") == "not installed"
