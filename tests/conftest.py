"""The same tests on a GPU, where there is one, and in Triton's interpreter on the CPU, where there is none."""

import datetime
import json
import os
import platform
import subprocess
import tempfile
import time
from collections import Counter

# The interpreter's products are NumPy's, and OpenBLAS rounds by processor: on all of them as on those without AVX-512.
if platform.machine() == "x86_64":
    os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is decorated

import pytest

from tconv import dispatch, record

if torch.cuda.device_count() > 1:  # workers of a parallel run spread over the GPUs
    torch.cuda.set_device(int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % torch.cuda.device_count())


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def environment():
    import triton

    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "Triton's interpreter",
        "driver": (
            _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] if gpu else ""
        ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "commit": os.environ.get("TCONV_COMMIT") or _output("git", "describe", "--always", "--dirty"),
    }


def _output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def pytest_report_header():
    return "tconv on " + ", ".join(f"{k} {v}" for k, v in environment().items() if v)


def pytest_runtest_logreport(report):
    """A failure is told at once: a long run that is stopped has told its failures."""
    if report.failed:
        reason = str(report.longrepr).strip().splitlines()[-1:] or [""]
        print(f"\nFAILED {report.nodeid} ({report.when}): {reason[0]}", flush=True)


def pytest_addoption(parser):
    parser.addoption("--summary", help="write the environment and the counts of this run to a JSON file")


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    path = config.getoption("--summary")
    if not path:
        return
    stats = terminalreporter.stats
    files = Counter(
        (report.location[0], outcome)
        for outcome in ("passed", "failed", "error", "skipped")
        for report in stats.get(outcome, [])
    )
    by_file: dict = {}
    for (name, outcome), n in sorted(files.items()):
        by_file.setdefault(name, {})[outcome] = n
    summary = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **environment(),
        "counts": {k: len(stats.get(k, [])) for k in ("passed", "failed", "error", "skipped")},
        "files": by_file,
        "failures": [r.nodeid for r in stats.get("failed", [])],
    }
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w") as f:
        json.dump(summary, f, indent=1)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned():
    """Fill every uninitialised tensor with NaN, so that an element no kernel wrote shows; restore all flags."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    precision = torch.backends.cudnn.conv.fp32_precision
    torch.manual_seed(0)
    record.forget()  # so that no test depends on what another one called
    with dispatch.without("aten"):  # the kernels are what is tested; test_left.py tests what is left to aten
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.conv.fp32_precision = precision
    torch.cuda.empty_cache()  # the other workers of a parallel run need it


SPARE = 16 * 10**9  # bytes of GPU memory that large tests leave to the small ones and to other workers' contexts


@pytest.fixture
def reserve():
    """reserve(nbytes): wait until so much GPU memory is free and take it for this process's allocator.

    Workers of a parallel run ask one at a time, so that no two count on the same memory.
    """
    import fcntl

    def take(nbytes):
        index = torch.cuda.current_device()
        if nbytes + SPARE > torch.cuda.mem_get_info()[1]:
            pytest.skip(f"needs {nbytes / 1e9:.0f} GB of GPU memory")
        with open(os.path.join(tempfile.gettempdir(), f"tconv-tests-gpu{index}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            while torch.cuda.mem_get_info()[0] < nbytes + SPARE:
                time.sleep(0.05)
            torch.cuda.caching_allocator_delete(torch.cuda.caching_allocator_alloc(nbytes))  # kept for what follows

    return take


@pytest.fixture
def ieee():
    """IEEE fp32 for this test (torch's default for convolutions is TF32)."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"
