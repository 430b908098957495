"""Schemes: what is quantized, to how many bits, with how many elements to a scale. Their names are what users write."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from graphopt.errors import UsageError, nearest
from graphopt.pass_manager import Pass
from graphopt.passes.quantization.quantize_convolutions import QuantizeConvolutions
from graphopt.passes.quantization.quantize_products import QuantizeProducts
from graphopt.passes.quantization.quantize_weights import GROUPS, QuantizeWeights

_FORM = re.compile(r"(?P<name>[\w-]+?)(?P<group>-g\d+)?(?P<zero>-zp)?")


@dataclass(frozen=True)
class Scheme:
    """A way to quantize.

    Attributes:
        name: as users write it, without group and zero points.
        bits: of a weight.
        group: rows of a weight that share a scale; 0 for all rows of a column.
        zero_points: whether the integers of a group span from its least to its greatest element.
        storage: the floats of 8 bits that weights are rounded to, ``f8e4m3`` or ``f8e5m2``; empty for integers.
        activations: how the other factor is rounded, too: ``dynamic``, by scales of each row and call, or ``static``, by one of
            each layer that calibration has found; empty if it stays in float.
    """

    name: str
    bits: int
    group: int = 0
    zero_points: bool = False
    activations: str = ""
    storage: str = ""

    @staticmethod
    def parse(text: str) -> Scheme:
        """A scheme from its name: ``int8-weight``, ``int4-weight``, ``int4-weight-g128``, ``int4-weight-g32-zp``.

        Raises:
            UsageError: there is no such scheme, or no such group.
        """
        found = _FORM.fullmatch(text) if isinstance(text, str) else None
        if found is None or found["name"] not in SCHEMES:
            raise UsageError(f"there is no scheme {text!r}{_ordered(str(text)) or nearest(str(text), SCHEMES)}; {FORMS}")
        scheme = SCHEMES[found["name"]]
        if found["group"]:
            scheme = replace(scheme, group=int(found["group"][2:]))
        if found["zero"]:
            scheme = replace(scheme, zero_points=True)
        if scheme.activations and (scheme.group or scheme.zero_points):
            wrong = found["group"] or found["zero"]
            raise UsageError(f"scheme {text!r}: {wrong} is for weights alone; where inputs are rounded, too, an output's weights have one "
                             "scale, and no zero point")  # fmt: skip
        if scheme.storage and scheme.zero_points:
            raise UsageError(f"scheme {text!r}: floats have no zero points")
        if scheme.group not in GROUPS:
            raise UsageError(f"scheme {text!r}: a group has {_either(GROUPS[1:])} rows, not {scheme.group}")
        return scheme

    def make(self) -> tuple[Pass, ...]:
        """The passes that do it. Raises UsageError for a scheme that needs calibration."""
        if self.activations == "static":
            raise UsageError(f"{self} needs calibration: graphopt.quantize(model, args, scheme={str(self)!r}, calibration=...)")
        if self.activations:
            return (QuantizeProducts(storage=self.storage), *(() if self.storage else (QuantizeConvolutions(),)))
        return (QuantizeWeights(bits=self.bits, group=self.group, zero_points=self.zero_points, storage=self.storage),)

    def __str__(self) -> str:
        plain = SCHEMES[self.name]
        group = f"-g{self.group}" if self.group != plain.group else ""
        return f"{self.name}{group}{'-zp' if self.zero_points and not plain.zero_points else ''}"


SCHEMES: Mapping[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("int8-weight", 8),
        Scheme("int4-weight", 4, 64),
        Scheme("int2-weight", 2, 64, zero_points=True),
        Scheme("fp8-e4m3-weight", 8, storage="f8e4m3"),
        Scheme("fp8-e5m2-weight", 8, storage="f8e5m2"),
        Scheme("int8-dynamic", 8, activations="dynamic"),
        Scheme("int8-static", 8, activations="static"),
        Scheme("fp8-e4m3-dynamic", 8, activations="dynamic", storage="f8e4m3"),
        Scheme("fp8-e5m2-dynamic", 8, activations="dynamic", storage="f8e5m2"),
        Scheme("fp8-e4m3-static", 8, activations="static", storage="f8e4m3"),
        Scheme("fp8-e5m2-static", 8, activations="static", storage="f8e5m2"),
    )
}


def _either(choices: Sequence[object]) -> str:
    return f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}"


def _ordered(text: str) -> str:
    """A hint for a scheme whose parts are all right, but not their order; else an empty string."""
    parts = re.fullmatch(r"(?P<name>[\w-]+?)-zp(?P<group>-g\d+)", text)
    return f" (the group comes first: {parts['name']}{parts['group']}-zp)" if parts and parts["name"] in SCHEMES else ""


WEIGHTS, BOTH = (", ".join(name for name, s in SCHEMES.items() if bool(s.activations) is both) for both in (False, True))
FORMS = (f"schemes of weights are {WEIGHTS}, which may be followed by a group, {_either([f'-g{g}' for g in GROUPS[1:]])}, and, if they are "
         f"integers, by zero points, -zp; schemes of weights and inputs are {BOTH}")  # fmt: skip
"""All that users may write."""
