"""Prepared graphs in files: taken up where the same graph comes again, and nowhere else."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import graphopt
from graphopt import kept
from graphopt.capture.dynamo import frozen_inputs, input_names
from graphopt.capture.identity import Unknown, graph_text
from graphopt.options import Options
from graphopt.report import Report

EAGER = {"backend": "eager"}


pytestmark = pytest.mark.usefixtures("fresh")


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.norm, self.down = nn.Linear(48, 96), nn.LayerNorm(96), nn.Linear(96, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.norm(self.up(x)))) + x


class Cache(nn.Module):
    """Writes a row of a buffer, and reads all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(8, 16))

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        self.rows.index_copy_(0, at, x)
        return self.rows.sum(0)


def run(module: Any, *args: Any, folder: Path, **options: Any) -> tuple[Any, Report]:
    """The first result of a compiled module, and the report; Dynamo knows nothing of earlier ones."""
    torch._dynamo.reset()
    graphopt.clear_reports()
    out = torch.compile(module, backend="graphopt", options={"cache_dir": folder, **options})(*args)
    (report,) = graphopt.reports()
    return out, report


def taken(report: Report) -> bool:
    return "taken" in report.seconds


def why_anew(report: Report) -> str:
    return next((r.message for r in report.remarks if r.rule == kept.NAME), "")


# --- what is taken is what was made ------------------------------------------------------------------------------------


@pytest.mark.tvm
def test_a_graph_that_comes_again_is_taken(tmp_path: Path) -> None:
    x, net = torch.randn(5, 48), Net()
    first, made = run(net, x, folder=tmp_path)
    again, report = run(net, x, folder=tmp_path)
    assert not taken(made) and taken(report) and report.kernels_built == 0
    assert torch.equal(first, again)
    torch.testing.assert_close(again, net(x))
    one, other = made.to_json(), report.to_json()
    for changed in ("seconds", "notes", "kernels"):  # kernels: found now
        del one[changed], other[changed]
    assert one == other
    assert ["earlier compilation of the same graph" in n for n in report.notes] == [True]
    assert "taken" in report.summary()


def under_autocast(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x.mT


def test_autocast_within_the_graph_is_of_the_graph(tmp_path: Path) -> None:
    x = torch.randn(4, 3)
    for turn in range(2):
        out, report = run(under_autocast, x, folder=tmp_path, **EAGER)
        assert torch.equal(out, under_autocast(x)) and taken(report) == bool(turn)


@pytest.mark.tvm
def test_nothing_of_the_weights_values_is_kept(tmp_path: Path) -> None:
    x = torch.randn(5, 48)
    run(Net(0), x, folder=tmp_path)
    other = Net(1)
    compiled = torch.compile(other, backend="graphopt", options={"cache_dir": tmp_path})
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(x), other(x))
    assert taken(graphopt.reports()[-1])
    other.up.weight.mul_(2)
    torch.testing.assert_close(compiled(x), other(x))


@pytest.mark.tvm
def test_weights_that_are_bf16_in_truth_are_another_graph_and_may_change(tmp_path: Path) -> None:
    x, net = torch.randn(5, 48), Net()
    run(net, x, folder=tmp_path)
    net.up.weight.copy_(net.up.weight.bfloat16().float())
    _, marked = run(net, x, folder=tmp_path)
    assert not taken(marked) and "weight(bf16)" in marked.text_before
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="graphopt", options={"cache_dir": tmp_path})
    torch.testing.assert_close(compiled(x), net(x))
    assert taken(graphopt.reports()[-1])
    net.up.weight.mul_(1.0001)
    torch.testing.assert_close(compiled(x), net(x))
    assert any("compiled again" in n for n in graphopt.reports()[-1].notes)


