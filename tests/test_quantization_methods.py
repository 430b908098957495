"""Calibration, GPTQ, smoothing: what each finds, that it is exact where it must be, and better where it should be."""

from __future__ import annotations

import io
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt.bits import fastest_within
from graphopt.calibration import BINS, OBSERVERS, Observer, samples_of
from graphopt.clipping import round_clipped
from graphopt.errors import UsageError
from graphopt.gptq import Hessian, round_weight
from graphopt.linears import replaced, weight_of
from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantized_linear import QuantizedLinear, dequantize_groups, integer_linear, pack_rows, quantize_groups
from graphopt.scales import ROWS, STRENGTHS, Inputs, scales, smoothquant_scales
from graphopt.smoothing import groups_of
from graphopt.target import detect


class Block(nn.Module):
    """A normalization that feeds a gate, one that feeds a head, one that a residual reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.last = nn.LayerNorm(96), nn.LayerNorm(96), nn.LayerNorm(96)
        self.gate, self.up, self.down = nn.Linear(96, 160), nn.Linear(96, 160, bias=False), nn.Linear(160, 96)
        self.mix, self.head = nn.Linear(96, 96), nn.Linear(96, 130)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before(x)
        x = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        x = self.after(x)
        x = x + self.mix(x)
        return self.head(self.last(x))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    made = Block().eval()
    with torch.no_grad():
        for norm in (made.before, made.after, made.last):
            norm.weight.normal_(1, 0.2)
            norm.bias.normal_(0, 0.2)
    return made


def rows(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Rows whose channels have much to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=torch.Generator().manual_seed(99)) * torch.linspace(0.02, 1.0, k)
    return torch.randn(n, k, generator=generator) @ mixing.t() / k**0.5


# --- layers of integers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
@pytest.mark.parametrize("count", [1, 40])
def test_a_layer_of_integers_compiled(block: Block, scheme: str, count: int) -> None:
    """Eager and compiled round alike: what differs is the rounding of f32, and what that carries over a step of 8 bits."""
    x = torch.randn(count, 96)
    made = graphopt.quantize(block, scheme=scheme, calibration=[torch.randn(50, 96)], least=1)
    compiled = graphopt.compile(made, (x,), strict=True)
    with torch.no_grad():
        assert float((compiled(x) - made(x)).norm() / made(x).norm()) < 2e-3
        assert 0 < float((made(x) - block(x)).norm() / block(x).norm()) < 0.03
    assert {json.loads(k.schedule)["template"] for k in compiled.report.kernels if k.kind == "matmul"} == {"int8"}


ENGINES = {"amx": "bf16", "dot": "pairs"}  # how bf16 is multiplied: by which template
needs_bf16 = pytest.mark.skipif(not detect().bf16_products, reason="this processor multiplies no bf16")


@needs_bf16
@pytest.mark.parametrize(("scheme", "most"), [
    ("fp8-e4m3-dynamic", 0.06), ("fp8-e4m3-static", 0.06), ("fp8-e5m2-dynamic", 0.12), ("fp8-e5m2-static", 0.12),
])  # fmt: skip
@pytest.mark.parametrize("count", [1, 40])
def test_a_layer_of_floats_of_eight_bits_compiled(block: Block, scheme: str, most: float, count: int) -> None:
    x = torch.randn(count, 96)
    made = graphopt.quantize(block, scheme=scheme, calibration=[torch.randn(50, 96)], least=1)
    compiled = graphopt.compile(made, (x,), strict=True)
    with torch.no_grad():
        assert float((compiled(x) - made(x)).norm() / made(x).norm()) < most / 4
        assert 0 < float((made(x) - block(x)).norm() / block(x).norm()) < most
    assert {json.loads(k.schedule)["template"] for k in compiled.report.kernels if k.kind == "matmul"} == {ENGINES[detect().bf16_products]}


@needs_bf16
@pytest.mark.parametrize("scheme", ["fp8-e4m3-dynamic", "fp8-e5m2-dynamic"])
def test_one_layer_is_the_interpreters_floats_of_eight_bits(scheme: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(200, 140), torch.randn(33, 200)
    made = QuantizedLinear.of(layer.weight, None, Scheme.parse(scheme))
    want = integer_linear(x, made.integers, made.scales, None)
    torch.testing.assert_close(graphopt.compile(made, (x,), strict=True)(x), want, rtol=1e-6, atol=1e-6)
    as_option = graphopt.compile(nn.Sequential(layer), (x,), quantize=scheme, strict=True)
    torch.testing.assert_close(as_option(x), want + layer.bias, rtol=1e-6, atol=1e-6)


@needs_bf16
def test_infinite_weights_are_named() -> None:
    layer = nn.Linear(128, 128)
    layer.weight.data[3, 4] = float("inf")
    with pytest.raises(UsageError, match=r"0\.weight cannot be quantized: 1 of its"):
        graphopt.quantize(nn.Sequential(layer), (torch.randn(2, 128),), scheme="fp8-e4m3-dynamic", measure=False)


def test_one_layer_is_the_interpreters_integers() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(200, 140), torch.randn(33, 200)
    made = QuantizedLinear.of(layer.weight, None, Scheme.parse("int8-dynamic"))
    want = integer_linear(x, made.integers, made.scales, None)
    torch.testing.assert_close(graphopt.compile(made, (x,), strict=True)(x), want, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("scheme", [
    "int8-dynamic", "int8-static", *(pytest.param(s, marks=needs_bf16) for s in ("fp8-e4m3-dynamic", "fp8-e5m2-static")),
])  # fmt: skip
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_no_number_stays_none(scheme: str, bad: float) -> None:
    """It must not become integers like any others; the other rows are as they were."""
    model, x = nn.Sequential(nn.Linear(128, 64)).eval(), torch.randn(5, 128)
    made = graphopt.quantize(model, (x,), scheme=scheme, measure=False, least=1)
    compiled = graphopt.compile(made, (x,), strict=True)
    want = compiled(x)
    x[3, 70] = bad
    for got in (compiled(x), made(x)):
        assert bool(got[3].isnan().all()) and torch.equal(got.isnan().any(1), torch.arange(5) == 3)
    assert torch.equal(compiled(x)[[0, 1, 2, 4]], want[[0, 1, 2, 4]])


def test_static_layers_are_saved_and_loaded(block: Block) -> None:
    x = torch.randn(7, 96)
    made = graphopt.quantize(block, (x,), scheme="int8-static", measure=False, least=1)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.load(file, weights_only=False)(x), made(x))
    other = graphopt.quantize(block, (2 * x,), scheme="int8-static", measure=False, least=1)
    assert float(other.mix.step) != float(made.mix.step)
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), made(x))


def test_static_needs_calibration(block: Block) -> None:
    with pytest.raises(UsageError, match="nothing to calibrate on"):
        graphopt.quantize(block, scheme="int8-static")
    with pytest.raises(UsageError, match="needs calibration"):
        graphopt.compile(block, (torch.randn(2, 96),), quantize="int8-static")
    with pytest.raises(UsageError, match="there is no method 'gptk'"):
        graphopt.quantize(block, method="gptk")
    with pytest.raises(UsageError, match="no observer"):
        graphopt.quantize(block, observer="mean")


def test_samples() -> None:
    x = torch.ones(1)
    assert samples_of([x, (x, 2), {"y": x}], (), {}) == [((x,), {}), ((x, 2), {}), ((), {"y": x})]
    assert samples_of(None, (x,), {"y": 1}) == [((x,), {"y": 1})]


def test_calibration_that_the_model_does_not_take_is_told_by_its_batch() -> None:
    model, x = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)), torch.randn(4, 128)
    narrow = "model raised RuntimeError: mat1 and mat2 shapes cannot be multiplied .*, in 0 \\(Linear\\)"
    for calibration, words in (
        ([x, x[:, :96]], f"^calibration batch 1: the {narrow}"), ([x[:, :96]], f"^calibration batch 0: the {narrow}"),
        ([(x, x)], r"^calibration batch 0: Sequential takes \(input\), and is given \(Tensor, Tensor\): .* of batches \(x, y\), give"),
        ([{"x": x}], r"is given \(x=...\): missing a required argument: 'input'"),
        (x, "calibration is one Tensor"), ({"input": x}, "calibration is one dict"),
    ):  # fmt: skip
        for method, scheme in (("gptq", "int4-weight"), ("smoothquant", "int8-weight"), ("rtn", "int8-static")):
            with pytest.raises(UsageError, match=words) as error:
                graphopt.quantize(model, (x,), scheme=scheme, method=method, calibration=calibration, measure=False)
        assert isinstance(calibration, torch.Tensor | dict) or error.value.__cause__ is not None
        with pytest.raises(UsageError, match=words):
            fastest_within(model, (x,), budget=0.1, calibration=calibration, measure=False)
        with pytest.raises(UsageError, match=words):
            graphopt.fake_quantize(model, scheme="int8-static", calibration=calibration)
    with pytest.raises(UsageError, match=f"^the example inputs: the {narrow}"):
        graphopt.quantize(model, (x[:, :96],))
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


# --- observers ------------------------------------------------------------------------------------------------------------


def test_ranges() -> None:
    """A lone outlier is what all but the first method leave out."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    observer = Observer()
    observer.see(x)
    observer.see(torch.tensor([60.0]))
    found = {m: observer.range(m) for m in OBSERVERS}
    assert found["minmax"] == 60.0 and float(observer.counts.sum()) == 100_001
    assert 3.5 < found["percentile"] < 4.5 and 2.5 < found["entropy"] < 60.0 and found["mse"] < 60.0

    def error(most: float) -> float:
        step = most / 127
        y = torch.cat([x, torch.tensor([60.0])])
        return float(((y / step).round().clamp(-127, 127) * step - y).square().sum())

    assert error(found["mse"]) <= min(error(found[m]) for m in OBSERVERS) * 1.01


