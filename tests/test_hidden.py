"""Instructions that a processor has and does not announce: tried in a process of its own, used only where the user asks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from graphopt import devices, hidden
from graphopt.errors import DeviceError
from graphopt.options import Options
from graphopt.target import Target, detect
from graphopt.tuning import check_device


def test_an_instruction_that_is_missing_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    if not detect().has("amx_tile"):
        pytest.skip("this processor has no AMX")
    monkeypatch.setitem(hidden._INSTRUCTIONS, "ud2", "0f0b")
    assert not hidden.works("ud2")
    monkeypatch.setitem(hidden._INSTRUCTIONS, "tdpbf16ps", "c4e26a5cc1")
    assert hidden.works("tdpbf16ps")


def test_a_processor_that_is_named_may_use_what_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    granite = Target.from_name("cpu:graniterapids:2")
    here = replace(granite, features=tuple(f for f in granite.features if f != "amx_fp16"))
    monkeypatch.setattr(hidden, "detect", lambda: here)
    monkeypatch.setattr(hidden, "works", lambda feature: True)
    assert hidden.missing_here(granite) == "" and hidden.hidden(here) == ("amx_fp16",)
    assert check_device("cpu:graniterapids:2") == granite
    monkeypatch.setattr(hidden, "works", lambda feature: False)
    assert "amx_fp16" in hidden.missing_here(granite)
    with pytest.raises(DeviceError, match="amx_fp16"):
        check_device("cpu:graniterapids:2")


def test_nothing_hidden_is_used_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "works", lambda feature: pytest.fail("tried"))
    import torch

    assert devices.choose_target(torch.device("cpu"), Options()) == detect()
    with pytest.raises(DeviceError, match="cannot run here"):
        devices.choose_target(torch.device("cpu"), Options(target="cpu:neoverse-n1"))
