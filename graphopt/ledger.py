"""The ledger of a quantization: for each weight what became of it, what it cost in accuracy, which kernel ran, and whether it is faster."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Column, Table


@dataclass
class Entry:
    """One weight.

    Attributes:
        name: of its module; of a weight that is not called so, with its name behind that (``attention.in_proj_weight``).
        shape: outputs by inputs, which of a convolution are channels and taps; of what is no such layer, as it is stored.
        scheme: as users write it; empty where it was left in float.
        verdict: ``quantized``; ``reverted: ...`` or ``left: ...`` with the reason.
        float_bytes, bytes: of the weight, before and after.
        weight_error: norm of the weight's change over the norm of the weight.
        output_error: the same of the module's output on the example inputs, given the float model's input; None if it did not run.
        kernel: the template and family of the kernel that multiplies by it, None where nothing was measured.
        seconds, float_seconds: of that kernel's call, and of the float model's kernel. Where one kernel multiplies by several
            weights, those of all of them: ``together`` names them.
        bytes_read: at least, by the call.
        remark: what calibration did not tell of its inputs; empty if nothing.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    verdict: str
    float_bytes: int
    bytes: int
    weight_error: float | None = None
    output_error: float | None = None
    kernel: str | None = None
    seconds: float | None = None
    float_seconds: float | None = None
    bytes_read: int | None = None
    together: tuple[str, ...] = ()
    remark: str = ""

    @property
    def quantized(self) -> bool:
        return self.verdict == "quantized"

    @property
    def speedup(self) -> float | None:
        """Float time over quantized time."""
        return self.float_seconds / self.seconds if self.seconds and self.float_seconds else None


@dataclass
class Ledger:
    """What a quantization did.

    Attributes:
        scheme: as asked for; of schemes by layer, how many layers each was given to.
        entries: a weight each, in the model's order.
        seconds, float_seconds: of a whole run on the example inputs, in the end and before; None if nothing was measured.
        output_error: of the model's first output, against that of the model that was given.
        notes: what else people should know, a sentence each.
    """

    scheme: str
    entries: list[Entry] = field(default_factory=list)
    seconds: float | None = None
    float_seconds: float | None = None
    output_error: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def bytes_saved(self) -> int:
        return sum(e.float_bytes - e.bytes for e in self.entries)

    def to_json(self) -> dict[str, Any]:
        """For programs: times in seconds, sizes in bytes, errors relative."""
        return {**asdict(self), "bytes_saved": self.bytes_saved}

    def summary(self) -> str:
        """One line for each thing that matters of the whole."""
        done = sum(e.quantized for e in self.entries)
        reverted = sum(e.verdict.startswith("reverted") for e in self.entries)
        was, now = sum(e.float_bytes for e in self.entries), sum(e.bytes for e in self.entries)
        what = f"{done} of {len(self.entries)} weights quantized, {reverted} reverted as slower"
        lines = [f"{self.scheme}: {what}; {_size(was)} became {_size(now)}"]
        if self.output_error is not None:
            lines.append(f"the model's output moved by {self.output_error:.3g} of its norm")
        if not done:
            lines.append("nothing was quantized: the model is as it was")
        elif self.seconds and self.float_seconds:
            ratio = self.float_seconds / self.seconds
            verdict = f"{ratio:.2f} times as fast" if ratio >= 1 else f"slower: {ratio:.2f} times as fast"
            lines.append(f"a run {self.float_seconds * 1e3:.3f} ms in float, {self.seconds * 1e3:.3f} ms quantized: {verdict}")
        return "\n".join([*lines, *self.notes])

    def table(self, width: int = 160) -> str:
        """Text for people, a line a weight; below it, the summary."""
        measures = ("weight error", "output error", "MB", "kernel", "us", "float us", "speedup", "GB/s")
        table = Table(Column("weight", no_wrap=True), "shape", "scheme", *measures, "verdict")
        for e in self.entries:
            rate = f"{e.bytes_read / e.seconds / 1e9:.1f}" if e.seconds and e.bytes_read else ""
            table.add_row(
                e.name, "x".join(map(str, e.shape)), e.scheme, _error(e.weight_error), _error(e.output_error),
                f"{e.bytes / 1e6:.2f}", e.kernel or "", _us(e.seconds), _us(e.float_seconds), f"{e.speedup:.2f}" if e.speedup else "", rate,
                e.verdict + (f" (one kernel with {len(e.together) - 1} more)" if len(e.together) > 1 else "")
                + (f"; {e.remark}" if e.remark else ""),
            )  # fmt: skip
        console = Console(file=StringIO(), width=width, highlight=False, color_system=None)
        console.print(table)
        assert isinstance(console.file, StringIO)
        return console.file.getvalue() + self.summary() + "\n"

    def __str__(self) -> str:
        return self.table()


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _us(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.1f}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
