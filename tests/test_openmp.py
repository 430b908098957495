"""The processors of a process whose first thread OpenMP has bound to one of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from graphopt.openmp import usable_processors

PROGRAM = """
import os, subprocess, sys
import torch
bound = sorted(os.sched_getaffinity(0))
from graphopt.openmp import unbound, usable_processors
from graphopt.target import detect
child = subprocess.run([sys.executable, "-c", unbound() + "print(sorted(os.sched_getaffinity(0)))"], capture_output=True, text=True)
print(bound, sorted(usable_processors()), detect().cores, child.stdout.strip(), sep=";")
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two processors")
def test_a_bound_thread_hides_no_processor() -> None:
    have = {name: _told({"OMP_PROC_BIND": name}) for name in ("true", "false")}
    every = str(sorted(usable_processors()))
    assert have["false"][0] == every and have["true"][0] != every  # libgomp binds the thread that loads it
    assert have["true"][1:] == have["false"][1:] and have["true"][1] == have["true"][3] == every


def _told(settings: dict[str, str]) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env={**os.environ, **settings}, check=True)
    return done.stdout.strip().split(";")