SHAPES_OF_INPUTS = {
    "normal": lambda x: x,
    "behind a ReLU": torch.relu,
    "nine of ten are zeros": lambda x: x * (torch.rand_like(x) < 0.1),
    "99 of 100 are zeros": lambda x: x * (torch.rand_like(x) < 0.01),
    "one value": torch.ones_like,
    "zeros and ones": lambda x: (x > 1).float(),
    "small and large": lambda x: x * torch.where(torch.rand_like(x) < 0.5, 0.01, 1.0),
    "two heaps": lambda x: x * 0.1 + 1 + 9 * (x > 1),
    "heavy tails": lambda x: x.exp() * x,
    "shares": lambda x: torch.softmax(3 * x, -1),
    "a large channel": lambda x: x * (1 + 99 * torch.eye(64)[7]),
}


@pytest.mark.parametrize("kind", SHAPES_OF_INPUTS)
def test_entropy_is_not_far_worse_than_the_whole_range(kind: str) -> None:
    """Also where most is zero, which every range represents; and by squared errors ``mse`` is the best, up to the width of bins."""
    torch.manual_seed(0)
    x, layer, observer = SHAPES_OF_INPUTS[kind](torch.randn(2000, 64)), nn.Linear(64, 64, bias=False), Observer()
    for part in x.split(500):
        observer.see(part)
    errors, squares = {}, {}
    with torch.no_grad():
        want = layer(x)
        for method in OBSERVERS:
            step = observer.step(method)
            rounded = (x / step).round().clamp(-128, 127) * step
            errors[method] = float((layer(rounded) - want).norm() / want.norm())
            squares[method] = float((rounded - x).square().sum())
    assert errors["entropy"] <= 1.05 * errors["minmax"] + 1e-6, errors
    assert squares["mse"] <= 1.1 * min(squares.values()) + 1e-6, squares


