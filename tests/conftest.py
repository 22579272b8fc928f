"""The same tests on a GPU, where there is one, and in Triton's interpreter on the CPU, where there is none."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is decorated

import pytest


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_report_header():
    import triton

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter"
    return f"tconv on {where}; torch {torch.__version__}, triton {triton.__version__}, cuDNN {torch.backends.cudnn.version()}"


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
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.conv.fp32_precision = precision


@pytest.fixture
def ieee():
    """IEEE fp32 for this test (torch's default for convolutions is TF32)."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"
