"""The process through which candidates are tried on another machine: what :mod:`graphopt.autotune.runner_process` is for those of here.

It answers the same requests, by the same rules, but runs nothing itself. Inputs, poisoned outputs and their guards are sent to the
other machine as they lie in the arena, and what lies there after a call is fetched back, for the tuner to judge. What is timed runs in
a process of its own there each time, which finds the weights cold, in copies made beforehand, and everything else where it was left.

A process there does several turns before anything is decided here: so the network stands between no two that are compared.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graphopt.autotune.arena import Place, map_memory
from graphopt.autotune.records import Status
from graphopt.autotune.runner_process import MAX_COPIES, supervise
from graphopt.autotune.turns import CANDIDATE, calls_of_a_slice, take_turns
from graphopt.errors import RemoteError

if TYPE_CHECKING:
    from graphopt.backends.tvm.rpc import Session, Slice, Timed

TOGETHER = 64  # pairs that are timed in one process at most
LINE = 64  # bytes; where tensors begin that are timed
AGAIN = 0.5  # seconds for which a candidate is called again that seems to leak
_INT, _TENSOR = 1, 7  # of TVMFFIAny
_ANY = np.dtype([("type", "<i4"), ("padding", "<i4"), ("value", "<i8")])
_DLTENSOR = np.dtype([("data", "<i8"), ("device", "<i4", 2), ("ndim", "<i4"), ("dtype", "u1", 4), ("shape", "<i8"), ("strides", "<i8"),
                      ("byte_offset", "<i8")])  # fmt: skip
_BYTES, _CPU = (1, 8, 1, 0), (1, 0)  # as DLPack has them


class RemoteBench:
    """One server, and the case that is being tried there.

    Args:
        host, port, key: where the server is lent.
        folder: for what is built to be sent there.
        threads: that kernels may use; 0 for all cores.
        patience: seconds to wait until a server is free.
    """

    def __init__(self, host: str, port: int, key: str, folder: str, threads: int, patience: float) -> None:
        self._address, self._folder, self._threads, self._patience = (host, port, key), Path(folder), threads, patience
        self._session: Session | None = None
        self._case: _Case | None = None

    def connect(self) -> dict[str, Any]:
        """Borrow a server, and say what it is."""
        with self._watched() as session:
            return {"target": asdict(session.target), "threads": session.threads, "pool": session.pool}

    def case(self, **request: Any) -> dict[str, Any]:
        """Send a case."""
        from graphopt.backends.tvm.rpc import Refused

        with self._watched() as session:
            if self._case is not None:
                self._case.free()
            self._case = _Case(session, request)
            try:
                self._case.send()
            except Refused:
                self._case.free()
                self._case = None
                raise
            return {"machine": session.target.fingerprint}

    def check(self, which: Sequence[str], seconds: float) -> dict[str, Any]:
        """Call a kernel once on the case, and fetch what it made of it."""
        return self._tried(which, None, lambda case, new, old: case.check(new, seconds))

    def race(self, candidate: Sequence[str], incumbent: Sequence[str] | None, floor: float, slice: float, hopeless: float, leak: int,
             tolerable: float, seconds: float) -> dict[str, Any]:  # fmt: skip
        """Time a kernel in turns with the incumbent, or alone. Nobody knows of waiting threads there: ``tolerable`` is not asked for."""
        return self._tried(candidate, incumbent, lambda case, new, old: case.race(new, old, floor, slice, hopeless, leak, seconds))

    def _tried(self, which: Sequence[str], other: Sequence[str] | None, how: Any) -> dict[str, Any]:
        from graphopt.backends.tvm.rpc import Died

        with self._watched() as session:
            assert self._case is not None, "a case comes first"
            try:
                new, old = (k and session.load(Path(k[0]), k[1]) for k in (which, other))
                return dict(how(self._case, new, old))
            except Died as death:
                return {"failed": str(death), "status": Status.TIMED_OUT if death.timed_out else Status.CRASHED}

    @contextlib.contextmanager
    def _watched(self) -> Iterator[Session]:
        """A session; given up if it breaks."""
        from graphopt.backends.tvm.rpc import Session

        try:
            if self._session is None:
                self._case = None
                self._session = Session(*self._address, self._folder, self._threads, self._patience)
            yield self._session
        except RemoteError:
            self._session = self._case = None
            raise


class _Case:
    """A case on the other machine: the arena's image, and memory to time kernels on."""

    def __init__(self, session: Session, request: dict[str, Any]) -> None:
        self._session, self._request = session, request
        self._readable, self._writable = map_memory(request)
        self._places = [[Place.from_json(p) for p in request[kind]] for kind in ("inputs", "outputs")]
        self._in_place: int | None = request["in_place"]
        self._size, self._end_of_inputs = request["size"], request["writable"]
        self._owned: list[tuple[int, int]] = []
        self._width = sum(map(len, self._places)) + len(request["sizes"])
        self._poison = self._fetched = 0  # addresses of what outputs are filled with, and of what was fetched last
        self._known: torch.Tensor | None = None  # that
        self._timed_rows, self._copies, self._at = 0, 0, 0

    def send(self) -> None:
        """Lay out the image: the inputs end where a page of that machine ends, and from there on it is writable."""
        session = self._session
        start = self._map(self._size + session.page, shared=True)
        before = -self._end_of_inputs % session.page
        self._image = start + before
        session.write(self._image, self._readable[: self._end_of_inputs].numpy())
        session.make_read_only(start, before + self._end_of_inputs)
        inputs, outputs = ([self._image + p.offset for p in places] for places in self._places)
        if self._in_place is not None:
            inputs[self._in_place] = outputs[0]
        self._checked = self._rows(np.array([[*inputs, *outputs]]))

    def free(self) -> None:
        """Give the memory back."""
        for address, size in self._owned:
            self._session.unmap(address, size)

    def _map(self, size: int, shared: bool = False) -> int:
        address = self._session.map(max(size, LINE), shared)
        self._owned.append((address, max(size, LINE)))
        return address

    def _rows(self, addresses: np.ndarray[Any, Any]) -> int:
        """The address of rows of arguments: tensors, behind them the sizes.

        Kernels read of a tensor where it lies, and nothing else.
        """
        count, tensors = addresses.shape
        at = self._map(count * (self._width * _ANY.itemsize + tensors * _DLTENSOR.itemsize))
        described = np.zeros(addresses.shape, _DLTENSOR)
        described["data"], described["device"], described["dtype"] = addresses, _CPU, _BYTES
        rows = np.zeros((count, self._width), _ANY)
        rows["type"][:, :tensors], rows["type"][:, tensors:] = _TENSOR, _INT
        where = at + rows.nbytes + _DLTENSOR.itemsize * np.arange(addresses.size)
        rows["value"][:, :tensors], rows["value"][:, tensors:] = where.reshape(addresses.shape), self._request["sizes"]
        self._session.write(at, rows)
        self._session.write(at + rows.nbytes, described)
        return at

    # --- the call that is judged -------------------------------------------------------------------------------------------

    def check(self, kernel: int, seconds: float) -> dict[str, Any]:
        """One call, on the arena's image."""
        return {"seconds": self._judged_call(kernel, [], seconds)}

    def _judged_call(self, kernel: int, before: Sequence[Slice], seconds: float) -> float:
        """A call on the poisoned outputs, behind other slices; what it left is in the tuner's memory.

        The poison, which is the same each time, is sent once; results that are those of the last call are not fetched again.
        """
        from graphopt.backends.tvm.rpc import Slice

        if self._in_place is not None:
            output, x = self._places[1][0].tensor(self._writable), self._places[0][self._in_place].tensor(self._readable)
            output.copy_(x)
        session, outputs = self._session, self._writable[self._end_of_inputs :]
        there, size = self._image + self._end_of_inputs, len(outputs)
        if not self._poison:
            self._poison, self._fetched = self._map(size), self._map(size)
            session.write(self._poison, outputs.numpy())
        session.c("memcpy", there, self._poison, size)
        last = session.run([*before, Slice(kernel, self._checked, 1, 0, 1)], self._width, seconds)[-1]
        if self._known is None or session.number("memcmp", there, self._fetched, size):
            session.c("memcpy", self._fetched, there, size)
            self._known = torch.from_numpy(session.read(there, size))
        outputs.copy_(self._known)
        return last.seconds

    # --- timing ------------------------------------------------------------------------------------------------------------

    def race(self, new: int, old: int | None, floor: float, slice: float, hopeless: float, leak: int,
             seconds: float) -> dict[str, Any]:  # fmt: skip
        """Times in turns."""
        if not self._timed_rows:
            self._lay_out()
        kernels = [k for k in (new, old) if k is not None]

        def run(turns: Sequence[tuple[int, int]]) -> list[Timed]:
            return self._session.run([self._slice(k, calls) for k, calls in turns], self._width, seconds)

        probed = run([(k, n) for k in kernels for n in (1, 2)])
        calls = calls_of_a_slice([min(a.seconds, b.seconds / 2) for a, b in zip(probed[::2], probed[1::2], strict=True)], slice)
        growth = 0

        def timed(turns: Sequence[int]) -> list[float]:
            nonlocal growth
            warm = [(k, n) for n in (1, 2) for k in kernels]  # the process is new: it has no threads yet, and no memory of its own
            done = run([*warm, *((new if which == CANDIDATE else kernels[-1], calls) for which in turns)])
            growth = max(growth, done[-1].resident - done[len(warm) - 1].resident)
            return [t.seconds / calls for t in done[len(warm) :]]

        times = take_turns(timed, calls, floor, hopeless, alone=old is None, together=TOGETHER, waited=float)
        answer: dict[str, Any] = {"candidate": times[0], "incumbent": times[1], "calls": calls}
        if growth > leak:
            n = max(16, min(len(times[0]) * calls, round(AGAIN / max(min(times[0]), 1e-9))))
            first, second = run([(new, n), (new, n)])
            grown = second.resident - first.resident
            answer["leaked"] = grown / n if grown > leak // 4 else 0.0
        if self._in_place is None:
            self._judged_call(new, [self._slice(new, calls)], seconds)
        return answer

    def _slice(self, kernel: int, calls: int) -> Slice:
        """The next calls, on the weights that were not used for the longest time."""
        from graphopt.backends.tvm.rpc import Slice

        first, self._at = self._at, (self._at + calls) % self._copies
        return Slice(kernel, self._timed_rows, self._copies, first, calls)

    def _lay_out(self) -> None:
        """Memory that is no longer shared: weights in copies, the rest once; an operand that is updated in place is its output."""
        weights: list[int] = self._request["weights"]
        places = [p for kind in self._places for p in kind]
        lengths = [-(-max(p.length, 1) // LINE) * LINE for p in places]
        size = sum(places[i].length for i in weights)
        self._copies = min(MAX_COPIES, max(1, -(-self._request["between"] // size))) if size else 1
        counts = [self._copies if i in weights else 1 for i in range(len(places))]
        at = self._map(sum(n * count for n, count in zip(lengths, counts, strict=True)))
        addresses = np.zeros((self._copies, len(places)), np.int64)
        for i, (place, length, count) in enumerate(zip(places, lengths, counts, strict=True)):
            addresses[:, i] = at + length * np.arange(self._copies) if count > 1 else at
            if i < len(self._places[0]):
                self._session.c("memcpy", at, self._image + place.offset, place.length)
                self._session.repeat(at, length, count)
            at += length * count
        if self._in_place is not None:
            addresses[:, len(self._places[0])] = addresses[:, self._in_place]
        self._timed_rows = self._rows(addresses)


def main(arguments: str) -> None:
    """Be the supervisor. ``arguments``: those of :class:`RemoteBench`, as JSON."""

    def get_ready() -> RemoteBench:
        from graphopt.backends.tvm import rpc  # noqa: F401 - before processes are forked, once

        return RemoteBench(**json.loads(arguments))

    supervise(get_ready)
