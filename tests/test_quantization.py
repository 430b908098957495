"""graphopt.quantize and the option: errors against f64, saving and loading, the ledger, what is left and what is refused."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import UsageError
from graphopt.ledger import Entry, Ledger
from graphopt.ledger_times import families
from graphopt.linears import replaced
from graphopt.passes.quantization.scheme import Scheme
from graphopt.quantized_linear import QuantizedLinear, dequantize_groups, quantize_groups
from graphopt.target import detect

SCHEMES = ("int8-weight", "int8-weight-g64-zp", "int4-weight", "int4-weight-g128-zp", "int2-weight")


class Block(nn.Module):
    """A gate, a residual, a head without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(128, 200), nn.Linear(128, 200), nn.Linear(200, 128)
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 150, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.head(self.norm(x))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("scheme", [*SCHEMES[::2], "fp8-e4m3-weight"])
def test_compiled_is_as_exact_as_eager(block: Block, scheme: str) -> None:
    """Against the same integers in f64: the kernels' error is a rounding of f32, whatever the bits."""
    made = graphopt.quantize(block, scheme=scheme, least=1)
    wide = Block().double().eval()
    state = {name: x.double() for name, x in block.state_dict().items()}
    for name, m in made.named_modules():
        if isinstance(m, QuantizedLinear):
            zeros = None if m.zeros is None else m.zeros
            state[f"{name}.weight"] = dequantize_groups(m.integers, m.scales.double(), zeros, m.bits, m.in_features)
    wide.load_state_dict(state)
    for rows in (1, 40):
        x = torch.randn(rows, 128)
        compiled = graphopt.compile(made, (x,), strict=True)
        with torch.no_grad():
            true = wide(x.double())
            assert error(compiled(x), true) <= max(4 * error(made(x), true), 2e-6)
        templates = [json.loads(k.schedule)["template"] for k in compiled.report.kernels if k.kind == "matmul"]
        many = {"tile", *(["quantized-tiles"] if scheme == "int8-weight" and detect().int8_products == "amx" else [])}
        assert set(templates) == ({"quantized"} if rows <= 8 else many)


@pytest.mark.parametrize("scheme", [*SCHEMES[1:4:2], "fp8-e5m2-weight", "fp8-e4m3-weight-g64"])
def test_the_option_is_the_same_rounding(block: Block, scheme: str) -> None:
    x = torch.randn(3, 128)
    made = graphopt.quantize(block, scheme=scheme)
    with torch.no_grad():
        torch.testing.assert_close(graphopt.compile(block, (x,), quantize=scheme)(x), made(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 40])
def test_integers_on_both_sides(block: Block, rows: int) -> None:
    """int8-dynamic: every product by the kernel of integers, and an error of two roundings to 8 bits."""
    x = torch.randn(rows, 128)
    compiled = graphopt.compile(block, (x,), quantize="int8-dynamic", strict=True)
    with torch.no_grad():
        want = block(x)
        assert float((compiled(x) - want).norm() / want.norm()) < 0.02
    templates = [json.loads(k.schedule)["template"] for k in compiled.report.kernels if k.kind == "matmul"]
    assert templates and set(templates) == {"int8"}


def test_integers_on_both_sides_of_any_number_of_rows(block: Block) -> None:
    rows = torch.export.Dim("rows", min=1, max=64)
    compiled = graphopt.compile(block, (torch.randn(6, 128),), quantize="int8-dynamic", dynamic_shapes=({0: rows},), hot_sizes="none")
    for n in (1, 33):
        x = torch.randn(n, 128)
        with torch.no_grad():
            want = block(x)
            assert float((compiled(x) - want).norm() / want.norm()) < 0.02


def test_the_option_follows_the_weights(block: Block) -> None:
    x = torch.randn(1, 128)
    compiled = graphopt.compile(block, (x,), quantize="int8-weight")
    before = compiled(x)
    with torch.no_grad():
        block.head.weight.mul_(2.0)
        torch.testing.assert_close(compiled(x), 2 * before)


