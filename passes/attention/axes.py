"""Axes by what they count: how a value's elements lie in the space of scores, whatever views are in between.

An :class:`Atom` is one axis of that space (a batch, a head, a row, a key ...). A value's axes are groups of atoms, outer ones first:
scores ``[8, 12, 12]`` that were reshaped from ``[2, 4, 12, 12]`` have the groups ``(b h), (m), (n)``. Walking up from a value to
what it was made of, a transpose exchanges groups, a reshape regroups (and splits an atom where it must), a broadcast drops the
atoms that its operand does not depend on. So keys that are shared by heads are seen by the atom that they lack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from graphopt.ir import Value, dims
from graphopt.ir.dims import Dim, Shape
from graphopt.rewrite import Rewriter

VIEWS = ("reshape", "transpose", "broadcast_to")


class Atom:
    """One axis of the space; ``inner`` are the two that it was split into, or none."""

    __slots__ = ("inner", "size")

    def __init__(self, size: Dim) -> None:
        self.size = size
        self.inner: tuple[Atom, ...] = ()

    def split(self, outer: Dim, rest: Dim) -> tuple[Atom, Atom]:
        self.inner = (Atom(outer), Atom(rest))
        return self.inner


Group = tuple[Atom, ...]
Axes = tuple[Group, ...]


def flat(group: Group) -> Group:
    """The atoms of a group as they are split by now."""
    return tuple(b for a in group for b in (flat(a.inner) if a.inner else (a,)))


def flat_axes(axes: Axes) -> Group:
    return tuple(a for group in axes for a in flat(group))


def same(a: Group, b: Group) -> bool:
    return flat(a) == flat(b)


def within(part: Group, whole: Group) -> bool:
    """Whether all atoms of the one are among those of the other."""
    having = flat(whole)
    return all(a in having for a in flat(part))


def apart(a: Group, b: Group) -> bool:
    """Whether two groups have no atom in common."""
    having = flat(b)
    return not any(x in having for x in flat(a))


def fresh(shape: Shape) -> Axes:
    """A new atom for each axis; none for one of size 1."""
    return tuple(() if d == 1 else (Atom(d),) for d in shape)


def size(group: Group) -> Dim:
    return dims.numel([a.size for a in flat(group)])


def _quotient(a: Dim, b: Dim) -> Dim | None:
    """a / b if that is known to be whole and more than nothing."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    ratio = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    return dims.simplify(ratio) if sympy.fraction(ratio)[1] == 1 else None


def regroup(atoms: Sequence[Atom], shape: Shape) -> Axes | None:
    """Groups of the atoms, in their order, of these sizes; atoms are split where a border goes through them. None if it cannot be."""
    queue, out = list(atoms), []
    for d in shape:
        group: list[Atom] = []
        left = d
        while left != 1:
            if not queue:
                return None
            atom = queue.pop(0)
            if dims.same(atom.size, left):
                group.append(atom)
                left = 1
            elif (more := _quotient(left, atom.size)) is not None:
                group.append(atom)
                left = more
            elif (rest := _quotient(atom.size, left)) is not None:
                outer, inner = atom.split(left, rest)
                group.append(outer)
                queue.insert(0, inner)
                left = 1
            else:
                return None
        out.append(tuple(group))
    return None if queue else tuple(out)


def aligned(shape: Shape, axes: Axes) -> Axes:
    """The axes of an operand of that shape, which is broadcast (NumPy) to a value with these axes."""
    trailing = axes[len(axes) - len(shape) :] if shape else ()
    return tuple(() if d == 1 else group for d, group in zip(shape, trailing, strict=True))


def up(v: Value, axes: Axes) -> tuple[Value, Axes] | None:
    """One step from the result of a view to its operand; None if it is no view, or one that cannot be told by atoms."""
    node = v.defined_by(*VIEWS)
    if node is None:
        return None
    x = node.operands[0]
    if node.name == "broadcast_to":
        return x, aligned(x.shape, axes)
    if node.name == "transpose":
        out: list[Group] = [()] * len(axes)
        for i, p in enumerate(node.attrs["perm"]):
            out[p] = axes[i]
        return x, tuple(out)
    found = regroup(flat_axes(axes), x.shape)
    return None if found is None else (x, found)


def top(v: Value, axes: Axes) -> tuple[Value, Axes]:
    """Up through all views."""
    while (step := up(v, axes)) is not None:
        v, axes = step
    return v, axes


@dataclass(frozen=True)
class Placed:
    """A value and its axes."""

    value: Value
    axes: Axes

    @property
    def atoms(self) -> Group:
        return flat_axes(self.axes)

    def above(self) -> Placed:
        """The same below no views."""
        return Placed(*top(self.value, self.axes))


def arrange(rw: Rewriter, x: Placed, target: Axes) -> Value:
    """A value with the target's groups as its axes: split, transposed, and joined. A group of which it has no atom has size 1; one of
    which it has some is broadcast."""
    atoms = x.atoms
    has = [tuple(a for a in flat(group) if a in atoms) for group in target]
    whole = all(len(h) in (0, len(flat(g))) for h, g in zip(has, target, strict=True))
    if whole and all(_together(h, atoms) for h in has):  # one reshape and one transpose
        order = sorted((i for i, h in enumerate(has) if h), key=lambda i: atoms.index(has[i][0]))
        for i, h in enumerate(has):
            if not h:
                order.insert(i, i)
        value = rw.reshape(x.value, shape=tuple(size(has[i]) for i in order))
        return rw.transpose(value, perm=tuple(order.index(i) for i in range(len(has))))
    value = rw.reshape(x.value, shape=tuple(a.size for a in atoms))
    value = rw.transpose(value, perm=tuple(atoms.index(a) for h in has for a in h))
    shape: list[Dim] = []
    wide: list[Dim] = []
    for h, group in zip(has, target, strict=True):
        shape += [a.size if a in h else 1 for a in flat(group)] if h else []
        wide += [a.size for a in flat(group)] if h else []
    if shape != wide:
        value = rw.broadcast_to(rw.reshape(value, shape=tuple(shape)), shape=tuple(wide))
    return rw.reshape(value, shape=tuple(size(g) if h else 1 for h, g in zip(has, target, strict=True)))


def _together(part: Group, atoms: Group) -> bool:
    """Whether the atoms of a part stand side by side, in order."""
    start = atoms.index(part[0]) if part else 0
    return atoms[start : start + len(part)] == part
