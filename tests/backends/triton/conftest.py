"""These tests need triton, and no GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