@pytest.mark.parametrize("options", [EAGER, pytest.param({}, marks=pytest.mark.tvm)])
def test_buffers_that_a_call_writes(tmp_path: Path, options: dict[str, Any]) -> None:
    for turn in range(2):
        mine, plain = Cache(), Cache()
        torch._dynamo.reset()
        compiled = torch.compile(mine, backend="graphopt", options={"cache_dir": tmp_path, **options})
        for i in range(3):
            x, at = torch.randn(1, 16), torch.tensor([i])
            before = mine.rows._version
            torch.testing.assert_close(compiled(x, at), plain(x, at))
            assert mine.rows._version > before
        assert torch.equal(mine.rows, plain.rows)
        assert taken(graphopt.reports()[-1]) == bool(turn)


def test_what_a_call_writes_says_nothing_of_weights(tmp_path: Path) -> None:
    module = Cache()
    module.rows = torch.zeros(64, 64)  # bf16 in truth, until it is written
    for turn in range(3):
        _, report = run(module, torch.randn(1, 64), torch.tensor([1]), folder=tmp_path, **EAGER)
        assert taken(report) == bool(turn)


def test_it_is_taken_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys, torch, graphopt\n"
        "from torch import nn\n"
        "net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())\n"
        "with torch.no_grad():\n"
        "    torch.compile(net, backend='graphopt', options={'backend': 'eager', 'cache_dir': sys.argv[1]})(torch.ones(2, 4))\n"
        "print('taken' in graphopt.reports()[0].seconds)\n"
    )
    said = [subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True) for _ in range(2)]
    assert [s.stdout.strip() for s in said] == ["False", "True"]


# --- where it is not ---------------------------------------------------------------------------------------------------


def test_a_damaged_file_counts_for_nothing(tmp_path: Path) -> None:
    x, net = torch.randn(5, 48), Net()
    run(net, x, folder=tmp_path, **EAGER)
    (file,) = (tmp_path / "graphs").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"?")
    out, report = run(net, x, folder=tmp_path, **EAGER)
    torch.testing.assert_close(out, net(x))
    assert not taken(report)
    assert taken(run(net, x, folder=tmp_path, **EAGER)[1]), "a good one is in its place"


def test_other_code_makes_another_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 48)
    run(Net(), x, folder=tmp_path, **EAGER)
    monkeypatch.setattr(kept, "sources", lambda: "of another version")
    assert not taken(run(Net(), x, folder=tmp_path, **EAGER)[1])


@pytest.mark.parametrize("options", [{"fuel": 3}, {"skip_rewrites": (1,)}, {"pipeline": "canonicalize"}, {"verify": "each-pass"},
                                     {"keep_graphs": False}], ids=str)  # fmt: skip
def test_single_passes_are_asked_for(tmp_path: Path, options: dict[str, Any]) -> None:
    for _ in range(2):
        assert not taken(run(Net(), torch.randn(5, 48), folder=tmp_path, **EAGER, **options)[1])
    assert not (tmp_path / "graphs").exists()


