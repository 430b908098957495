"""Instructions that this processor carries out though it does not announce them.

A virtual machine may hide features of its processor, so that it can be moved to an older one. Nothing here is used unless the user
names a processor that has them (``target="cpu:graniterapids:2"``); then each is tried once, in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from dataclasses import replace
from functools import cache

from graphopt.target import AMX_REQUEST, Target, detect

# machine code of a function without arguments: shapes are set (the configuration is at rdi), the instruction, tiles are released
_LOAD_SHAPES, _RELEASE, _RETURN = "c4e2784907", "c4e27849c0", "c3"
_INSTRUCTIONS = {"amx_fp16": "c4e26b5cc1"}  # tdpfp16ps tmm0, tmm1, tmm2
_PROGRAM = """
import ctypes, mmap, sys
request, code = [int(x) for x in sys.argv[1].split(",")], bytes.fromhex(sys.argv[2])
if ctypes.CDLL(None).syscall(*request):
    sys.exit(1)
shapes = (ctypes.c_uint8 * 64)(1, *[0] * 15, *[64, 0] * 3, *[0] * 26, *[16] * 3)
page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(code)
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(ctypes.c_char.from_buffer(page)))(ctypes.addressof(shapes))
"""


@cache
def works(feature: str) -> bool:
    """Whether this processor carries out the instruction of a feature; tried in a process of its own, which it may kill."""
    code = _LOAD_SHAPES + _INSTRUCTIONS[feature] + _RELEASE + _RETURN
    args = [sys.executable, "-S", "-c", _PROGRAM, ",".join(map(str, AMX_REQUEST)), code]
    try:
        return subprocess.run(args, capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def hidden(here: Target, wanted: Collection[str] = tuple(_INSTRUCTIONS)) -> tuple[str, ...]:
    """Of the features ``wanted``, those that this machine, described by ``here``, has and does not announce."""
    return tuple(f for f in _INSTRUCTIONS if f in wanted and not here.has(f) and here.has("amx_tile") and works(f))


def missing_here(target: Target) -> str:
    """Why kernels for a CPU, which the user named, cannot run here, in words; empty if they can. What is hidden is tried."""
    here = detect()
    return replace(here, features=tuple(sorted((*here.features, *hidden(here, target.features))))).lacks(target)
