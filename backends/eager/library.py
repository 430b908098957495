"""One library call: a node run by PyTorch's own kernels, its arguments prepared as far as they can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch

from graphopt.ir.graph import Node
from graphopt.ir.interpreter import evaluate_node, fill_template, flatten_results, made_at, resolve_aten
from graphopt.ir.ops import EvalContext, Ref


def _only_constants(template: object) -> bool:
    """Whether an argument template needs neither operands nor sizes."""
    if isinstance(template, tuple):
        return all(map(_only_constants, template))
    return not isinstance(template, Ref | sympy.Expr)


class LibraryCall:
    """Runs one node (a fusion node runs its body, node by node).

    Args:
        node: any node of the IR.
        device: where tensors without operands are made.
    """

    def __init__(self, node: Node, device: torch.device | str = "cpu") -> None:
        self._node = node
        self._device = device
        self._static = EvalContext({}, device=device)
        self._call = None
        self._dtypes = [r.dtype.torch for r in node.results]
        simple = node.op.name == "aten" and not any(node.attrs["layouts"])
        if simple:
            self._target = resolve_aten(node.attrs["target"])
            args, kwargs = node.attrs["args"], node.attrs["kwargs"]
            # positions that are operands, and everything else filled in once
            if all(isinstance(a, Ref) or _only_constants(a) for a in args) and all(_only_constants(v) for _, v in kwargs):
                self._slots = [(i, a.index) for i, a in enumerate(args) if isinstance(a, Ref)]
                self._args = [None if isinstance(a, Ref) else fill_template(a, (), self._static) for a in args]
                self._kwargs = {k: fill_template(v, (), self._static) for k, v in kwargs} | made_at(node, self._target, device)
                self._call = self._target

    def __call__(self, operands: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> list[torch.Tensor]:
        """Results for operands; ``sizes`` binds the symbols."""
        if self._call is not None:
            args = list(self._args)
            for position, operand in self._slots:
                args[position] = operands[operand].contiguous()  # what operators may rely on; see the op `aten`
            return self._as_declared(flatten_results(self._call(*args, **self._kwargs)))
        context = EvalContext(sizes, device=self._device) if sizes else self._static
        return self._as_declared(evaluate_node(self._node, operands, context))

    def _as_declared(self, results: list[torch.Tensor]) -> list[torch.Tensor]:
        """Some operators return another dtype than they are traced with (batch norm's half precision statistics)."""
        return [y if y.dtype == t else y.to(t) for y, t in zip(results, self._dtypes, strict=True)]
