"""graphopt.quantize on convolutions: batch norms folded first, integers from one to the next, and a ledger of what stayed in float."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import graphopt
from graphopt.bits import fastest_within
from graphopt.capture.export import exported_graph
from graphopt.capture.fx import capture_fx
from graphopt.folding import without_norms
from graphopt.ir import evaluate
from graphopt.quantization import ledger_of
from graphopt.quantized_conv import QuantizedConv


class Bottleneck(nn.Module):
    """Three convolutions with batch norms, and a residual around them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 5, stride=2, padding=2)
        self.down = nn.Sequential(nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(64, 64, 3, padding="same"), nn.BatchNorm2d(64, affine=False), nn.ReLU())
        self.up = nn.Sequential(nn.Conv2d(64, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.grouped = nn.Conv2d(32, 32, 3, groups=8)
        self.circular = nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular")
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.up(self.wide(self.down(x))))
        return self.head(self.circular(self.grouped(x)).mean((2, 3)))


@pytest.fixture
def model() -> Bottleneck:
    torch.manual_seed(0)
    made = Bottleneck().eval()
    for m in made.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, 0, 0.2)
    return made


X = torch.randn(2, 3, 16, 14, generator=torch.Generator().manual_seed(1))
QUANTIZED = ["stem", "down.0", "wide.0", "up.0"]


