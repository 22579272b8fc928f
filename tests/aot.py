"""Compile kernels ahead of time, with no GPU, under whichever Triton release this Python imports.

    python tests/aot.py cuda 90 < launches.json

The launches are a JSON list of objects as tests/test_aot.py records them: module, kernel, types (by argument:
a Triton type with its specialisation, "*bf16 DS"), constants, options.  One line of JSON goes out per launch.
It never imports torch, so that any release of Triton will do.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before any kernel is decorated

# tconv.kernels without tconv/__init__.py, which imports torch.
package = types.ModuleType("tconv")
package.__path__ = [str(Path(__file__).parent.parent / "tconv")]
sys.modules["tconv"] = package

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

MATRIX_INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "mma.sync": "mma.sync",
    "mfma": "v_mfma",
}


def compile_launch(job):
    """The result of one launch's compilation, as a dictionary."""
    (backend, arch), launch = job
    import importlib

    from triton.compiler.compiler import ASTSource, make_backend

    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    kernel = getattr(importlib.import_module(f"tconv.kernels.{launch['module']}"), launch["kernel"])
    constants = dict(launch["constants"])
    if "ACC" in constants:
        constants["ACC"] = getattr(tl, constants["ACC"])
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name], _, specialisation = launch["types"].get(name, "constexpr").partition(" ")
        if specialisation:
            attributes[(i,)] = make_backend(target).parse_attr(specialisation)
    result = {"launch": launch["name"], "kernel": launch["kernel"], "triton": triton.__version__}
    start = time.perf_counter()
    try:
        compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target, launch["options"])
    except Exception as e:
        return result | {"error": f"{type(e).__name__}: {e}"}
    result["seconds"] = round(time.perf_counter() - start, 2)
    assembly = compiled.asm["amdgcn" if backend == "hip" else "ptx"]
    result |= {
        "symbol": compiled.name,
        "shared": compiled.metadata.shared,
        "matrix": [name for name, text in MATRIX_INSTRUCTIONS.items() if text in assembly],
        "numbers": sorted(set(re.findall(r"(?:wgmma|mma\.sync|tcgen05\.mma)\S*?((?:\.kind::|\.)(?:bf16|f16|tf32))\b", assembly))),
    }
    return result | (amd_resources(assembly) if backend == "hip" else nvidia_resources(compiled.asm["cubin"]))


def amd_resources(assembly):
    """Registers, and the spilled ones, from the assembly's metadata."""

    def number(key):
        return int(re.search(rf"\.{key}:\s*(\d+)", assembly).group(1))

    return {"registers": number("vgpr_count"), "spills": number("vgpr_spill_count") + number("sgpr_spill_count")}


def nvidia_resources(cubin):
    """Registers, and the bytes of stack a thread: the kernels have no local arrays, so a stack is spilled registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "spills": usage["STACK"] + usage["LOCAL"]}


def main():
    backend, arch = sys.argv[1:3]
    target = backend, int(arch) if arch.isdigit() else arch
    launches = json.load(sys.stdin)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for result in pool.imap_unordered(compile_launch, [(target, launch) for launch in launches]):
            print(json.dumps(result), flush=True)
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
