"""slice(concat(x, y))  =>  x: rules for ops that cut tensors up and put them together; part of the pass `views`

Why: a full read and write of the pieces less.
When: the bounds are proven; with a symbolic size that is not known, the node stays.
Numerics: bitwise.
Reference: MLIR, the tensor dialect's canonical forms of extract_slice, insert_slice and concat.
"""

from __future__ import annotations

from graphopt.ir import Value, dims
from graphopt.passes.shared import NOT_THIS
from graphopt.rewrite import Match, Numerics, Reject, Rewriter, Rule, op_in, pat, value

x = value("x")


class SliceAll(Rule):
    """slice(x, 0 : size) => x"""

    pattern = pat.slice(x, start=0, step=1)
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        size = m[x].shape[m.root.attrs["axis"]]
        return None if dims.same(m.root.attrs["stop"], size, m.root.graph.symbols) else NOT_THIS

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return m[x]  # type: ignore[no-any-return]


class SliceOfSlice(Rule):
    """slice(slice(x, a : b), c : d) => slice(x, a + c : a + d)"""

    pattern = pat.slice(pat.slice(x))
    numerics = Numerics.BITWISE

    def check(self, m: Match) -> Reject | None:
        outer, inner, rank = m.root.attrs, m.nodes[1].attrs, m[x].type.rank
        if outer["axis"] % rank != inner["axis"] % rank:
            return NOT_THIS
        if inner["step"] > 1 and dims.prove(outer["start"], "<", outer["stop"], m.root.graph.symbols) is not True:
            return Reject("the outer slice may be empty, and the inner one has a step", m.root)
        return None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        outer, inner = m.root.attrs, m.nodes[1].attrs
        step = inner["step"]
        start = dims.add(inner["start"], dims.mul(outer["start"], step))
        if step == 1:
            stop = dims.add(inner["start"], outer["stop"])
        else:  # one past the last element taken
            stop = dims.add(dims.add(inner["start"], dims.mul(dims.sub(outer["stop"], 1), step)), 1)
        attrs = {"axis": outer["axis"], "start": start, "stop": stop, "step": step * outer["step"]}
        return rw.create("slice", [m[x]], attrs)  # type: ignore[no-any-return]


class SliceOfConcat(Rule):
    """slice(concat(x, y)) => slice(x), where it lies within x"""

    pattern = pat.slice(op_in(("concat",)).named("joined"))
    numerics = Numerics.BITWISE

    @staticmethod
    def piece(m: Match) -> tuple[Value, dims.Dim] | None:
        """The operand that the slice lies within, and where it starts in the concatenation."""
        joined, attrs, symbols = m["joined"].producer, m.root.attrs, m.root.graph.symbols
        rank = m["joined"].type.rank
        axis = attrs["axis"] % rank
        if joined.attrs["axis"] % rank != axis:
            return None
        offset: dims.Dim = 0
        for v in joined.operands:
            end = dims.add(offset, v.shape[axis])
            if dims.prove(offset, "<=", attrs["start"], symbols) is True and dims.prove(attrs["stop"], "<=", end, symbols) is True:
                return v, offset
            offset = end
        return None

    def check(self, m: Match) -> Reject | None:
        rank = m["joined"].type.rank
        if m["joined"].producer.attrs["axis"] % rank != m.root.attrs["axis"] % rank:
            return NOT_THIS
        return None if self.piece(m) else Reject("the slice is not known to lie within one operand of the concat", m["joined"])

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        found = self.piece(m)
        assert found is not None
        v, offset = found
        attrs = {**m.root.attrs, "start": dims.sub(m.root.attrs["start"], offset), "stop": dims.sub(m.root.attrs["stop"], offset)}
        return rw.create("slice", [v], attrs)  # type: ignore[no-any-return]


class ConcatOne(Rule):
    """concat(x) => x; operands of size 0 are left out"""

    pattern = op_in(("concat",))
    numerics = Numerics.BITWISE

    @staticmethod
    def full(m: Match) -> list[Value]:
        axis = m.root.attrs["axis"]
        return [v for v in m.root.operands if v.shape[axis] != 0] or list(m.root.operands[:1])

    def check(self, m: Match) -> Reject | None:
        return NOT_THIS if 1 < len(self.full(m)) == len(m.root.operands) else None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        full = self.full(m)
        return full[0] if len(full) == 1 else rw.create("concat", full, dict(m.root.attrs))  # type: ignore[no-any-return]