def test_any_number_of_rows(block: Block) -> None:
    x = torch.randn(6, 128)
    made = graphopt.quantize(block, scheme="int4-weight")
    rows = torch.export.Dim("rows", min=1, max=64)
    compiled = graphopt.compile(made, (x,), dynamic_shapes=({0: rows},))
    for n in (1, 6, 33):
        x = torch.randn(n, 128)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), made(x), rtol=1e-4, atol=1e-5)


def test_saved_and_loaded(block: Block) -> None:
    x = torch.randn(2, 128)
    made = graphopt.quantize(block, (x,), scheme="int4-weight", measure=False)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(loaded(x), made(x))
        torch.testing.assert_close(graphopt.compile(loaded, (x,))(x), made(x), rtol=1e-4, atol=1e-5)
    assert loaded.ledger == made.ledger
    other = graphopt.quantize(Block().eval(), scheme="int4-weight")
    other.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), made(x))


def test_bytes(block: Block) -> None:
    """The arithmetic minimum: bits an element, and a scale (and a zero point) a group."""
    for scheme, bits in (("int8-weight-g64", 8 + 32 / 64), ("int4-weight-g128-zp", 4 + 40 / 128)):
        made = QuantizedLinear.of(torch.randn(256, 512), None, Scheme.parse(scheme))
        assert made.nbytes == 256 * 512 * bits / 8


def test_the_ledger(block: Block) -> None:
    x = torch.randn(1, 128)
    made = graphopt.quantize(block, (x,), scheme="int8-weight", revert=False, keep=["head"])
    ledger = made.ledger
    entries = {e.name: e for e in ledger.entries}
    assert list(entries) == ["gate", "up", "down", "head"]
    assert entries["head"].verdict == "left: as asked" and type(made.head) is nn.Linear
    for name in ("gate", "up", "down"):
        e = entries[name]
        assert e.quantized and e.kernel == "quantized" and e.seconds and e.float_seconds and e.bytes_read
        assert 0 < e.weight_error < 0.01 and 0 < e.output_error < 0.02 and e.bytes < 0.3 * e.float_bytes
    assert entries["gate"].together == ("gate", "up") and entries["down"].together == ("down",)
    assert 0 < ledger.output_error < 0.02 and ledger.bytes_saved == sum(e.float_bytes - e.bytes for e in ledger.entries)
    assert json.loads(json.dumps(ledger.to_json()))["entries"][0]["name"] == "gate"
    assert "gate" in ledger.table() and "3 of 4 weights quantized" in ledger.summary()


def test_bits_by_layer(block: Block) -> None:
    """The first pattern that fits counts; what none fits stays in float."""
    x = torch.randn(2, 128)
    made = graphopt.quantize(block, (x,), scheme={"gate": "int4-weight", "up": "float", "[gu]*": "int8-weight", "down": "int8-dynamic"},
                             measure=False)  # fmt: skip
    assert {e.name: e.scheme for e in made.ledger.entries} == {"gate": "int4-weight", "up": "", "down": "int8-dynamic", "head": ""}
    assert made.ledger.entries[1].verdict == "left: as asked" and made.ledger.scheme == "int4-weight (1), int8-dynamic (1)"
    for scheme, words in (({"gate": "int5"}, "there is no scheme"), ({"gaet": "int4-weight"}, r"'gaet': ...\} fits none")):
        with pytest.raises(UsageError, match=words):
            graphopt.quantize(block, scheme=scheme)


