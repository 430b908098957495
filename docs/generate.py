"""Writes the parts of the documentation that repeat the code: the op table of ir.md, and passes.md from the passes' own headers.

    python docs/generate.py            write
    python docs/generate.py --check    exit with 1 if something is out of date
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import graphopt.ir.text
import graphopt.passes
from graphopt.ir.ops import OPS, REQUIRED, OpDef
from graphopt.ir.printer import format_attr
from graphopt.pass_manager import PASSES, Pass, RewritePass
from graphopt.passes.pipelines import LEVELS

DOCS = Path(__file__).resolve().parent
FAMILIES = {
    "pointwise": "Pointwise", "composite": "Pointwise composites", "reduce": "Reductions", "contract": "Contractions",
    "quantize": "Quantization", "normalize": "Rows: softmax, normalization", "attention": "Attention",
    "attention_training": "Attention in training", "dropout": "Dropout", "scan": "Scans", "shape": "Moving elements",
    "scatter": "Updates by index", "creation": "Creation", "structure": "Structure",
}  # fmt: skip
LABELS = re.compile(r"^(Why|When|Numerics|Reference|Legality|Order)(:|,)", re.MULTILINE)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in lines)


# --- ops ---------------------------------------------------------------------------------------------------------------


def family(op: OpDef) -> str:
    """The page of the op table that an op stands on."""
    for fn in (op.evaluate, op.infer, op.expand):
        page = getattr(fn, "__module__", "").rpartition(".")[2]
        if page in FAMILIES:
            return page
    return "structure"


def op_tables() -> str:
    """One table a family."""
    out = []
    for page, title in FAMILIES.items():
        rows = []
        for op in OPS.values():
            if family(op) != page:
                continue
            least, most = op.arity
            count = str(least) if least == most else f"{least}{'+' if most is None else f' to {most}'}"
            attrs = ", ".join(f"`{k}`" if v is REQUIRED else f"`{k} = {format_attr(v)}`" for k, v in op.attrs.items())
            traits = ", ".join(sorted(t.name.lower().replace("_", " ") for t in op.traits))
            rows.append([f"`{op.name}`", count, attrs, op.doc, traits])
        out.append(f"### {title}\n\n" + table(["op", "operands", "attributes", "meaning", "traits"], rows))
    return "\n\n".join(out)


def grammar() -> str:
    text = inspect.cleandoc(graphopt.ir.text.__doc__ or "").partition("::\n")[2]
    return "```text\n" + inspect.cleandoc(text) + "\n```"


def ir_page() -> str:
    """ir.md with its generated parts renewed; the rest of the page is written by hand."""
    text = (DOCS / "ir.md").read_text()
    for name, content in (("grammar", grammar()), ("ops", op_tables())):
        pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert pattern.search(text), f"ir.md has no place for {name}"
        text = pattern.sub(lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text)  # type: ignore[misc]
    return text


# --- passes ------------------------------------------------------------------------------------------------------------


def header(cls: type[Pass]) -> str:
    """The header of the pass's file: the equation as code, each label a paragraph."""
    doc = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    equation, _, rest = doc.partition("\n\n")
    return f"```text\n{equation}\n```\n\n" + LABELS.sub(r"\n**\1**\2", rest).strip().replace("\n\n\n", "\n\n")


def pass_section(name: str, cls: type[Pass]) -> str:
    """One section: header, options, rules."""
    file = cls.__module__.removeprefix("graphopt.").replace(".", "/") + ".py"
    parts = [f"## {name}", header(cls), f"File: [{file}](../{file})"]
    known = list(fields(cls))  # type: ignore[arg-type]
    if known:
        rows = [[f"`{f.name}`", f"`{f.type}`", "" if f.default is MISSING else f"`{f.default!r}`"] for f in known]
        parts.append(table(["option", "type", "default"], rows))
    if issubclass(cls, RewritePass):
        rows = [[f"`{r.name}`", f"`{r.equation}`", r.numerics.name.lower()] for r in cls().rules()]
        parts.append(table(["rule", "equation", "numerics"], rows))
    return "\n\n".join(parts)


def passes_page() -> str:
    """passes.md."""
    own = {n: c for n, c in PASSES.items() if c.__module__.startswith("graphopt.passes.")}
    levels = "\n".join(f"- level {n}: " + ", ".join(f"[{p}](#{p})" for p in names) for n, names in LEVELS.items())
    intro = (
        "# The passes\n\nGenerated from the headers of the pass files by `docs/generate.py`; edit those. How to write one: "
        f"[writing_a_pass.md](writing_a_pass.md).\n\nThe pipelines:\n\n{levels}"
    )
    ordered = sorted(own, key=lambda n: (own[n].__module__, n))
    return "\n\n".join([intro, *(pass_section(n, own[n]) for n in ordered)]) + "\n"


def pages() -> dict[str, str]:
    """File name -> what it should hold."""
    return {"ir.md": ir_page(), "passes.md": passes_page()}


def main() -> int:
    stale = [name for name, text in pages().items() if not (DOCS / name).exists() or (DOCS / name).read_text() != text]
    if "--check" in sys.argv[1:]:
        print("".join(f"{name} is out of date: run python docs/generate.py\n" for name in stale), end="")
        return 1 if stale else 0
    for name in stale:
        (DOCS / name).write_text(pages()[name])
        print(f"wrote docs/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
