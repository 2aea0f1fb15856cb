"""Compile Triton kernels for chips that are not here, and count what a program needs there. Import it with
TRITON_INTERPRET unset.

An operator's compile.py lists its kernels at their real tile sizes; `compiled.py` runs it in its own process.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Variant(NamedTuple):
    """A kernel as a launcher starts it.

    arguments: a type such as "*fp32" or "i64" for each run-time parameter, the value itself (not a string)
    for each constexpr. Pointers are taken to be aligned to 16 bytes, as PyTorch's allocations are;
    `divisible` names the integers that are multiples of 16. options: the launch's warps, stages and so on.
    """

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    divisible: tuple[str, ...] = ()


Cases = dict[str, dict[str, Variant]]  # name -> target -> how the kernel is started there


def on(variant: Variant, *targets: str) -> dict[str, Variant]:
    """The same on these targets, by default on all."""
    return dict.fromkeys(targets or TARGETS, variant)


def report(cases: Cases) -> None:
    """Print a JSON table: name -> target -> figures."""
    print(json.dumps({name: {t: figures(v, t) for t, v in each.items()} for name, each in cases.items()}))


def figures(variant: Variant, target: str) -> dict[str, int]:
    """Registers and spilled bytes a thread, and shared memory a program in bytes, on `target`; also the wgmma
    instructions, Hopper's asynchronous matrix products, and the mma instructions of every NVIDIA chip."""
    kernel, arguments, options, divisible = variant
    signature = {name: a if isinstance(a, str) else "constexpr" for name, a in arguments.items()}
    constants = {name: a for name, a in arguments.items() if not isinstance(a, str)}
    aligned: Any = {
        (n,): [["tt.divisibility", 16]]
        for n, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in divisible
    }
    backend, chip, warp = TARGETS[target]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget(backend, chip, warp),
        options=options,
    )
    counts = _amd(compiled.asm["amdgcn"]) if backend == "hip" else _nvidia(compiled.asm["ptx"], chip)
    ptx = compiled.asm.get("ptx", "")
    return {
        **counts,
        "shared": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
    }


def _amd(assembly: str) -> dict[str, int]:
    found = {
        name: int(value)
        for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly)
    }
    return {
        "registers": found["vgpr_count"],
        "spills": 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"]),
    }


def _nvidia(ptx: str, chip: int) -> dict[str, int]:
    architecture = re.search(r"\.target (sm_\w+)", ptx)
    assert architecture is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        tool = BIN / ("ptxas-blackwell" if chip >= 100 else "ptxas")
        command = [tool, "-v", f"--gpu-name={architecture[1]}", source, "-o", Path(folder, "kernel.cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    registers = re.search(r"Used (\d+) registers", log)
    assert registers is not None
    return {"registers": int(registers[1]), "spills": spills}