def test_what_is_slower_is_put_back(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(model, result, entries, ledger, args, kwargs, options):
        for name, e in entries.items():
            e.seconds, e.float_seconds = (2.0, 1.0) if name == "down" else (1.0, 2.0)

    monkeypatch.setattr("graphopt.quantization.measure_times", measure)
    made = graphopt.quantize(block, (torch.randn(1, 128),), scheme="int8-weight", least=1)
    assert type(made.down) is nn.Linear and isinstance(made.gate, QuantizedLinear)
    entries = {e.name: e for e in made.ledger.entries}
    assert entries["down"].verdict.startswith("reverted: slower") and entries["down"].bytes == entries["down"].float_bytes
    assert made.ledger.seconds is not None and "1 reverted" in made.ledger.summary()


def test_what_is_left(block: Block) -> None:
    head = nn.Linear(4, 5000, dtype=torch.bfloat16)
    model = nn.Sequential(nn.Embedding(200, 128), nn.Linear(128, 200, bias=False), nn.Linear(200, 4), head)
    model[1].weight = model[0].weight
    ledger = graphopt.quantize(model, scheme="int8-weight").ledger
    assert [e.verdict for e in ledger.entries] == [
        "left: its weight is that of 0, too", "left: 800 elements are too few", "left: its weight is bfloat16"
    ]  # fmt: skip


def test_the_model_stays_whatever_becomes_of_the_new_one(block: Block) -> None:
    before = {k: v.clone() for k, v in block.state_dict().items()}
    made = graphopt.quantize(block, scheme="int4-weight")
    with torch.no_grad():
        for t in (*made.parameters(), *made.buffers()):
            t.zero_()
    made.double()
    assert type(block.gate) is nn.Linear and replaced(block, {}).gate is not block.gate
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in block.state_dict().items())


def test_large_tensors_that_stay_in_float_lie_in_the_same_memory() -> None:
    """Tied ones, too; and nothing that is done to the module converts the first model's."""
    embedding, head = nn.Embedding(3000, 128), nn.Linear(128, 3000, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(128, 128, bias=False), head)
    model.register_buffer("table", torch.ones(600, 600))
    made = graphopt.quantize(model, scheme="int8-weight", least=1)
    assert isinstance(made[1], QuantizedLinear) and made[0].weight is made[2].weight is not embedding.weight
    for large, first in ((made[0].weight, embedding.weight), (made.table, model.table)):
        assert large.data_ptr() == first.data_ptr() and large.requires_grad == first.requires_grad
    made.double()
    assert embedding.weight.dtype == torch.float32 == model.table.dtype


def test_conv1d_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    layer = nn.Sequential(transformers.pytorch_utils.Conv1D(200, 128))
    x = torch.randn(3, 128)
    made = graphopt.quantize(layer, scheme="int8-weight")
    with torch.no_grad():
        assert error(made(x), layer(x).double()) < 0.02 and made[0].out_features == 200


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(block: Block, bad: float) -> None:
    with torch.no_grad():
        block.up.weight[3, 5] = bad
    with pytest.raises(UsageError, match=r"up\.weight cannot be quantized: 1 of its 25600 elements"):
        graphopt.quantize(block, scheme="int4-weight")


def test_zeros_and_denormals() -> None:
    w = torch.randn(4, 64)
    w[1], w[2] = 0.0, 1e-40
    for scheme in (*SCHEMES, "fp8-e4m3-weight", "fp8-e5m2-weight"):
        q = QuantizedLinear.of(w, None, Scheme.parse(scheme))
        assert not q.weight[1].any() and bool(torch.isfinite(q.weight).all())


