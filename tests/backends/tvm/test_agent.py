"""The agent that runs candidates at the other side of an RPC, without one: called from C, here and on an emulated Arm processor."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("tvm")
from emulated import TOOLS, missing_tools

from graphopt.backends.tvm.agent import build_agent
from graphopt.target import Target, detect

DRIVER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct { int32_t type, padding; int64_t value; } any; /* TVMFFIAny */
typedef struct { int64_t kernel, rows, count, first, calls; double seconds; int64_t kilobytes, done; } slice;
typedef int function(void *, any *, int32_t, any *);

static int64_t *seen;
static int notes(void *s, any *a, int32_t n, any *r) { seen[seen[0]++ + 1] = 10 * a[0].value + n; usleep(1000); return 0; }
static int fails(void *s, any *a, int32_t n, any *r) { return -1; }
static int crashes(void *s, any *a, int32_t n, any *r) { *(volatile int *)8 = 1; return 0; }
static int ends(void *s, any *a, int32_t n, any *r) { _exit(3); }
static int hangs(void *s, any *a, int32_t n, any *r) { for (volatile int i = 0;; i = 1) {} }

int main(int argc, char **argv) {
  void *agent = dlopen(argv[1], RTLD_NOW);
  if (!agent) { puts(dlerror()); return 1; }
  function *c = (function *)dlsym(agent, "__tvm_ffi_graphopt_c"), *run = (function *)dlsym(agent, "__tvm_ffi_graphopt_run");
  any none[1] = {{1, 0, 0}}, result;
  c(0, none, 1, &result);
  any find[3] = {{1, 0, result.value}, {1, 0, 0}, {8, 0, (int64_t)"strlen"}};
  c(0, find, 3, &result);
  const char *text = "seven..";
  int64_t tensor[6] = {(int64_t)text};
  any length[2] = {{1, 0, result.value}, {7, 0, (int64_t)tensor}};
  c(0, length, 2, &result);
  printf("length %d %d\n", result.type, (int)result.value);

  seen = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  slice *s = (slice *)(seen + 512);
  any rows[3][2] = {{{1, 0, 1}, {1, 0, 0}}, {{1, 0, 2}, {1, 0, 0}}, {{1, 0, 3}, {1, 0, 0}}};
  function *kernels[] = {notes, fails, crashes, ends, hangs};
  for (int k = 0; k < 5; k++) {
    memset(s, 0, 2 * sizeof *s);
    s[0] = (slice){(int64_t)notes, (int64_t)rows, 3, 2, 4};
    s[1] = (slice){(int64_t)kernels[k], (int64_t)rows, 1, 0, 1};
    any request[4] = {{1, 0, (int64_t)s}, {1, 0, 2}, {1, 0, 2}, {1, 0, 1}};
    seen[0] = 0;
    if (run(0, request, 4, &result)) return 2;
    printf("status %d done %d %d", (int)result.value, (int)s[0].done, (int)s[1].done);
    printf(" timed %d resident %d seen", s[0].seconds > 0.004 && s[0].seconds < 1, s[0].kilobytes > 100);
    for (int i = 0; i < seen[0]; i++) printf(" %d", (int)seen[i + 1]);
    puts("");
  }
  return 0;
}
"""
EXPECTED = """\
length 1 7
status 0 done 1 1 timed 1 resident 1 seen 32 12 22 32 12
status 256 done 1 0 timed 1 resident 1 seen 32 12 22 32
status 11 done 1 0 timed 1 resident 1 seen 32 12 22 32
status 768 done 1 0 timed 1 resident 1 seen 32 12 22 32
status 14 done 1 0 timed 1 resident 1 seen 32 12 22 32
"""


def called(arch: str, compiler: str, before: list[str], folder: Path) -> str:
    """What the driver prints."""
    agent, program = folder / "agent.so", folder / "driver"
    (folder / "driver.c").write_text(DRIVER)
    assert build_agent(agent, Target("cpu", arch))
    subprocess.run([compiler, "-O1", "-w", "-o", program, folder / "driver.c", "-ldl"], check=True)
    done = subprocess.run([*before, program, agent], capture_output=True, text=True, check=False, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.tvm
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, for a program that calls it")
def test_slices_are_run_in_a_process_of_their_own(tmp_path: Path) -> None:
    assert called(detect().arch, "cc", [], tmp_path) == EXPECTED


@pytest.mark.tvm
@pytest.mark.skipif(bool(missing_tools()), reason=missing_tools() or "all tools are there")
def test_the_same_on_arm(tmp_path: Path) -> None:
    printed = called("aarch64", TOOLS[0], [TOOLS[1], "-L", "/usr/aarch64-linux-gnu"], tmp_path)
    assert [line for line in printed.splitlines() if not line.startswith("qemu")] == EXPECTED.splitlines()