def test_a_histogram_widens() -> None:
    observer = Observer()
    for i in range(12):
        observer.see(torch.full((10,), 2.0**i))
    assert observer.counts.sum() == 120 and len(observer.counts) == BINS and observer.range("minmax") == 2.0**11
    silent = Observer()
    silent.see(torch.zeros(5))
    assert all(silent.step(m) > 0 for m in OBSERVERS)
    with pytest.raises(UsageError, match="infinite"):
        observer.see(torch.tensor([1.0, float("nan")]))


# --- GPTQ -----------------------------------------------------------------------------------------------------------------


def lost(parts: tuple, w: torch.Tensor, x: torch.Tensor, bits: int) -> float:
    return float((x @ (dequantize_groups(*parts, bits, w.shape[1]) - w).t()).norm() / (x @ w.t()).norm())


def hessian(x: torch.Tensor) -> Hessian:
    h = Hessian(x.shape[1])
    h.see(x)
    return h


@pytest.mark.parametrize("name", ["int4-weight", "int4-weight-g32-zp", "int8-dynamic", "int2-weight", "fp8-e4m3-weight"])
@pytest.mark.parametrize("k", [160, 301])
def test_gptq_is_better_than_to_the_nearest(name: str, k: int) -> None:
    scheme, w, x = Scheme.parse(name), torch.randn(40, k, generator=torch.Generator().manual_seed(1)), rows(1000, k)
    best, nearest = (lost(p, w, x, scheme.bits) for p in (round_weight(w, hessian(x), scheme), quantize_groups(w, scheme)))
    assert best < 0.85 * nearest


def test_gptq_with_independent_channels_is_rounding_to_the_nearest() -> None:
    scheme, w = Scheme.parse("int4-weight"), torch.randn(20, 150)
    h = Hessian(150)
    h.matrix = torch.eye(150)
    for got, want in zip(round_weight(w, h, scheme), quantize_groups(w, scheme), strict=True):
        assert (got is None and want is None) or torch.allclose(got.float(), want.float())


def test_gptq_by_blocks_is_gptq_by_columns() -> None:
    """The updates of a block at once give what a column at a time gives, with the inverse Hessian written out."""
    scheme, w, x = Scheme.parse("int4-weight-g64"), torch.randn(8, 256, generator=torch.Generator().manual_seed(2)), rows(600, 256)
    q, scales, _ = round_weight(w, hessian(x), scheme)
    h = (x.t() @ x).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(256)), upper=True)
    left, want, steps = w.double(), torch.zeros(8, 256), []
    for j in range(256):
        if j % 64 == 0:
            steps.append(left[:, j : j + 64].abs().amax(1) / 7)
        want[:, j] = (left[:, j] / steps[-1]).round().clamp(-8, 7)
        left = left - ((left[:, j] - want[:, j] * steps[-1]) / factor[j, j]).unsqueeze(1) * factor[j] * (torch.arange(256) >= j)
    torch.testing.assert_close(scales, torch.stack(steps, 1).float(), rtol=1e-4, atol=0)
    assert float((q != pack_rows(want, 4, True)).float().mean()) < 0.01  # the two inverses differ by rounding


