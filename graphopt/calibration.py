"""Calibration: what the inputs of linear layers are like on sample data, one layer at a time in memory.

An :class:`Observer` keeps a histogram of magnitudes, from which each method finds the largest one worth representing::

    minmax       the largest that was seen
    percentile   99.99% of all are below it
    mse          the squared error of what is rounded and of what is clipped is least
    entropy      the distribution of the rounded values tells most of the true one (least Kullback-Leibler divergence), among the ranges
                 whose squared error is no greater than that of all: a divergence makes nothing of how large what it clips is

Reference: Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation", arXiv:2004.09602;
entropy as in Migacz, "8-bit Inference with TensorRT", GTC 2017.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from graphopt.errors import GraphoptError, UsageError, first_line, nearest
from graphopt.passes.quantization.quantize_weights import TINY

OBSERVERS = ("minmax", "percentile", "mse", "entropy")
BINS = 2048
LEVELS = 127  # magnitudes of 8 bits
PERCENTILE = 0.9999

Sample = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a call of the model."""
Look = Callable[[str, torch.Tensor], None]
"""Told (a module's name, its input as rows ``[R, K]``)."""


def samples_of(calibration: Iterable[Any] | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Sample]:
    """The calls to calibrate on: each item is a tensor, a tuple of arguments, or a dict of keyword arguments.

    Args:
        calibration: None for the example inputs alone.

    Raises:
        UsageError: there is nothing to calibrate on, or tensors without elements alone; or one call is given in the place of several.
    """
    if isinstance(calibration, torch.Tensor | Mapping | str):
        raise UsageError(f"calibration is one {type(calibration).__name__}, not several calls of the model: give calibration=[inputs, ...]")
    if calibration is None:
        found: list[Sample] = [(tuple(args), dict(kwargs))] if args or kwargs else []
    else:
        found = [_sample(item) for item in calibration]
    tensors = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
    if not found or (tensors and not any(x.numel() for x in tensors)):
        raise UsageError("there is nothing to calibrate on: give example inputs, or calibration=[inputs, ...]")
    return found


def _sample(item: Any) -> Sample:
    if isinstance(item, Mapping):
        return (), dict(item)
    return (tuple(item), {}) if isinstance(item, list | tuple) else ((item,), {})