def test_batch_norms_are_folded_first(model: Bottleneck) -> None:
    folded, note = without_norms(model, ["down.0", "wide.0"], [((X,), {})])
    assert not note and [n for n, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["up.1"]
    assert torch.allclose(folded(X), model(X), atol=1e-5) and isinstance(model.down[1], nn.BatchNorm2d)


class TwoReaders(nn.Module):
    """A convolution whose result is also read beside its batch norm, and one that two batch norms read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n, self.m = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return y + self.n(y) + self.m(self.b(x)) + self.m(self.b(-x))


def test_what_others_read_is_not_folded() -> None:
    model = TwoReaders().eval()
    assert without_norms(model, ["a", "b"], [((X,), {})]) == (model, "")


@torch.no_grad()
def error(made: nn.Module, model: nn.Module) -> float:
    """Of the output, relative to its norm."""
    return float((made(X) - model(X)).norm() / model(X).norm())


class NormAndRelu(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


def pair(what: str) -> nn.Sequential:
    """A convolution and a batch norm, one of which does something besides."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 16, 3), (NormAndRelu if what == "subclass" else nn.BatchNorm2d)(16)).eval()
    made[1].running_var.uniform_(0.5, 2)
    match what:
        case "hook behind the norm":
            made[1].register_forward_hook(lambda m, args, y: torch.relu(y))
        case "hook before the norm":
            made[1].register_forward_pre_hook(lambda m, args: (torch.relu(args[0]),))
        case "hook behind the convolution":
            made[0].register_forward_hook(lambda m, args, y: y * 2)
        case "forward of its own":
            made[1].forward = lambda x: torch.relu(nn.BatchNorm2d.forward(made[1], x))
    return made


@pytest.mark.parametrize("what", ["subclass", "hook behind the norm", "hook before the norm", "hook behind the convolution",
                                  "forward of its own"])  # fmt: skip
def test_what_does_more_than_its_class_says_is_not_folded(what: str) -> None:
    model = pair(what)
    assert without_norms(model, ["0"], [((X,), {})])[0] is model
    if "convolution" in what:
        return  # its hook goes with it when it is quantized
    made = graphopt.quantize(model, (X,), scheme="int8-dynamic", measure=False, least=1)
    assert type(made[0]) is QuantizedConv and type(made[1]) is type(model[1])
    assert ledger_of(made).output_error == pytest.approx(error(made, model), rel=1e-3)
    assert ledger_of(made).output_error < 0.03


class Aliased(nn.Module):
    """A convolution and a batch norm that have two names each, the later of which are called."""

    def __init__(self, listed_first: bool) -> None:
        super().__init__()
        conv, norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        for name, m in [("all", nn.ModuleList([conv, norm])), ("c", conv), ("n", norm)][:: 1 if listed_first else -1]:
            setattr(self, name, m)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.all[1](self.c(x))


@pytest.mark.parametrize("listed_first", [False, True])
def test_modules_of_two_names_are_folded(listed_first: bool) -> None:
    torch.manual_seed(0)
    model = Aliased(listed_first).eval()
    model.n.running_var.uniform_(0.5, 2)
    folded, note = without_norms(model, ["all.0" if listed_first else "c"], [((X,), {})])
    assert isinstance(folded.n, nn.Identity) and folded.n is folded.all[1] and not note
    assert torch.allclose(folded(X), model(X), atol=1e-5)
    made = graphopt.quantize(model, (X,), scheme="int8-dynamic", measure=False, least=1)
    assert made.c is made.all[0] and 0 < ledger_of(made).output_error < 0.03


class ByFunction(nn.Module):
    """A function in the place of the norm's (or the convolution's) module."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which, self.c, self.n = which, nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c(x) if self.which == "norm" else nn.functional.conv2d(x, self.c.weight)
        n = self.n
        return nn.functional.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias) if self.which == "norm" else n(x)


@pytest.mark.parametrize("which", ["norm", "convolution"])
def test_what_a_function_reads_is_not_folded(which: str) -> None:
    model = ByFunction(which).eval()
    assert without_norms(model, ["c"], [((X,), {})]) == (model, "")
    assert 0 < ledger_of(graphopt.quantize(model, (X,), scheme="int8-dynamic", measure=False, least=1)).output_error < 0.03


class TwoWays(nn.Module):
    """The norm is left out for some inputs, or looked into, or the way depends on what the input holds."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which, self.c, self.n = which, nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.n.running_var.fill_(4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.c(x)
        if self.which == "size" and x.shape[0] == 1:
            return y
        if self.which == "values" and float(x.sum()) > 1e9:
            return y
        return self.n(y) * (self.n.eps if self.which == "looked into" else 1.0)


@pytest.mark.parametrize(("which", "why"), [("size", "moved by"), ("looked into", "AttributeError"), ("values", "could not be exported")])
def test_what_cannot_be_folded_is_said(which: str, why: str) -> None:
    torch.manual_seed(0)
    model = TwoWays(which).eval()
    other = X[:1] if which == "size" else X
    made = graphopt.quantize(model, (X,), scheme="int8-dynamic", measure=False, least=1, calibration=[X, other])
    assert isinstance(made.n, nn.BatchNorm2d) and ledger_of(made).output_error < 0.03
    (note,) = ledger_of(made).notes
    assert note.startswith("batch norms were not folded") and why in note and note in str(ledger_of(made))
    best, _ = fastest_within(model, (X,), budget=0.5, schemes=("int8-dynamic",), measure=False, least=1, calibration=[X, other])
    assert ledger_of(best).notes == [note] and type(best.c) is QuantizedConv
    assert error(best, model) < 0.03


def test_errors_are_told_against_the_model_that_was_given(model: Bottleneck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.folding.EXACT", float("inf"))  # whatever folding does
    monkeypatch.setattr("graphopt.folding._folded", lambda conv, norm: conv)
    wrong = graphopt.quantize(model, (X,), scheme="int8-dynamic", measure=False, least=1 << 11)
    moved = error(wrong, model)
    assert ledger_of(wrong).output_error == pytest.approx(moved, rel=1e-3) and moved > 0.05
    chosen, front = fastest_within(model, (X,), budget=100.0, schemes=("int8-dynamic",), measure=False, least=1 << 11)
    assert ledger_of(chosen).output_error == pytest.approx(moved, rel=1e-3) == front.points[front.chosen].loss


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic"])
def test_quantized_and_compiled(model: Bottleneck, scheme: str) -> None:
    made = graphopt.quantize(model, (X,), scheme=scheme, measure=False, least=1 << 11)
    ledger = {e.name: e for e in ledger_of(made).entries}
    assert [n for n, e in ledger.items() if e.quantized] == QUANTIZED
    assert "8 groups" in ledger["grouped"].verdict and "circular" in ledger["circular"].verdict and "too few" in ledger["head"].verdict
    assert ledger["wide.0"].shape == (64, 576) and ledger["wide.0"].bytes < 0.3 * ledger["wide.0"].float_bytes
    assert 1e-4 < ledger["wide.0"].output_error < 0.02 and ledger_of(made).output_error < 0.05
    compiled = graphopt.compile(made, (X,))
    # the same integers, but those that lie beside a half before they are rounded
    assert torch.allclose(compiled(X), made(X), atol=2e-3)
    assert not compiled._compiled.report.fallbacks and not compiled._compiled.report.notes
    torch.save(made, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), made(X))


def test_layers_are_chosen_by_what_they_cost(model: Bottleneck) -> None:
    made, front = fastest_within(model, (X,), budget=0.5, schemes=("int8-static",), measure=False, least=1 << 11)
    assert sorted(front.points[front.chosen].schemes) == sorted(QUANTIZED), "all of them"
    exact = model(X)
    assert float(((made(X) - exact).norm() / exact.norm()).detach()) < 0.05, "their batch norms are folded in each model that is judged"
    assert all(p.loss is None or p.loss < 0.05 for p in front.points)


def test_schemes_of_weights_alone_leave_them(model: Bottleneck) -> None:
    ledger = ledger_of(graphopt.quantize(model, (X,), scheme="int8-weight", measure=False, least=16))
    assert [e.name for e in ledger.entries if e.quantized] == ["head"] and len(ledger.entries) == len(QUANTIZED) + 3
    assert all("with their images alone" in e.verdict for e in ledger.entries if e.name != "head")
    ledger = ledger_of(graphopt.quantize(model, (X,), scheme={"up.0": "int8-static", "*": "int8-weight"}, measure=False, least=16))
    verdicts = {e.name: e.verdict for e in ledger.entries}
    assert verdicts["up.0"] == verdicts["head"] == "quantized" and "with their images alone" in verdicts["stem"]


def test_times_are_measured(model: Bottleneck) -> None:
    ledger = ledger_of(graphopt.quantize(model, (X,), scheme="int8-static", revert=False, least=1 << 11))
    timed = [e for e in ledger.entries if e.quantized]
    assert [e.name for e in timed] == QUANTIZED and all(e.kernel == "conv-int8" and e.seconds and e.float_seconds for e in timed)


def test_what_finds_an_images_scale_is_part_of_its_time() -> None:
    x = torch.randn(1, 64, 16, 16)
    ledger = ledger_of(graphopt.quantize(nn.Sequential(nn.Conv2d(64, 64, 3)), (x,), scheme="int8-dynamic", revert=False))
    (entry,) = ledger.entries
    assert entry.kernel is not None and entry.kernel.split(", ")[0] == "conv-int8" and len(entry.kernel.split(", ")) == 2


def test_a_pass_of_the_compilation_does_the_same(model: Bottleneck) -> None:
    compiled, exact = graphopt.compile(model, (X,), quantize="int8-dynamic"), model(X)
    error = float(((compiled(X) - exact).norm() / exact.norm()).detach())
    assert 1e-4 < error < 0.05 and not compiled._compiled.report.fallbacks


@pytest.mark.parametrize(("dims", "image"), [(1, (20,)), (3, (4, 5, 6))])
def test_other_numbers_of_axes(dims: int, image: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    conv = (nn.Conv1d if dims == 1 else nn.Conv3d)(16, 32, 3, padding=1)
    x = torch.randn(1, 16, *image)
    made = graphopt.quantize(nn.Sequential(conv), (x,), scheme="int8-dynamic", measure=False)
    compiled = graphopt.compile(made, (x,))
    assert ledger_of(made).entries[0].quantized and torch.allclose(compiled(x), made(x), atol=1e-5)
    assert torch.allclose(made(x[0]), made(x)[0]), "an image without an axis of images"


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic"])
@pytest.mark.parametrize("shape", [(1, 64, 1, 1), (2, 64, 1, 1), (1, 64, 1, 7), (1, 64, 7, 1)])
def test_images_of_one_pixel_line_or_column(scheme: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    made = graphopt.quantize(nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU()), (x,), scheme=scheme, measure=False, least=1)
    compiled = graphopt.compile(made, (x,))
    assert torch.allclose(compiled(x), made(x), atol=1e-5) and not compiled._compiled.report.fallbacks


@pytest.mark.parametrize("step", [None, 0.05])
def test_the_operator_is_what_the_graph_says(step: float | None) -> None:
    """Eager and the interpreter: the same integers, whatever the image holds."""
    torch.manual_seed(0)
    conv = QuantizedConv.of(nn.Conv2d(130, 16, 3, stride=2, padding=1), graphopt.passes.quantization.scheme.Scheme.parse("int8-dynamic"))
    conv.step = None if step is None else torch.tensor(step)
    x = torch.randn(4, 130, 6, 5) * 3
    x[1], x[2, 0, 0, 0], x[3, 1, 1, 1] = 0.0, float("nan"), float("inf")
    exported = exported_graph(conv, (x,), {})
    captured = capture_fx(exported.gm, weights=exported.weights)
    (got,) = evaluate(captured.graph, [exported.slots[i].get() if i in exported.slots else x for i in range(len(captured.graph.inputs))])
    assert torch.equal(conv(x).nan_to_num(7.0), got.nan_to_num(7.0))
    finite = conv(x).isfinite().all(3).all(2).all(1).tolist()
    assert finite == [True, True, step is not None, step is not None], "a scale of each image tells what is no number; a static one cannot"