@pytest.mark.parametrize("name", ["int4-weight", "int2-weight"])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("count", [1, 4, 16, 64, 128, 256])
def test_gptq_of_few_rows_is_no_worse_than_to_the_nearest(name: str, alike: bool, count: int) -> None:
    """On other rows than it saw."""
    scheme, w = Scheme.parse(name), torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    seen, others = (rows(n, 256, seed) if alike else torch.randn(n, 256, generator=torch.Generator().manual_seed(seed))
                    for n, seed in ((count, 5), (2000, 6)))  # fmt: skip
    got, nearest = (lost(p, w, others, scheme.bits) for p in (round_weight(w, hessian(seen), scheme), quantize_groups(w, scheme)))
    assert got <= 1.01 * nearest and (not alike or count < 128 or got < 0.9 * nearest), (got, nearest)


def test_what_calibration_does_not_tell_is_said() -> None:
    """Of GPTQ's rows, and of static ranges that the example inputs leave."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)).eval(), torch.randn(8, 128)
    given = {"scheme": "int4-weight", "method": "gptq", "measure": False}
    made = graphopt.quantize(model, (x,), calibration=[torch.randn(50, 128)], **given)
    assert [e.remark for e in made.ledger.entries] == ["calibration had 50 rows of 128 columns"] * 2
    assert "50 rows of 128" in made.ledger.table(300)
    made = graphopt.quantize(model, (x,), calibration=[torch.randn(500, 128)], **given)
    assert [e.remark for e in made.ledger.entries] == ["", ""]
    made = graphopt.quantize(model, (x,), calibration=[torch.zeros(500, 128)], **given)
    nearest = graphopt.quantize(model, (x,), scheme="int4-weight", measure=False)
    assert made.ledger.entries[0].remark == "to the nearest, as calibration met nothing but zeros there"
    assert torch.equal(made[0].weight, nearest[0].weight)
    made = graphopt.quantize(model, (x,), scheme="int8-static", calibration=[torch.zeros(4, 128)], measure=False)
    first, last = made.ledger.entries
    assert "nothing but zeros" in first.verdict and "of the example inputs' norm is beyond" in last.remark
    for scheme, method in (("int4-weight", "gptq"), ("int8-static", "rtn"), ("int4-weight", "awq")):
        with pytest.raises(UsageError, match="nothing to calibrate on"):
            graphopt.quantize(model, (x,), scheme=scheme, method=method, calibration=[x[:0]], measure=False)


def test_silent_channels() -> None:
    scheme, w, x = Scheme.parse("int4-weight"), torch.randn(10, 128), rows(300, 128)
    x[:, 5] = 0
    assert lost(round_weight(w, hessian(x), scheme), w, x, 4) < 0.2
    assert lost(round_weight(w, Hessian(128), scheme), w, x, 4) < 0.3  # nothing was seen at all


# --- smoothing ------------------------------------------------------------------------------------------------------------


def test_groups_come_from_the_graph(block: Block) -> None:
    """What a residual reads is no group, whatever its modules are called."""
    groups = groups_of(block, (torch.randn(3, 96),), {})
    assert [(g.norm, set(g.linears)) for g in groups] == [("before", {"gate", "up"}), ("last", {"head"})]
    assert [g.norm for g in groups_of(block, (torch.randn(2, 3, 96),), {})] == ["before", "last"]


def test_a_tied_weight_is_left(block: Block) -> None:
    block.mix.weight = nn.Parameter(torch.randn(130, 96))
    block.mix.bias = None
    block.head.weight = block.mix.weight
    block.forward = lambda x: block.head(block.last(x)) @ block.mix(x).t()  # type: ignore[method-assign]
    assert groups_of(block, (torch.randn(3, 96),), {}) == []


@pytest.mark.parametrize("method", ["smoothquant", "awq"])
def test_scales_are_moved_exactly(block: Block, method: str) -> None:
    from graphopt.smoothing import smoothed

    x = torch.randn(200, 96, dtype=torch.float64)
    samples = [((x.float(),), {})]
    scheme = Scheme.parse("int8-static" if method == "smoothquant" else "int4-weight")
    schemes = dict.fromkeys(("gate", "up", "down", "mix", "head"), scheme)
    with torch.no_grad():  # channels that are not alike: otherwise nothing is gained by moving scales
        for norm, readers in ((block.before, (block.gate, block.up)), (block.last, (block.head,))):
            norm.weight[:9] *= 20
            for m in readers:
                m.weight[:, :9] /= 20
    modules = smoothed(block, groups_of(block, *samples[0]), ["down", "mix"], samples, schemes, method, weight_of)
    assert set(modules) >= {"before", "gate", "up", "last", "head"}
    moved = replaced(block, modules)
    assert not torch.equal(moved.gate.weight, block.gate.weight)
    assert moved.gate.bias is block.gate.bias
    with torch.no_grad():
        want = block.double()(x)
        torch.testing.assert_close(moved.double()(x), want, rtol=1e-4, atol=1e-5)


def test_a_layer_smooths_its_own_inputs(block: Block) -> None:
    """What no normalization makes is multiplied in the kernel that rounds it, channels of very different sizes getting their own digits."""
    with torch.no_grad():
        block.up.weight[:5] *= 50
        block.down.weight[:, :5] /= 50
    x, calibration = torch.randn(40, 96), [torch.randn(100, 96)]
    errors = {}
    for method in ("rtn", "smoothquant"):
        made = graphopt.quantize(block, scheme="int8-static", method=method, calibration=calibration, least=1)
        compiled = graphopt.compile(made, (x,), strict=True)
        with torch.no_grad():
            assert float((compiled(x) - made(x)).norm() / made(x).norm()) < 2e-3
            errors[method] = float((made(x) - block(x)).norm() / block(x).norm())
    assert made.down.smooth is not None and errors["smoothquant"] < errors["rtn"] / 2, errors
    assert {json.loads(k.schedule)["template"] for k in compiled.report.kernels if k.kind == "matmul"} == {"int8"}


class Gated(nn.Module):
    """What multiplies is read twice, so that no normalization can take scales."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.down = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.sigmoid(self.gate(x)) * x)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).logits


