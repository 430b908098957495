"""recognise-attention: keys and values of two integers a byte; spellings that are read as such, and near misses."""

from __future__ import annotations

import pytest
from fusing import fused

from graphopt.ir import parse_graph
from graphopt.passes.attention.packed import PackedCache
from graphopt.passes.attention.recognise import RecogniseAttention
from graphopt.passes.fusion.fuse import Fuse
from graphopt.testing import check_pass

TEXT = """graph @g(%q: f32[1, 4, 1, 16], %k: {word}[1, 4, S, 8], %l: {word}[1, 4, S, 8], %a: f32[1, 4, S, {last}], %b: f32[1, 4, S, 16])
    -> f32[1, 4, 1, 16] where 1 <= S {{
  %m: {word}[] = constant() {{value = 15, dtype = {word}}}
  %s: {word}[] = constant() {{value = 16, dtype = {word}}}
{spelled}
  %y: f32[1, 4, S, 16] = mul(%x, %a)
  %0: f32[1, 4, 1, 16] = attention({operands}) {{scale = 0.3}}
  return %0
}}"""
LOW, HIGH = "  %u: u8[1, 4, S, 8] = bitwise_and(%k, %m)", "  %w: u8[1, 4, S, 8] = floor_div(%k, %s)"
FLOATS = """  %f: f32[1, 4, S, 16] = cast(%j) {dtype = f32}
  %n: f32[] = constant() {value = -8.0}
  %x: f32[1, 4, S, 16] = add(%f, %n)"""
STACKED = f"""{LOW}
{HIGH}
  %c: u8[1, 4, S, 8, 1] = reshape(%u) {{shape = [1, 4, S, 8, 1]}}
  %d: u8[1, 4, S, 8, 1] = reshape(%w) {{shape = [1, 4, S, 8, 1]}}
  %i: u8[1, 4, S, 8, 2] = concat(%c, %d) {{axis = 4}}
  %j: u8[1, 4, S, 16] = reshape(%i) {{shape = [1, 4, S, 16]}}
{FLOATS}"""
JOINED = f"""{LOW}
{HIGH}
  %j: u8[1, 4, S, 16] = concat(%u, %w) {{axis = 3}}
{FLOATS}"""
SIGNED = """  %p: i8[1, 4, S, 8] = mul(%k, %s)
  %u: i8[1, 4, S, 8] = floor_div(%p, %s)
  %w: i8[1, 4, S, 8] = floor_div(%k, %s)
  %j: i8[1, 4, S, 16] = concat(%u, %w) {axis = 3}
  %x: f32[1, 4, S, 16] = cast(%j) {dtype = f32}"""


def each(low: int, high: int) -> str:
    """Zero points taken off each half."""
    return f"""{LOW}
  %e: i8[1, 4, S, 8] = cast(%u) {{dtype = i8}}
  %n: i8[] = constant() {{value = {low}, dtype = i8}}
  %c: i8[1, 4, S, 8] = add(%e, %n)
{HIGH}
  %h: i8[1, 4, S, 8] = cast(%w) {{dtype = i8}}
  %o: i8[] = constant() {{value = {high}, dtype = i8}}
  %d: i8[1, 4, S, 8] = add(%h, %o)
  %j: i8[1, 4, S, 16] = concat(%c, %d) {{axis = 3}}
  %x: f32[1, 4, S, 16] = cast(%j) {{dtype = f32}}"""


MASKED = JOINED.replace(HIGH, HIGH.replace("%w", "%r") + "\n  %w: u8[1, 4, S, 8] = bitwise_and(%r, %m)")


def text(spelled: str, word: str = "u8", last: int = 1, operands: str = "%q, %y, %b") -> str:
    return TEXT.format(spelled=spelled, word=word, last=last, operands=operands)


SPELLINGS = {
    "stacked": text(STACKED), "joined": text(JOINED), "of values": text(JOINED, operands="%q, %b, %y"),
    "each by itself": text(each(-8, -8)), "masked": text(MASKED), "signed": text(SIGNED, "i8"),
    "signed words, unsigned numbers": text(MASKED.replace("u8", "i8"), "i8"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str) -> None:
    """Bit by bit the same; the kernel reads the bytes, through views at most."""
    g = check_pass(PackedCache(), SPELLINGS[name])
    (node,) = (n for n in g.nodes() if n.name == "unpack_bits")
    assert node.operands[0] is g.inputs[1]
    found, _ = fused(SPELLINGS[name], RecogniseAttention(), Fuse())
    assert [kind for kind, _ in found] == ["attention"]


TURNED = "  %t: u8[1, 4, S, 16] = reshape(%j) {shape = [1, 4, S, 16]}\n"
MISSES = {
    "the upper halves of cached bytes stand before the lower ones": text(JOINED.replace("concat(%u, %w)", "concat(%w, %u)")),
    "joined of halves of different bytes": text(JOINED.replace("floor_div(%k", "floor_div(%l")),
    "not joined of the two halves": text(JOINED.replace("bitwise_and(%k, %m)", "bitwise_or(%k, %m)")),
    "different zero points, 8 and 7": text(each(-8, -7)),
    "one half of cached bytes has a sign": text(SIGNED.replace("floor_div(%p, %s)", "bitwise_and(%k, %m)"), "i8"),
    "is no whole number, or wraps around": text(JOINED.replace("-8.0", "-7.5")),
    "wraps around": text(each(120, 120)),
    "the scales of cached integers differ within a row": text(JOINED, last=16),
    "not joined along the last axis": text(JOINED.replace("S, 16] = concat(%u, %w) {axis = 3}", "2*S, 8] = concat(%u, %w) {axis = 2}")
                                           .replace("cast(%j)", "cast(%t)").replace("  %f", TURNED + "  %f")),
    "is none of theirs": text(JOINED.replace("-8.0", "3.0")),
}  # fmt: skip


@pytest.mark.parametrize("why", MISSES)
def test_near_miss(why: str) -> None:
    check_pass(PackedCache(), MISSES[why], fires=False, reason=why)


def test_what_no_attention_reads_is_left_alone() -> None:
    g = parse_graph(text(JOINED).replace("attention(%q, %y, %b)", "attention(%q, %b, %b)"))
    check_pass(PackedCache(), g, fires=False)