def try_out(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """Call the model with the example inputs, if there are any, and the first sample: what does not fit is said before all long work.

    Raises:
        UsageError: the model raised.
    """
    with torch.no_grad(), inferring(model):
        if args or kwargs:
            tried(model, (tuple(args), dict(kwargs)), "the example inputs")
        for sample in samples[:1]:
            tried(model, sample, "calibration batch 0")


def tried(model: nn.Module, sample: Sample, said: str) -> Any:
    """What a call of the model gives.

    Raises:
        UsageError: the model raised. Says of what (``said``) and in which module; of arguments that are too many or too few, how they
            are given.
    """
    args, kwargs = sample
    try:
        return model(*args, **kwargs)
    except (GraphoptError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(f"{said}: {_misfit(model, sample) or _raised(model, error)}") from error


def _misfit(model: nn.Module, sample: Sample) -> str:
    """Why a model's ``forward`` does not take as many arguments, or such names; empty if it does."""
    args, kwargs = sample
    try:
        signature = inspect.signature(model.forward)
    except ValueError:  # of a module that is no Python
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([*(type(x).__name__ for x in args), *(f"{name}=..." for name in kwargs)])
        return (f"{type(model).__name__} takes ({', '.join(signature.parameters)}), and is given ({given}): {error}. A tuple or list is "
                "taken as arguments, a dict as keyword arguments: of batches (x, y), give x alone, [x for x, y in batches]")  # fmt: skip
    return ""


def _raised(model: nn.Module, error: Exception) -> str:
    """An exception in a line, with the innermost module that it came through."""
    names, where = {id(m): name for name, m in model.named_modules()}, ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        inner = frame.f_locals.get("self")
        if names.get(id(inner)):
            where = f", in {names[id(inner)]} ({type(inner).__name__})"
    return f"the model raised {type(error).__name__}: {first_line(error)}{where}"


def watch(model: nn.Module, names: Iterable[str], samples: Iterable[Sample], look: Look) -> None:
    """Run the model on samples, and show the inputs of some of its modules."""
    modules = dict(model.named_modules())

    def hook(name: str) -> Callable[..., None]:
        def seen(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], __: torch.Tensor) -> None:
            x = only_input(args, kwargs).detach().to(torch.float32)
            if not bool(torch.isfinite(x).all()):
                raise UsageError(f"calibration met infinite elements, or such that are no numbers, in the input of {name}")
            look(name, x.reshape(-1, x.shape[-1]))

        return seen

    # behind the module, which itself says best what it does not take
    handles = [modules[name].register_forward_hook(hook(name), with_kwargs=True) for name in names]
    run_hooked(model, samples, handles, "calibration batch")


def run_hooked(model: nn.Module, samples: Iterable[Sample], handles: Sequence[RemovableHandle], said: str = "") -> None:
    """Run the model on samples, without gradients and in evaluation mode, for the sake of hooks, which are removed afterwards.

    Args:
        said: what samples are to users, who are told which of them the model does not take; empty where it takes all.
    """
    try:
        with torch.no_grad(), inferring(model):
            for i, (args, kwargs) in enumerate(samples):
                if said:
                    tried(model, (args, kwargs), f"{said} {i}")
                else:
                    model(*args, **kwargs)
    finally:
        for h in handles:
            h.remove()


def only_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The input of a layer that has one, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def inferring(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards as it was: dropout is no part of what a layer sees."""
    were = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for m in were:
            m.training = True


class Observer:
    """A histogram of magnitudes, of ``BINS`` bins whose width doubles when something larger comes."""

    def __init__(self) -> None:
        self.counts, self.width, self.largest = torch.zeros(BINS, dtype=torch.float64), 0.0, 0.0

    def see(self, x: torch.Tensor) -> None:
        """Count elements. Raises UsageError if some are no finite numbers."""
        x = x.detach().abs().flatten().to(torch.float32)
        most = float(x.max()) if x.numel() else 0.0
        if not bool(torch.isfinite(x).all()):
            raise UsageError("calibration met infinite elements, or such that are no numbers")
        self.largest = max(self.largest, most)
        if most > 0.0 and self.width == 0.0:
            self.width = most / BINS
        while most > self.width * BINS:
            self.counts = torch.cat([self.counts.reshape(-1, 2).sum(1), self.counts.new_zeros(BINS // 2)])
            self.width *= 2
        if self.width > 0.0:
            self.counts += torch.histc(x, BINS, 0.0, self.width * BINS).double()

    def range(self, method: str) -> float:
        """The largest magnitude worth representing.

        Raises:
            UsageError: there is no such method.
        """
        if method not in OBSERVERS:
            raise UsageError(f"there is no observer {method!r}{nearest(method, OBSERVERS)}; observers are {', '.join(OBSERVERS)}")
        if method == "minmax" or self.width == 0.0:
            return self.largest
        if method == "percentile":
            below = self.counts.cumsum(0) / self.counts.sum()
            return min(self.largest, self.width * (1 + int((below < PERCENTILE).sum())))
        whole = min(math.ceil(self.largest / self.width), BINS)
        errors = {end: self._squared_error(end) for end in (*range(LEVELS + 1, BINS + 1, 8), whole)}
        if method == "mse":
            best = min(errors, key=lambda end: errors[end])
        else:
            best = min([end for end, error in errors.items() if error <= errors[whole]], key=self._divergence)
        return min(self.largest, best * self.width)

    def step(self, method: str, most: float = LEVELS) -> float:
        """The scale for that range, whose end becomes ``most``."""
        return max(self.range(method) / most, TINY)

    def _squared_error(self, end: int) -> float:
        """Of magnitudes rounded to ``LEVELS`` steps up to a bin, and clipped beyond it."""
        middles = (torch.arange(BINS, dtype=torch.float64) + 0.5) * self.width
        step = end * self.width / LEVELS
        wrong = middles - (middles / step).round().clamp_max(LEVELS) * step
        return float((self.counts * (wrong**2 + 0.0)).sum())

    def _divergence(self, end: int) -> float:
        """KL(p || q): p is the distribution up to a bin, with what lies beyond in its last bin; q has one density a level.

        The first bin is left out of both: what is zero stays zero in any range, and of inputs behind a ReLU or a dropout would be most.
        """
        kept = self.counts[:end].clone()
        kept[0] = 0.0
        p = kept.clone()
        p[-1] += self.counts[end:].sum()
        level = (torch.arange(end) * (LEVELS + 1)) // end
        filled = (p > 0).double()
        sums = torch.zeros(LEVELS + 1, dtype=torch.float64).index_add_(0, level, kept)
        bins = torch.zeros(LEVELS + 1, dtype=torch.float64).index_add_(0, level, filled)
        q = (sums / bins.clamp_min(1))[level] * filled
        if float(q.sum()) == 0.0:
            return float("inf")
        p, q = p / p.sum(), q / q.sum()
        q = q.clamp_min(1e-12)
        return float((p * ((p.clamp_min(1e-300)) / q).log()).sum())