class ConcatOfConcat(Rule):
    """concat(concat(x, y), z) => concat(x, y, z)"""

    pattern = op_in(("concat",))
    numerics = Numerics.BITWISE

    @staticmethod
    def flat(m: Match) -> list[Value]:
        rank = m.root.results[0].type.rank
        out: list[Value] = []
        for v in m.root.operands:
            inner = v.defined_by("concat") if v.has_one_use else None
            same = inner is not None and (inner.attrs["axis"] - m.root.attrs["axis"]) % rank == 0
            out += inner.operands if inner is not None and same else [v]
        return out

    def check(self, m: Match) -> Reject | None:
        return NOT_THIS if len(self.flat(m)) == len(m.root.operands) and tuple(self.flat(m)) == m.root.operands else None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        return rw.create("concat", self.flat(m), dict(m.root.attrs))  # type: ignore[no-any-return]


class JoinSlices(Rule):
    """concat(slice(x, a : b), slice(x, b : c)) => slice(x, a : c)"""

    pattern = op_in(("concat",))
    numerics = Numerics.BITWISE

    @staticmethod
    def runs(m: Match) -> list[list[Value]]:
        """The operands, grouped where each continues the slice before it."""
        axis, rank, symbols = m.root.attrs["axis"], m.root.results[0].type.rank, m.root.graph.symbols
        out: list[list[Value]] = []
        for v in m.root.operands:
            last, here = out[-1][-1].defined_by("slice") if out else None, v.defined_by("slice")
            joins = (
                last is not None and here is not None and last.operands[0] is here.operands[0]
                and (last.attrs["axis"] - axis) % rank == (here.attrs["axis"] - axis) % rank == 0
                and last.attrs["step"] == here.attrs["step"] == 1 and dims.same(last.attrs["stop"], here.attrs["start"], symbols)
            )  # fmt: skip
            if joins:
                out[-1].append(v)
            else:
                out.append([v])
        return out

    def check(self, m: Match) -> Reject | None:
        return NOT_THIS if len(self.runs(m)) == len(m.root.operands) else None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        joined = [self.join(run, rw) for run in self.runs(m)]
        return joined[0] if len(joined) == 1 else rw.create("concat", joined, dict(m.root.attrs))  # type: ignore[no-any-return]

    @staticmethod
    def join(run: list[Value], rw: Rewriter) -> Value:
        first, last = run[0].producer, run[-1].producer
        if len(run) == 1 or first is None or last is None:
            return run[0]
        return rw.create("slice", first.operands, {**first.attrs, "stop": last.attrs["stop"]})  # type: ignore[no-any-return]


class TakeRange(Rule):
    """take(x, iota(n)) => slice(x, 0 : n)"""

    pattern = pat.take(x, op_in(("iota",)).named("index"))
    numerics = Numerics.BITWISE

    @staticmethod
    def bounds(m: Match) -> tuple[dims.Dim, dims.Dim, int]:
        """start, stop and step of the slice."""
        iota = m["index"].producer.attrs
        last = dims.add(iota["start"], dims.mul(dims.sub(iota["size"], 1), iota["step"]))
        return iota["start"], dims.add(last, 1), iota["step"]

    def check(self, m: Match) -> Reject | None:
        (start, stop, step), symbols = self.bounds(m), m.root.graph.symbols
        if not isinstance(step, int) or step < 1 or dims.prove(start, ">=", 0, symbols) is not True:
            return Reject("the indices do not rise from a start that is not negative", m["index"])
        size = m[x].shape[m.root.attrs["axis"]]
        if dims.prove(stop, "<=", size, symbols) is not True or dims.prove(start, "<", stop, symbols) is not True:
            return Reject("the indices are not known to be within the axis", m["index"])
        return None

    def rewrite(self, m: Match, rw: Rewriter) -> Value:
        start, stop, step = self.bounds(m)
        return rw.slice(m[x], axis=m.root.attrs["axis"], start=start, stop=stop, step=step)  # type: ignore[no-any-return]
