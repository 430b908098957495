"""How much memory eager's intermediate results take at most: the liveness of the captured graph, in the user's order."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def eager_peak(gm: torch.fx.GraphModule) -> int | None:
    """Bytes of intermediate results and outputs that are alive at once, at most; None where sizes are symbolic.

    A result lives from its operator to its last reader, views keep what they look into. Not counted: the inputs and weights,
    and the scratch memory that library kernels take. In-place operations count as if they made a new tensor, as the captured
    graph has none; locals that outlive their last use in the user's code are not seen.
    """
    sizes: dict[int, int] = {}  # storage -> bytes
    ends: dict[int, int] = {}
    starts: dict[int, int] = {}
    given: dict[int, None] = {}
    nodes = list(gm.graph.nodes)
    for i, node in enumerate(nodes):
        for x in _tensors(node):
            nbytes = x.untyped_storage().nbytes()
            if not isinstance(nbytes, int):
                return None
            key = x.untyped_storage()._cdata
            if node.op in ("placeholder", "get_attr"):
                given[key] = None
            elif key not in given:
                starts.setdefault(key, i)
                sizes[key] = nbytes
            ends[key] = i
        for source in node.all_input_nodes:
            for x in _tensors(source):
                ends[x.untyped_storage()._cdata] = i
    change = [0] * (len(nodes) + 1)
    for key, start in starts.items():
        change[start] += sizes[key]
        change[ends[key] + 1] -= sizes[key]
    alive = most = 0
    for delta in change:
        alive += delta
        most = max(most, alive)
    return most


def _tensors(node: torch.fx.Node) -> list[Any]:
    if node.op == "output":
        return []
    return [x for x in tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor) and x.layout is torch.strided]
