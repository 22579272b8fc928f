"""Compile kernels ahead of time, with no GPU, under whichever Triton release this Python imports.

    python tests/aot.py cuda 90 < launches.json

The launches are a JSON list of objects as tests/test_aot.py records them: module, kernel, types (by argument:
a Triton type with its specialisation, "*bf16 DS"), constants, options.  One line of JSON goes out per launch.
It never imports torch, so that any release of Triton will do.
"""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
import time
import types
from pathlib import Path

# Before triton is imported: no interpreter, and the assembler's log on stdout.
os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"

# tconv.kernels without tconv/__init__.py, which imports torch.
package = types.ModuleType("tconv")
package.__path__ = [str(Path(__file__).parent.parent / "tconv")]
sys.modules["tconv"] = package

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler.compiler import ASTSource, make_backend  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction  # noqa: E402

import tconv.blocks  # noqa: E402
import tconv.few  # noqa: E402
import tconv.shift  # noqa: E402

MATRIX_INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "mma.sync": "mma.sync",
    "mfma": "v_mfma",
}


def compile_launch(job):
    """The result of one launch's compilation, as a dictionary."""
    (backend, arch), launch = job
    target = GPUTarget(backend, arch, 64 if backend == "hip" else 32)
    kernel = getattr(importlib.import_module(f"tconv.kernels.{launch['module']}"), launch["kernel"])
    constants = dict(launch["constants"])
    if "ACC" in constants:
        constants["ACC"] = getattr(tl, constants["ACC"])
    for name in {"p", "t"} & constants.keys():  # a tile, as a dataclass prints itself
        constants[name] = eval(constants[name], vars(tconv.shift) | vars(tconv.few) | vars(tconv.blocks))
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name], _, specialisation = launch["types"].get(name, "constexpr").partition(" ")
        if specialisation:
            attributes[(i,)] = make_backend(target).parse_attr(specialisation)
    result = {
        "launch": launch["name"],
        "kernel": launch["kernel"],
        "triton": triton.__version__,
        "from": triton.__file__,
    }
    log = io.StringIO()
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(log):
            source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
            compiled = triton.compile(source(kernel, signature, constants, attributes), target, launch["options"])
    except Exception as e:
        return result | {"error": f"{type(e).__name__}: {e}"}
    result["seconds"] = round(time.perf_counter() - start, 2)
    assembly = compiled.asm["amdgcn" if backend == "hip" else "ptx"]
    result |= {
        "symbol": compiled.name,
        "shared": compiled.metadata.shared,
        "matrix": [name for name, text in MATRIX_INSTRUCTIONS.items() if text in assembly],
        "bulk": "cp.async.bulk.tensor" in assembly,
        "overlaps": [name for name in ("launch_dependents", "wait") if f"griddepcontrol.{name}" in assembly],
        "added": added(compiled.asm["ttgir"]),
        "stored": stored(assembly),
        "to_shared": to_shared(assembly),
        "copied": copied(assembly, 32 * compiled.metadata.num_warps),
    }
    return result | (amd_resources(assembly) if backend == "hip" else nvidia_resources(log.getvalue()))


def stored(ptx):
    """How many bytes a thread writes to global memory at once."""
    found = re.findall(r"st\.global(?:\.v(\d))?\.b(\d+)", ptx)
    return sorted({int(many or 1) * int(bits) // 8 for many, bits in found})


def added(ttgir):
    """How many tensors a loop adds up."""
    return sum(body.count("arith.addf") for body in re.findall(r"scf\.for.*?scf\.yield", ttgir, re.DOTALL))


def to_shared(ptx):
    """How many bytes of accumulators a thread writes to shared memory at once; by the matrix counts as 16."""
    found = re.findall(r"st\.shared(?:\.v(\d))?\.b(\d+)", ptx)
    return sorted({int(many or 1) * int(bits) // 8 for many, bits in found} | ({16} if "stmatrix" in ptx else set()))


def copied(ptx, threads):
    """Bytes that a block's asynchronous copies bring in, by the width of one copy."""
    total = {}
    for width in re.findall(r"cp\.async\.c[ag]\S* \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+)", ptx):
        total[int(width, 16)] = total.get(int(width, 16), 0) + int(width, 16) * threads
    return total


def amd_resources(assembly):
    """Registers, and the spilled ones, from the assembly's metadata."""

    def number(key):
        return int(re.search(rf"\.{key}:\s*(\d+)", assembly).group(1))

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "scalar_spills": number("sgpr_spill_count"),
    }


def nvidia_resources(log):
    """Registers a thread, and the bytes of them spilled, from the assembler's log."""
    pattern = r"(\d+) bytes spill stores, .*?Used (\d+) registers"
    spills, registers = map(int, re.search(pattern, log, re.DOTALL).groups())
    return {"registers": registers, "spills": spills}


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
