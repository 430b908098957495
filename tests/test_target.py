"""Targets: names, what follows from their features, and what this machine can run."""

from __future__ import annotations

import platform
from types import SimpleNamespace

import pytest

from graphopt.accelerators import ACCELERATORS
from graphopt.cli.doctor import _kernels
from graphopt.errors import UsageError
from graphopt.processors import PROCESSORS
from graphopt.target import MATRIX_UNITS, Target, _Here, describe, detect, gpu_of


def cpu(name: str) -> Target:
    return Target.from_name(f"cpu:{name}")


@pytest.mark.parametrize(
    ("name", "bits", "registers", "tile"),
    [
        ("x86-64", 128, 16, (6, 2)),
        ("x86-64-v3", 256, 16, (6, 2)),
        ("x86-64-v4", 512, 32, (8, 3)),
        ("znver3", 256, 16, (6, 2)),
        ("znver5", 512, 32, (8, 3)),
        ("neoverse-n1", 128, 32, (8, 3)),
        ("neoverse-v1", 256, 32, (8, 3)),
        ("neoverse-v2", 128, 32, (8, 3)),
        ("a64fx", 512, 32, (8, 3)),
    ],
)
def test_registers_and_tile(name: str, bits: int, registers: int, tile: tuple[int, int]) -> None:
    t = cpu(name)
    assert (t.vector_bits, t.vector_registers, t.tile) == (bits, registers, tile)
    assert tile[0] * tile[1] + tile[1] + 1 <= registers  # accumulators, vectors of a factor, an element of the other
    assert t.lanes(4) == bits // 32


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_name_is_a_target(name: str) -> None:
    from graphopt.backends.tvm.llvm_target import llvm_features
    from graphopt.backends.tvm.worker import target_from_json, target_to_json

    t = cpu(name)
    assert t.cores == 1 and Target.from_name(f"cpu:{name}:6").cores == 6
    assert target_from_json(target_to_json(t)) == t
    assert llvm_features(t)
    assert all(_kernels(t))


def test_targets_differ_in_their_fingerprints() -> None:
    assert len({cpu(name).fingerprint for name in PROCESSORS}) == len(PROCESSORS)


@pytest.mark.parametrize("name", [f"{a.kind}:{arch}" for arch, a in ACCELERATORS.items()])
def test_gpus_by_name(name: str) -> None:
    t = Target.from_name(name)
    assert t.is_gpu and str(t) == name and t.matrix_unit in MATRIX_UNITS
    assert t.warp == (64 if t.kind == "hip" else 32) and t.shared_memory >= 64 << 10 and t.cores > 100
    assert Target.from_name(f"{name}:16").cores == 16


def test_a_gpu_as_pytorch_describes_it() -> None:
    seen = {"name": "H200", "multi_processor_count": 132, "L2_cache_size": 60 << 20, "shared_memory_per_block_optin": 232448}
    hopper = gpu_of(SimpleNamespace(major=9, minor=0, **seen), hip=False)
    assert (hopper.arch, hopper.model, hopper.matrix_unit, hopper.cores) == ("sm_90", "H200", "wgmma", 132) and hopper.has("tma")
    other = gpu_of(SimpleNamespace(major=8, minor=6, **seen), hip=False)  # not in the table: what its family has
    assert (other.arch, other.matrix_unit, other.shared_memory) == ("sm_86", "mma", 232448)
    amd = gpu_of(SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", **seen), hip=True)
    assert (amd.kind, amd.arch, amd.warp, amd.matrix_unit) == ("hip", "gfx942", 64, "mfma")


UNKNOWN = ("cuda:sm_9", "hip:sm_90", "cuda:sm_90:0", "cpu:znver44", "cpu:znver4:0", "cpu:znver4:x", "cuda", "tpu:v5", "")


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names(name: str) -> None:
    with pytest.raises(UsageError, match="unknown target"):
        Target.from_name(name)


def test_a_misspelt_name_is_met_with_the_right_one() -> None:
    with pytest.raises(UsageError, match="did you mean 'znver4'"):
        Target.from_name("cpu:znver44")


def test_bf16_products() -> None:
    engines = {name: cpu(name).bf16_products for name in ("x86-64-v4", "znver4", "sapphirerapids", "neoverse-n1")}
    assert engines == {"x86-64-v4": "", "znver4": "dot", "sapphirerapids": "amx", "neoverse-n1": ""}


def test_what_a_machine_can_run() -> None:
    zen, v3 = cpu("znver4"), cpu("x86-64-v3")
    assert zen.lacks(v3) == "" and "avx512" in v3.lacks(zen)
    assert "aarch64" in zen.lacks(cpu("neoverse-n1"))
    assert "256 bits" in cpu("neoverse-v2").lacks(Target("cpu", "aarch64", features=("asimd", "sve"), sve_bits=256))
    assert detect().lacks(detect()) == "" and Target.from_name("cpu") == detect()


def test_the_number_of_cores_is_the_targets_own() -> None:
    from graphopt.autotune.space import Workload
    from graphopt.backends.tvm.backend import TvmBackend

    w = Workload("matmul", "graph @g(%x: f32[256, 64], %y: f32[96, 64]) -> f32[256, 96] {\n"
                 " %0: f32[64, 96] = transpose(%y) {perm = [1, 0]}\n %1: f32[256, 96] = matmul(%x, %0)\n return %1\n}")  # fmt: skip
    groups = []
    for cores in (1, 64):
        t = Target.from_name(f"cpu:x86-64-v4:{cores}")
        groups.append(TvmBackend().templates(w, t)[0].space(w, t).default()["group"])
    assert groups[0] > groups[1]


def test_what_a_processor_is_called_is_asked_for_only_where_linux_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask starts a program."""
    asked: list[str] = []
    monkeypatch.setattr(platform, "processor", lambda: asked.append("") or "sparrow")
    assert describe(_Here()).arch == detect().arch
    count = len(asked)
    monkeypatch.setattr(_Here, "read", lambda self, path: "")
    assert describe(_Here()).model == "sparrow"
    assert len(asked) == count + 1