def without_biases(kind: str) -> tuple[nn.Module, torch.Tensor, list[torch.Tensor]]:
    """A model whose linear layers have no biases, an example, and calls to calibrate on, of uneven columns."""
    if kind == "llama":
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                                          intermediate_size=256, vocab_size=500, use_cache=False)  # fmt: skip
        model, calibration = Logits(transformers.LlamaForCausalLM(config)), [torch.randint(500, (4, 32)) for _ in range(3)]
        return model.eval(), torch.randint(500, (2, 16)), calibration
    layer, uneven = {"bias": False}, torch.ones(128)
    uneven[::12] = 20.0
    norm = nn.LayerNorm(128, bias=False)
    norm.weight = nn.Parameter(uneven.clone())
    model = {"mlp": lambda: nn.Sequential(nn.Linear(128, 200, **layer), nn.ReLU(), nn.Linear(200, 128, **layer)),
             "norm": lambda: nn.Sequential(norm, nn.Linear(128, 200, **layer)), "gated": Gated}[kind]()  # fmt: skip
    return model.eval(), torch.randn(6, 128) * uneven, [torch.randn(100, 128) * uneven for _ in range(3)]


@pytest.mark.parametrize("kind", ["mlp", "norm", "gated", "llama"])
@pytest.mark.parametrize(("scheme", "method", "most"), [
    ("int4-weight", "awq", 0.25), ("int8-weight", "awq", 0.02), ("int8-dynamic", "smoothquant", 0.04),
    ("int8-static", "smoothquant", 0.05),
])  # fmt: skip
def test_layers_without_biases_that_carry_scales(kind: str, scheme: str, method: str, most: float) -> None:
    """Compiled as exact as in eager, by the same integers in f64; loaded, the same."""
    torch.manual_seed(0)
    model, x, calibration = without_biases(kind)
    made = graphopt.quantize(model, (x,), scheme=scheme, method=method, calibration=calibration, measure=False, least=1)
    smoothed = {n: m for n, m in made.named_modules() if isinstance(m, QuantizedLinear) and m.smooth is not None}
    assert (smoothed or kind == "llama") and all(m.bias is None for m in smoothed.values())
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    with torch.no_grad():
        want, got, compiled = model(x), made(x), graphopt.compile(made, (x,), strict=True)(x)
        assert 0 < float((got - want).norm() / want.norm()) < most
        assert torch.equal(torch.load(file, weights_only=False)(x), got)
        if scheme.endswith("weight"):
            wide = {n: linear_in_f64(m) for n, m in made.named_modules() if isinstance(m, QuantizedLinear)}
            true = replaced(made, wide).double()(x.double() if x.is_floating_point() else x)
            assert float((compiled - true).abs().max()) <= max(4 * float((got - true).abs().max()), 1e-6 * float(true.abs().max()))
        assert float((compiled - got).norm() / got.norm()) < 2e-3


def linear_in_f64(m: QuantizedLinear) -> nn.Linear:
    """What a layer of quantized weights stands for, its inputs' scales multiplied in."""
    weight = dequantize_groups(m.integers, m.scales.double(), m.zeros, m.bits, m.in_features)
    layer = nn.Linear(m.in_features, m.out_features, bias=False)
    layer.weight = nn.Parameter(weight if m.smooth is None else weight * m.smooth.double())
    return layer


