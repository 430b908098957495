"""Real models, end to end: right against f64, without fallback where a kernel exists, at changing sizes, from several threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt

pytest.importorskip("transformers")
pytest.importorskip("tvm_ffi")
from graphopt.bench import models

SMALL: dict[str, Callable[[], models.Model]] = {
    "bert": lambda: models.bert(layers=2, tokens=24),
    "gpt2": lambda: models.gpt2(layers=2, tokens=24),
    "llama": lambda: models.llama(layers=2, tokens=24),
    "decode": lambda: models.decode(layers=2, before=24),
    "t5": lambda: models.t5(layers=2, tokens=24),
    "vit": lambda: models.vit(layers=2, size=64),
    "resnet50": lambda: models.resnet50(size=64),
    "mobilenet": lambda: models.mobilenet(size=64),
    "convnext": lambda: models.convnext(size=64),
}
WITHOUT_FALLBACK = ("bert", "gpt2", "llama", "decode")


pytestmark = pytest.mark.usefixtures("fresh")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def check_against_f64(model: nn.Module, compiled: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> None:
    """The error of each result may be at most twice eager's own."""
    wide = copy.deepcopy(model).double()
    reference = wide(*[x.double() if x.is_floating_point() else x for x in inputs])
    results = reference, compiled(*inputs), model(*inputs)
    for wanted, got, eager in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
        assert relative(got, wanted) <= 2 * relative(eager, wanted)


@pytest.mark.parametrize("name", SMALL)
def test_model(name: str) -> None:
    model, inputs = SMALL[name]()
    compiled = torch.compile(model, backend="graphopt", options={"strict": name in WITHOUT_FALLBACK})
    check_against_f64(model, compiled, inputs)
    (report,) = graphopt.reports()
    assert report.kernels
    assert all(f.reason for f in report.fallbacks)
    assert report.memory["planned"] < report.memory["unplanned"]  # type: ignore[operator]


def test_a_model_for_an_older_processor() -> None:
    model, inputs = SMALL["bert"]()
    compiled = torch.compile(model, backend="graphopt", options={"strict": True, "target": "cpu:x86-64-v3"})
    check_against_f64(model, compiled, inputs)
    assert "x86-64-v3" in graphopt.reports()[-1].target
    with pytest.raises(Exception, match="cannot run here"):
        graphopt.compile(model, inputs, target="cpu:neoverse-n1")


@pytest.mark.parametrize("target", ["cpu", "cpu:znver4", "cpu:x86-64-v4"])
def test_a_model_of_bf16(target: str) -> None:
    """By tiles or dot instructions where there are any, else in f32. Each op rounds, so errors are eager's."""
    from graphopt.target import Target, detect

    if why := detect().lacks(Target.from_name(target)):
        pytest.skip(why)
    model, inputs = SMALL["llama"]()
    model = model.bfloat16()
    compiled = torch.compile(model, backend="graphopt", options={"target": target})
    check_against_f64(model, compiled, inputs)
    schedules = [k.schedule for k in graphopt.reports()[-1].kernels if k.kind == "matmul"]
    engine = Target.from_name(target).bf16_products
    assert any({"amx": '"bf16"', "dot": '"pairs"'}.get(engine, "nothing") in s for s in schedules) == bool(engine)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_sizes_change_without_compiling_again(name: str) -> None:
    factory = {"bert": models.bert, "llama": models.llama}[name]
    model, _ = factory(layers=1, tokens=8)
    compiled = torch.compile(model, backend="graphopt", dynamic=True)
    for tokens in (8, 13, 40):
        check_against_f64(model, compiled, (torch.randint(0, 30000, (1, tokens)),))
    assert len(graphopt.reports()) == 1


def test_export_path() -> None:
    model, inputs = SMALL["llama"]()
    compiled = graphopt.compile(model, inputs, strict=True)
    check_against_f64(model, compiled, inputs)


def test_threads_get_the_same_bits() -> None:
    model, inputs = SMALL["bert"]()
    compiled = graphopt.compile(model, inputs)
    expected = compiled(*inputs)
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(compiled(*inputs), expected):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_second_process_builds_nothing(tmp_path: Path) -> None:
    model, inputs = SMALL["bert"]()
    for expected in ("built", "hit"):
        torch._dynamo.reset()
        torch.compile(model, backend="graphopt", options={"cache_dir": tmp_path})(*inputs)
        assert all(k.cache.startswith(expected) for k in graphopt.reports()[-1].kernels)


def test_index_out_of_range_raises() -> None:
    embedding = nn.Embedding(10, 8)
    compiled = torch.compile(embedding, backend="graphopt", dynamic=False)
    compiled(torch.tensor([1, 9]))
    for bad in ([1, 10], [-1, 2]):
        with pytest.raises(IndexError):
            compiled(torch.tensor(bad))
