"""How time is taken: CUDA events around a call, in rounds in which every provider has its turn.

A call's `ms` is what the device spends on it.  A short wait is queued on the device before each call, so that the
host is ahead when the call's first kernel may start, and the host's own time is a figure of its own, `host_us`.  A
call for which the host took longer than that wait says nothing about the device and does not count, where a provider
has calls enough without.
"""

from __future__ import annotations

import datetime
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

CYCLES_PER_SECOND = 2e9  # torch.cuda._sleep counts the SM's clock; too high a guess makes the wait a little longer
LONGEST_WAIT = 5e-3  # seconds
LEAST_COUNTED = 3  # calls whose host was not late; with fewer, all count
WARM_UP = 3  # calls of each provider between the check and the first round


@dataclass
class Run:
    """One provider's call, and what has been read of it."""

    name: str
    function: Callable[[], Any]
    benchmark: bool = True  # torch.backends.cudnn.benchmark during the call
    own_thread: bool = False
    grad: bool = False
    host: list[float] = field(default_factory=list)  # seconds a call
    events: list = field(default_factory=list)
    wait: float = 0.0  # seconds that the device waits before a call
    late: list[bool] = field(default_factory=list)  # whether the host took longer than that


# torch keeps the plan that cuDNN chose for a convolution in a cache a thread, and looks there before it looks at
# torch.backends.cudnn.benchmark.  Whoever comes first would choose for both; so calls with benchmark=False have a
# thread of their own.
_thread: ThreadPoolExecutor | None = None


def call(run: Run, function: Callable[[], Any] | None = None) -> Any:
    """run.function (or another in its place) under the run's settings, in its thread."""
    global _thread

    def work():
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = run.benchmark
        try:
            # The backward pass in the calling thread, for the cache's sake.
            with torch.set_grad_enabled(run.grad), torch.autograd.set_multithreading_enabled(False):
                return (function or run.function)()
        finally:
            torch.backends.cudnn.benchmark = before

    if not run.own_thread:
        return work()
    _thread = _thread or ThreadPoolExecutor(max_workers=1)
    return _thread.submit(work).result()


def _timed(run: Run, flush: torch.Tensor | None) -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def work():
        torch.cuda._sleep(int(run.wait * CYCLES_PER_SECOND))
        if flush is not None:
            flush.zero_()
        start.record()
        begin = time.perf_counter()
        run.function()
        run.host.append(time.perf_counter() - begin)
        end.record()

    call(run, work)
    run.events.append((start, end))
    run.late.append(run.host[-1] > run.wait)
    if run.late[-1]:
        run.wait = max(run.wait, _wait(run.host[-1]))


def _wait(host: float) -> float:
    """How long the device is to wait for a host that takes so many seconds to launch a call."""
    return min(1.3 * host + 20e-6, LONGEST_WAIT)


def interleave(runs: list[Run], budget: float, fewest: int, most: int, flush: torch.Tensor | None) -> dict[str, dict]:
    """Time the runs in turn, round after round, until `budget` seconds are spent or `most` rounds done.

    Each round begins with the next provider, so that none always follows the same one.  `flush` is overwritten before
    each call (a buffer of twice the L2, for cases that fit in it).  A provider that takes more than the whole budget
    for a call is warmed up by one and timed in two rounds.
    """
    slow = set()
    for run in runs:
        run.host = []
        for _ in range(WARM_UP):
            begin = time.perf_counter()
            _timed(run, flush)
            torch.cuda.synchronize()
            if time.perf_counter() - begin > budget:
                slow.add(run.name)
                break
        run.wait = _wait(statistics.median(run.host))
    for run in runs:
        run.host, run.events, run.late = [], [], []
    begin = time.perf_counter()
    for i in range(most):
        for run in runs[i % len(runs) :] + runs[: i % len(runs)]:
            if i < 2 or run.name not in slow:
                _timed(run, flush)
        torch.cuda.synchronize()
        enough = i + 1 >= 2 * fewest or all(run.name in slow or run.late.count(False) >= fewest for run in runs)
        if enough and time.perf_counter() - begin > budget:
            break
    return {run.name: statistics_of(run) for run in runs}