def test_smoothquant_on_planted_outliers(block: Block) -> None:
    """Channels 50 times as large as the others, without a change of the function: five times less error at least."""
    chosen = torch.randperm(96, generator=torch.Generator().manual_seed(3))[:3]
    with torch.no_grad():
        for norm, readers in ((block.before, (block.gate, block.up)), (block.last, (block.head,))):
            norm.weight[chosen] *= 50
            norm.bias[chosen] *= 50
            for m in readers:
                m.weight[:, chosen] /= 50
    x, calibration = torch.randn(200, 96), [torch.randn(200, 96) for _ in range(3)]
    errors = {}
    for method in ("rtn", "smoothquant"):
        made = graphopt.quantize(block, scheme="int8-static", method=method, calibration=calibration, least=1)
        with torch.no_grad():
            errors[method] = float((made(x) - block(x)).norm() / block(x).norm())
    assert errors["smoothquant"] < errors["rtn"] / 5, errors


@pytest.mark.parametrize(("method", "scheme"), [("smoothquant", "int8-static"), ("smoothquant", "int8-dynamic"), ("awq", "int4-weight")])
def test_moving_scales_does_not_lose(method: str, scheme: str) -> None:
    """A few tokens with a large channel, and rows without: what is kept is no worse than moving nothing."""
    generator = torch.Generator().manual_seed(4)
    for size in (1.0, 100.0):
        x, w = torch.randn(ROWS, 128, generator=generator), torch.randn(64, 128, generator=generator)
        x[:10, 7] *= size
        inputs = Inputs(128, 1)
        inputs.see(x)
        s = scales(method, inputs, [w], [Scheme.parse(scheme)])
        layer = nn.Linear(128, 64, bias=False)
        errors = []
        for moved in (torch.ones(128), s):
            layer.weight = nn.Parameter(w * moved)
            made = graphopt.quantize(layer, (x / moved,), scheme=scheme, measure=False, least=1)
            errors.append(made.ledger.output_error)
        assert errors[1] <= errors[0] * 1.02 and (method == "awq" or size == 1.0 or errors[1] < errors[0] / 2), (size, errors)


def test_scales_are_not_moved_for_what_chance_gains() -> None:
    """Rows that are much alike: their common error is less for one grid than for another by luck, and the model is none the better."""
    generator = torch.Generator().manual_seed(0)
    moved = []
    for _ in range(12):
        alike, w = torch.randn(128, generator=generator).sign(), torch.randn(256, 128, generator=generator)
        inputs = Inputs(128, 1)
        inputs.see(alike + 0.1 * torch.randn(500, 128, generator=generator))
        moved += [bool((scales("smoothquant", inputs, [w], [Scheme.parse("int4-weight")]) != 1).any())]
    assert sum(moved) <= 1, moved