@pytest.mark.parametrize("scheme", [*SCHEMES[::2], "int8-dynamic", "fp8-e4m3-weight"])
@pytest.mark.parametrize("size", [1e-20, 1e-30, 1e-35])
def test_tiny_weights_keep_their_digits(scheme: str, size: float) -> None:
    """Whatever the size of normal numbers, compiled, too; of denormal ones, the error says what is lost."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(128, 200, bias=False)).eval(), torch.randn(6, 128)
    made, errors = None, []
    for factor in (1.0, size / float(model[0].weight.detach().abs().max())):
        with torch.no_grad():
            model[0].weight.mul_(factor)
        made = graphopt.quantize(model, (x,), scheme=scheme, measure=False)
        errors.append((made.ledger.entries[0].weight_error, made.ledger.entries[0].output_error, made.ledger.output_error))
    assert errors[1] == pytest.approx(errors[0], rel=0.02) and errors[0][0] > 1e-3
    with torch.no_grad():
        got, want = graphopt.compile(made, (x,), strict=True)(x).double(), made(x).double()
    assert float((got - want).norm() / want.norm()) < 2e-3
    with torch.no_grad():
        model[0].weight.mul_(1e-42 / size)
    lost = graphopt.quantize(model, (x,), scheme=scheme, measure=False).ledger.entries[0]
    assert lost.weight_error == 1.0


def test_wrong_requests(block: Block) -> None:
    with pytest.raises(UsageError, match="there is no scheme"):
        graphopt.quantize(block, scheme="int5-weight")
    with pytest.raises(UsageError, match="there is no scheme None; schemes of weights are int8-weight"):
        graphopt.quantize(block, scheme=None)
    with pytest.raises(UsageError, match="floats have no zero points"):
        graphopt.quantize(block, scheme="fp8-e4m3-weight-zp")
    with pytest.raises(UsageError, match="fits none of the layers"):
        graphopt.quantize(block, keep=["haed"])
    with pytest.raises(UsageError, match="there is no scheme"):
        graphopt.compile(block, (torch.randn(1, 128),), quantize="int8")
    with pytest.raises(UsageError, match="frozen"):
        graphopt.Options(quantize="int8-weight", freeze=False)


@pytest.mark.parametrize(("text", "words"), [
    ("int4-weigth", "(did you mean 'int4-weight'?)"), ("int5-weight", "-g32, -g64, -g128 or -g256"),
    ("int4-weight-zp-g64", "(the group comes first: int4-weight-g64-zp)"), ("int4-weight-g16", "32, 64, 128 or 256 rows, not 16"),
    ("int8-dynamic-g64", "'int8-dynamic-g64': -g64 is for weights alone"), ("int8-static-zp", "'int8-static-zp': -zp is for weights alone"),
])  # fmt: skip
def test_what_is_wrong_with_a_scheme(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        Scheme.parse(text)


def test_one_tensor_and_no_inputs(block: Block) -> None:
    """One tensor is one argument, as of ``graphopt.compile``; without any, the ledger says what it cannot know."""
    x = torch.randn(3, 128)
    one = graphopt.quantize(block, x, measure=False).ledger
    assert one == graphopt.quantize(block, (x,), measure=False).ledger and one.output_error and not one.notes
    none = graphopt.quantize(block).ledger
    assert none.notes == ["there were no example inputs: nothing was timed, and errors of outputs are not known"]
    assert none.notes[0] in none.summary() and not graphopt.quantize(block, measure=False).ledger.notes


def test_rounding_is_that_of_the_pass() -> None:
    q, scales, zeros = quantize_groups(torch.tensor([[-7.0, 3.5, 0.0, 1.2]]), Scheme.parse("int4-weight-g32"))
    assert zeros is None and scales.tolist() == [[1.0]]
    assert dequantize_groups(q, scales, zeros, 4, 4).tolist() == [[-7.0, 4.0, 0.0, 1.0]]  # halves to even


def testfamilies() -> None:
    assert families([("a", "b"), ("c",), ("b", "c"), ("d",)]) == [("a", "b", "c"), ("d",)]


def test_a_ledger_of_what_is_slower() -> None:
    text = Ledger("int8-weight", [Entry("a", (2, 2), "int8-weight", "quantized", 16, 8)], seconds=2.0, float_seconds=1.0).summary()
    assert "slower: 0.50 times as fast" in text


@pytest.mark.parametrize(("was", "now", "text"), [(2_000_000, 530_000, "2.0 MB became 530.0 kB"), (16, 8, "0.0 kB became 0.0 kB")])
def test_small_weights_are_told_in_kilobytes(was: int, now: int, text: str) -> None:
    assert text in Ledger("int8-weight", [Entry("a", (2, 2), "int8-weight", "quantized", was, now)]).summary()


def test_names_are_whole_whatever_the_verdict() -> None:
    name = "encoder.layers.11.self_attn.in_proj_weight"
    assert name in Ledger("s", [Entry(name, (2304, 768), "", f"left: {'why it is ' * 20}", 16, 16)]).table()