def statistics_of(run: Run) -> dict:
    """Median and interquartile range of the device's time, and the host's median time a call."""
    counted = [e for e, late in zip(run.events, run.late) if not late]
    counted = counted if len(counted) >= LEAST_COUNTED else run.events
    times = sorted(start.elapsed_time(end) for start, end in counted)
    quarter, three = times[len(times) // 4], times[(3 * len(times)) // 4]
    return {
        "ms": statistics.median(times),
        "ms_spread": three - quarter,
        "host_us": 1e6 * statistics.median(run.host),
        "rounds": len(times),
    }


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def flush_buffer() -> torch.Tensor:
    """What to overwrite so that nothing of a case is left in the L2."""
    return torch.empty(2 * l2_bytes(), dtype=torch.int8, device="cuda")


def free_bytes() -> int:
    """Device memory that a case can have: what is free, and what torch's allocator holds unused."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def roofs() -> dict:
    """Copy bandwidth (GB/s, read and written bytes) and matrix rates (TFLOP/s) of this device, measured now."""
    elements = max(1 << 20, min(1 << 29, free_bytes() // 16))
    a = torch.randn(elements // 4, device="cuda").repeat(4)
    b = torch.empty_like(a)
    ms = _median_ms(partial(b.copy_, a))
    measured: dict = {"copy_gbps": 2 * a.numel() * 4 / ms / 1e6, "matmul_tflops": {}}
    flag = torch.backends.cuda.matmul
    before = flag.fp32_precision  # type: ignore[attr-defined]
    try:
        for precision, n in (("tf32", 8192), ("fp32", 4096), ("fp16", 8192), ("bf16", 8192)):
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
            flag.fp32_precision = "tf32" if precision == "tf32" else "ieee"  # type: ignore[attr-defined]
            a = b = None  # type: ignore[assignment]
            a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
            ms = _median_ms(partial(torch.matmul, a, b))
            measured["matmul_tflops"][precision] = 2 * n**3 / ms / 1e9
    finally:
        flag.fp32_precision = before  # type: ignore[attr-defined]
    measured["copy_ms"] = _copies()
    torch.cuda.empty_cache()
    return measured


def _copies() -> dict[str, float]:
    """Milliseconds of copies by the bytes that they read and write, with a cold L2 where they fit in it, as cases are timed."""
    flush, found = flush_buffer(), {}
    for nbytes in (1 << n for n in range(16, 32, 2)):
        a = torch.randn(nbytes // 8, device="cuda")
        found[str(nbytes)] = _median_ms(partial(torch.empty_like(a).copy_, a), flush if nbytes <= l2_bytes() else None)
    return found


def _median_ms(function: Callable[[], Any], flush: torch.Tensor | None = None, rounds: int = 20) -> float:
    run = Run("roof", function, wait=20e-6)
    for i in range(rounds + 5):
        if i == 5:
            run.events = []
        _timed(run, flush)
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in run.events)


def roof_ms(flops: float, nbytes: float, precision: str, measured: dict) -> float:
    """The least time for so many operations and bytes at the measured rates.

    fp32 with full precision can be formed from three TF32 products, so its rate is a third of TF32's where that is
    more than what the IEEE matrix product reached.
    """
    rates = measured["matmul_tflops"]
    rate = max(rates["fp32"], rates["tf32"] / 3) if precision == "fp32" else rates[precision]
    return max(flops / rate / 1e9, nbytes / measured["copy_gbps"] / 1e6)


def reach_ms(flops: float, nbytes: float, precision: str, measured: dict) -> float | None:
    """roof_ms, or the time of a copy that moves so many bytes where that is more: few bytes reach no bandwidth.  None where the
    run has not measured copies."""
    if not (copies := measured.get("copy_ms")):
        return None
    points = sorted((int(n), ms) for n, ms in copies.items())
    copy = points[-1][1] * nbytes / points[-1][0]
    for (less, before), (more, after) in pairwise(points):
        if nbytes <= more:
            copy = before + (after - before) * max(0.0, nbytes - less) / (more - less)
            break
    return max(copy, roof_ms(flops, nbytes, precision, measured))


def _query(fields: str) -> str:
    """One line of nvidia-smi about the current device, or ""."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", visible]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def clocks() -> dict:
    """Clocks, temperature and power as nvidia-smi reads them now; empty where it cannot be asked."""
    fields = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")
    values = _query(",".join(fields)).split(", ")
    return dict(zip(fields, values)) if len(values) == len(fields) else {}


def head(gpu: bool) -> dict:
    """Where and with what a run is made."""
    import triton

    import tconv

    return {
        "device": torch.cuda.get_device_name() if gpu else "none (Triton's interpreter on the CPU)",
        "driver": _query("driver_version") if gpu else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "tconv": tconv.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "clocks": clocks() if gpu else {},
        "l2_bytes": l2_bytes() if gpu else 0,
        "memory_bytes": torch.cuda.mem_get_info()[1] if gpu else 0,
    }


def _commit() -> str:
    if told := os.environ.get("TCONV_COMMIT"):  # of a copied tree, which can carry an older .git or none
        return told
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def poison(shape, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """NaN in the memory that the allocator hands out next for such a tensor, so that an unwritten element shows."""
    torch.empty(tuple(shape), dtype=dtype, device="cuda", memory_format=memory_format).fill_(float("nan"))