def test_weights_are_given_the_scales_that_were_tried() -> None:
    """Others would round otherwise; but a static range is that of all rows."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(400, 128, generator=generator) * torch.logspace(-1, 1, 128), torch.randn(64, 128, generator=generator)
    inputs = Inputs(128, 1)
    inputs.see(x)
    for scheme, most in (("int8-dynamic", inputs.rest), ("int8-static", inputs.most)):
        found = scales("smoothquant", inputs, [w], [Scheme.parse(scheme)])
        assert any(torch.equal(found, smoothquant_scales(most, [w], a)) for a in STRENGTHS)


def test_inputs_are_rows_of_all_calls() -> None:
    inputs = Inputs(3, 2)
    for i in range(2):
        inputs.see(torch.full((1000, 3), float(i + 1)))
    assert ROWS * 0.8 < len(inputs.rows) < ROWS * 1.2 and inputs.rows[:, 0].unique().tolist() == [1.0, 2.0]
    assert inputs.mean.tolist() == [1.5] * 3 and inputs.most.tolist() == [2.0] * 3


def test_rows_to_try_scales_on_are_held_out() -> None:
    inputs, x = Inputs(2, 1), torch.arange(1.0, 101.0).reshape(100, 1).expand(100, 2)
    inputs.see(x)
    rest = [v for v in x[:, 0].tolist() if v not in inputs.rows[:, 0].tolist()]
    assert 30 < len(rest) < 70 and inputs.rest.tolist() == [max(rest)] * 2 and inputs.most.tolist() == [100.0] * 2
    single = Inputs(2, 1)
    single.see(torch.ones(1, 2))
    assert single.rows.tolist() == [[1.0, 1.0]] and single.rest.tolist() == [1.0, 1.0]


def test_floats_are_stored_as_floats_by_any_method() -> None:
    scheme, w, x = Scheme.parse("fp8-e4m3-weight-g64"), torch.randn(40, 150, generator=torch.Generator().manual_seed(1)), rows(600, 150)
    nearest = lost(quantize_groups(w, scheme), w, x, 8)
    for parts in (round_clipped(w, hessian(x), scheme), round_weight(w, hessian(x), scheme)):
        assert parts[0].dtype == torch.float8_e4m3fn and lost(parts, w, x, 8) < 1.01 * nearest


@pytest.mark.parametrize("name", ["int4-weight", "int4-weight-g32-zp", "int2-weight"])
@pytest.mark.parametrize("k", [160, 301])
def test_clipping_is_better_than_a_whole_range(name: str, k: int) -> None:
    """Also where no group is full; where nothing was seen, nothing is clipped."""
    scheme, w, x = Scheme.parse(name), torch.randn(40, k, generator=torch.Generator().manual_seed(1)), rows(1000, k)
    w[:, 3] *= 3
    best, nearest = (lost(p, w, x, scheme.bits) for p in (round_clipped(w, hessian(x), scheme), quantize_groups(w, scheme)))
    assert best < 0.97 * nearest
    for got, want in zip(round_clipped(w, Hessian(k), scheme), quantize_groups(w, scheme), strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


def test_scales_of_silent_channels_are_one() -> None:
    s = smoothquant_scales(torch.tensor([0.0, 4.0, 1.0]), [torch.tensor([[1.0, 1.0, 0.0]])], 0.5)
    assert s.tolist() == [1.0, 2.0, 1.0]


# --- properties -----------------------------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 150))
SCHEMES = st.sampled_from(["int8-weight", "int4-weight-g32", "int4-weight-g64-zp", "int2-weight", "int8-weight-g128-zp", "int8-dynamic"])


@settings(max_examples=60, deadline=None)
@given(SHAPES, SCHEMES, st.sampled_from([1.0, 1e-30, 1e-42, 1e30]), st.integers(0, 2**31))
def test_round_trips(shape: tuple[int, int], name: str, scale: float, seed: int) -> None:
    """Half a step is all that an element moves by, where steps can be told from zero; zeros stay zeros; rounding again changes nothing."""
    scheme, generator = Scheme.parse(name), torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * scale
    w[torch.rand(shape, generator=generator) < 0.1] = 0.0
    w[seed % shape[0]] = 0.0
    parts = quantize_groups(w, scheme)
    back = dequantize_groups(*parts, scheme.bits, shape[1])
    assert back.shape == w.shape and bool(torch.isfinite(back).all()) and not back[w == 0].any()
    steps = parts[1].repeat_interleave(-(-shape[1] // parts[1].shape[1]) if not scheme.group else scheme.group, 1)[:, : shape[1]]
    assert bool(((back - w).abs() <= steps * (1.01 if scheme.zero_points else 0.51)).all())
    if scale == 1.0 and not scheme.zero_points:
        again = dequantize_groups(*quantize_groups(back, scheme), scheme.bits, shape[1])
        torch.testing.assert_close(again, back, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from([("fp8-e4m3-weight", 3, -9), ("fp8-e5m2-weight", 2, -16), ("fp8-e4m3-weight-g64", 3, -9)]),
       st.sampled_from([1.0, 1e-25, 1e30]), st.integers(0, 2**31))  # fmt: skip
def test_round_trips_of_floats(shape: tuple[int, int], form: tuple[str, int, int], scale: float, seed: int) -> None:
    """Half a unit of the last bit, or half of the least number; zeros stay zeros; rounding again changes nothing."""
    name, mantissa, least = form
    scheme, generator = Scheme.parse(name), torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp() * scale
    w[seed % shape[0]] = 0.0
    parts = quantize_groups(w, scheme)
    back = dequantize_groups(*parts, scheme.bits, shape[1])
    assert parts[0].element_size() == 1 and bool(torch.isfinite(back).all()) and not back[w == 0].any()
    steps = parts[1].repeat_interleave(scheme.group or shape[1], 1)[:, : shape[1]] * 2.0**least
    assert bool(((back - w).abs() <= 0.501 * torch.maximum(steps, w.abs() * 2.0**-mantissa)).all())
    again = dequantize_groups(*quantize_groups(back, scheme), scheme.bits, shape[1])
    torch.testing.assert_close(again, back, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([(8, True), (8, False), (4, True), (4, False), (2, True), (2, False)]),
       st.integers(0, 2**31))  # fmt: skip
def test_packing_is_a_bijection(n: int, columns: int, form: tuple[int, bool], seed: int) -> None:
    bits, signed = form
    k = columns * (8 // bits)
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    q = torch.randint(low, high, (n, k), generator=torch.Generator().manual_seed(seed)).float()
    zeros = None if signed else torch.zeros(n, 1, dtype=torch.uint8)
    packed = pack_rows(q, bits, signed)
    assert packed.shape == (n, columns) and torch.equal(dequantize_groups(packed, torch.ones(n, 1), zeros, bits, k), q)


# --- models that do not do the same with every input --------------------------------------------------------------------


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(128), nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x: torch.Tensor, both: bool = False) -> torch.Tensor:
        x = self.norm(x)
        return self.a(input=x) + self.b(x) if both else self.a(input=x)


def test_a_layer_that_calibration_never_reached_stays_in_float() -> None:
    model, x = Forked().eval(), torch.randn(8, 128)
    made = graphopt.quantize(model, (x,), scheme="int8-static", measure=False)
    assert {e.name: e.verdict for e in made.ledger.entries} == {"a": "quantized", "b": "left: calibration never reached it"}
    with torch.no_grad():
        want, got = model(x, True), made(x, True)
    assert float((got - want).norm() / want.norm()) < 0.02


def test_moving_scales_is_made_sure_of_on_every_sample() -> None:
    x, model = torch.randn(8, 128), Forked().eval()
    model.norm.weight.data = torch.logspace(-2, 1, 128)
    with pytest.raises(graphopt.errors.GraphoptError, match="another way for some inputs"):
        graphopt.quantize(model, (x,), scheme="int8-dynamic", method="smoothquant", calibration=[(x,), (x, True)], measure=False)


def test_sums_that_may_exceed_32_bits_stay_in_float() -> None:
    model, x = nn.Sequential(nn.Linear(1 << 17, 32, bias=False)), torch.ones(1, 1 << 17)
    made = graphopt.quantize(model, (x,), scheme="int8-dynamic", measure=False)
    assert "may exceed 32 bits" in made.ledger.entries[0].verdict


def test_one_row_without_an_axis_and_half_precision() -> None:
    model, x = nn.Sequential(nn.Linear(128, 128)), torch.randn(128)
    made = graphopt.quantize(model, (x[None],), scheme="int8-dynamic", measure=False)
    assert made(x).shape == (128,)
    assert bool(made.half()(x.half() * 300).isfinite().all())


def test_calibration_is_without_dropout_and_names_what_is_no_number() -> None:
    model, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(128, 128)).train(), torch.randn(4, 128)
    graphopt.quantize(model, (x,), scheme="int8-dynamic", method="awq", measure=False)
    assert model.training and model[0].training
    with pytest.raises(UsageError, match="in the input of 1"):
        graphopt.quantize(model, (x / 0,), scheme="int4-weight", method="gptq", measure=False)


def test_autocast_is_named_where_it_moves_outputs() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128)).eval(), torch.randn(256, 128)
    with torch.no_grad():
        model[0].weight[::9] *= 50  # outliers, so that moving scales surely wins
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(graphopt.errors.GraphoptError, match=r"torch\.autocast is on"):
        graphopt.quantize(model, (x,), scheme="int8-dynamic", method="smoothquant", measure=False)


@pytest.mark.parametrize(("scheme", "method"), [("int2-weight", "split"), ("int8-dynamic", "smoothquant"), ("int8-dynamic", "rtn")])
def test_pytorchs_own_encoder_calls_its_layers(scheme: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes their weights instead where it can: then a layer's own arithmetic would be left out."""
    torch.manual_seed(0)
    model, x = torch.nn.TransformerEncoderLayer(128, 4, 256, batch_first=True).eval(), torch.randn(2, 16, 128)
    made = graphopt.quantize(model, (x,), scheme=scheme, method=method, measure=False)
    seen: list[str] = []
    kind = type(made.linear1)
    before = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, input: seen.append("called") or before(self, input))
    with torch.no_grad():
        made(x)
    assert seen and 0 < made.ledger.output_error < 0.5


