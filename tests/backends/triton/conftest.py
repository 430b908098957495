"""These tests need triton, and no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parent.parent / "tvm"))  # graphs that the tests of both backends compute