def aliased(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.view(-1), x + 1


def with_literal(x: torch.Tensor) -> torch.Tensor:
    return x + torch.tensor([1.0, 2.0, 3.0])


def of_a_library(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.graphopt_kept.twice(x)


@torch.library.custom_op("graphopt_kept::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def conditional(x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("f", "why"), [(aliased, "share memory"), (of_a_library, "the function twice"), (conditional, "cond"),
                                        (with_literal, "part of its program")])  # fmt: skip
def test_what_is_not_known_to_be_the_same_is_made_anew(tmp_path: Path, f: Callable[..., Any], why: str) -> None:
    x = torch.randn(4, 3)
    for _ in range(2):
        out, report = run(f, x, folder=tmp_path, **EAGER)
        torch.testing.assert_close(out, f(x))
        assert not taken(report)
        assert why in (report.whole or why_anew(report))


def test_a_graph_without_arguments(tmp_path: Path) -> None:
    out, report = run(lambda: torch.arange(6).view(2, 3) * 2, folder=tmp_path, **EAGER)
    assert torch.equal(out, torch.arange(6).view(2, 3) * 2) and "no argument" in why_anew(report)


# --- calls are AOTAutograd's where it has something to do --------------------------------------------------------------


def nested(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return x @ x.mT


@pytest.mark.parametrize("keep_graphs", [True, False])
def test_compiled_under_autocast(tmp_path: Path, keep_graphs: bool) -> None:
    x = torch.randn(16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            out, report = run(nested, x, folder=tmp_path, keep_graphs=keep_graphs, **EAGER)
            assert torch.equal(out, nested(x)) and not taken(report)


def paired(x: torch.Tensor) -> Any:
    return TwoTensor(x + 1, x + 2)


@pytest.mark.parametrize("keep_graphs", [True, False])
def test_tensors_made_of_tensors(tmp_path: Path, keep_graphs: bool) -> None:
    x = torch.randn(4, 3)
    for _ in range(2):
        out, _ = run(paired, x, folder=tmp_path, keep_graphs=keep_graphs, **EAGER)
        assert type(out) is TwoTensor and torch.equal(out.b, x + 2)
        out, _ = run(lambda t: t * 2, TwoTensor(x, x + 1), folder=tmp_path, keep_graphs=keep_graphs, **EAGER)
        assert type(out) is TwoTensor and torch.equal(out.b, x * 2 + 2)


def test_inference_mode(tmp_path: Path) -> None:
    net = Net()
    for turn in range(2):
        with torch.inference_mode():
            x = torch.randn(5, 48)
            out, report = run(net, x, folder=tmp_path, **EAGER)
            torch.testing.assert_close(out, net(x))
        assert taken(report) == bool(turn)


def test_caches_are_off(tmp_path: Path) -> None:
    with setting(lambda: False, lambda v: setattr(torch.compiler.config, "force_disable_caches", v), True):
        for _ in range(2):
            assert not taken(run(Net(), torch.randn(5, 48), folder=tmp_path, **EAGER)[1])


def test_arguments_on_several_devices(tmp_path: Path) -> None:
    _, report = run(lambda x, y: (x + 1, y + 1), torch.randn(3), torch.randn(3, device="meta"), folder=tmp_path, **EAGER)
    assert report.whole


# --- files -------------------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_counts_for_nothing(tmp_path: Path) -> None:
    x, net = torch.randn(5, 48), Net()
    run(net, x, folder=tmp_path, **EAGER)
    (file,) = (tmp_path / "graphs").iterdir()
    data = b"no pickle"
    file.write_bytes(hashlib.sha256(data).digest() + data)
    assert not taken(run(net, x, folder=tmp_path, **EAGER)[1])


def test_a_folder_that_may_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("read only")

    x, net = torch.randn(5, 48), Net()
    run(net, x, folder=tmp_path, **EAGER)
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    assert taken(run(net, x, folder=tmp_path, **EAGER)[1])
    assert "read only" in why_anew(run(net, torch.randn(6, 48), folder=tmp_path, **EAGER)[1])
    assert len(list((tmp_path / "graphs").iterdir())) == 1, "nothing is left of what could not be written"


def test_symbolic_sizes_and_arguments_that_share_memory(tmp_path: Path) -> None:
    f = torch.compile(lambda x, y: x + y, backend="graphopt", options={"cache_dir": tmp_path, **EAGER}, dynamic=True)
    f(torch.randn(4, 3), torch.randn(4, 3))
    assert "an argument of type" in why_anew(graphopt.reports()[-1])
    x = torch.randn(5, 3)
    assert "share memory" in why_anew(run(lambda x, y: x * y, x[:4], x[1:], folder=tmp_path, **EAGER)[1])


def test_files_that_were_not_used_for_longest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST", 2)
    for n in (3, 4, 5):
        run(Net(), torch.randn(n, 48), folder=tmp_path, **EAGER)
    assert len(list((tmp_path / "graphs").iterdir())) == 2
    assert taken(run(Net(), torch.randn(5, 48), folder=tmp_path, **EAGER)[1])
    assert not taken(run(Net(), torch.randn(3, 48), folder=tmp_path, **EAGER)[1])


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "graphs").write_text("a file")
    x, net = torch.randn(5, 48), Net()
    out, report = run(net, x, folder=tmp_path, **EAGER)
    torch.testing.assert_close(out, net(x))
    assert "graphs" in why_anew(report)


# --- the identity of a graph -------------------------------------------------------------------------------------------


def text_of(f: Callable[..., Any], *args: Any) -> str:
    """The identity of what Dynamo makes of a function; empty where there is none."""
    found = []

    def look(gm: torch.fx.GraphModule, examples: Any) -> Any:
        try:
            found.append(graph_text(gm, examples, frozen_inputs(gm, examples), input_names(gm)))
        except Unknown:
            found.append("")
        return gm.forward

    torch._dynamo.reset()
    torch.compile(f, backend=look, dynamic=False)(*args)
    return found[0]


def scaled(factor: Any) -> Callable[..., Any]:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.clamp(x * factor, max=factor)

    return f


def test_the_identity_tells_graphs_apart() -> None:
    x = torch.randn(4, 6)
    inputs = [x, torch.randn(4, 7), torch.randn(6, 4).mT, x.double(), torch.randn(5, 6)[1:], nn.Parameter(x)]
    texts = [text_of(scaled(2.0), i) for i in inputs] + [text_of(scaled(c), x) for c in (3.0, 2, 2.0000000001, float("inf"))]
    assert all(texts) and len(set(texts)) == len(texts)
    assert text_of(scaled(2.0), torch.randn(4, 6)) == texts[0]


@contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


cuda = torch.backends.cuda
SETTINGS = {
    "precision": lambda: setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "dtype": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "deterministic": lambda: setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    "flash": lambda: setting(cuda.flash_sdp_enabled, cuda.enable_flash_sdp, False),
    "autocast": lambda: setting(lambda: torch.get_autocast_dtype("cpu"), lambda d: torch.set_autocast_dtype("cpu", d), torch.float16),
    "flush": lambda: setting(lambda: False, torch.set_flush_denormal, True),
    "grad": torch.enable_grad,
    "inference": torch.inference_mode,
    "mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
}


def test_the_identity_tells_settings_apart() -> None:
    x = torch.randn(4, 6)
    texts = [text_of(scaled(2.0), x)]
    for name, changed in SETTINGS.items():
        with changed():  # type: ignore[no-untyped-call]
            if name == "inference":
                x = torch.randn(4, 6)
            texts.append(text_of(scaled(2.0), x))
    assert all(texts) and len(set(texts)) == len(texts)


def test_settings_without_an_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 6)
    with torch.autocast("cpu"):
        assert text_of(scaled(2.0), x) == ""
    with monkeypatch.context() as m:
        m.setattr(torch.nn.functional, "silu", lambda x: x)
        assert text_of(scaled(2.0), x) == ""
    with setting(lambda: "none", lambda v: setattr(torch.backends, "fp32_precision", v), "tf32"):
        text_of(scaled(2.0), x)  # whatever it is, it is no error
    assert text_of(scaled(2.0), x)


def test_the_key_depends_on_what_decides() -> None:
    cpu = torch.device("cpu")
    base = kept.key_of("text", [], cpu, Options(), "model")
    others = [kept.key_of("text", [1], cpu, Options(), "model"), kept.key_of("text", [], cpu, Options(), "other"),
              *(kept.key_of("text", [], cpu, o, "model") for o in (Options(precision="bf16"), Options(target="cpu:x86-64-v3"),
                                                                  Options(strict=True), Options(backend="eager")))]  # fmt: skip
    assert len({base, *others}) == 1 + len(others)
    assert kept.key_of("text", [], cpu, Options(cache_dir=Path("x"), workers=3), "model") == base