class Doubled(nn.Linear):
    """Does more than the linear layer that it is derived from, by a hook."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_forward_hook(lambda module, args, output: 2 * output)


def test_a_layer_derived_from_linear_keeps_its_hooks() -> None:
    model, x = nn.Sequential(Doubled(128, 128), nn.Linear(128, 128)).eval(), torch.randn(8, 128)
    made = graphopt.quantize(model, (x,), scheme="int8-weight", measure=False)
    assert type(made[0]) is Doubled and made.ledger.output_error < 0.02
    assert any(e.name == "0" and e.verdict.startswith("left: Doubled is more than") for e in made.ledger.entries)


def test_a_model_in_training_stays_as_it_is() -> None:
    """Spectral norms take a step of their power iteration whenever the weight is computed in training."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64)), nn.Linear(64, 64)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graphopt.quantize(model, (torch.randn(4, 64),), scheme="int8-weight", measure=False, least=1)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_pruned_bias_is_told() -> None:
    model = nn.Sequential(nn.utils.prune.l1_unstructured(nn.Linear(128, 128), "bias", 0.5), nn.Linear(128, 128)).eval()
    made = graphopt.quantize(model, (torch.randn(4, 128),), scheme="int8-weight", measure=False)
    assert [e.quantized for e in made.ledger.entries if e.name in ("0", "1")] == [False, True]
