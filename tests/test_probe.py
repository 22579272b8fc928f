"""The probe of the Hopper kernels' view of shared memory, and what dispatch makes of its findings."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tconv
from tconv import dispatch, probe
from tconv.configs import Target
from tconv.geometry import Geometry
from tconv.problem import Problem

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
CPU = torch.device("cpu")
HOPPER = Target("cuda", 90, 132, (3, 9))
K4S2 = Geometry((4, 4), (2, 2), (1, 1), (0, 0), 1, (1, 1))
K2S2 = replace(K4S2, kernel=(2, 2), padding=(0, 0))


@pytest.fixture(autouse=True)
def afresh():
    probe.fault.cache_clear()
    dispatch._target.cache_clear()
    yield
    probe.fault.cache_clear()
    dispatch._target.cache_clear()


def products(x, weight, to, offset=0):
    """What the kernel writes; offset: of a view that is so many pixels off, but for one that begins at a stage."""
    p = probe.Probed()
    for i, shift in enumerate(p.shifts):
        for stage in range(p.stages):
            first = stage * p.pitch + shift + (offset if shift else 0)
            to[i, stage] = (weight.double() @ x[first : first + p.pixels].T.double()).float()


def test_a_view_as_the_kernel_has_it_is_found_right(monkeypatch):
    monkeypatch.setattr(probe, "launch", products)
    assert probe.fault(CPU) == ""


@pytest.mark.parametrize("offset", (-1, 1, 7, 8))  # rows are swizzled by the eight
def test_a_view_that_is_off_is_found_wrong(offset, monkeypatch):
    monkeypatch.setattr(probe, "launch", lambda *tensors: products(*tensors, offset=offset))
    wrong = int(probe.fault(CPU).split(" found ")[1].split()[0])
    p = probe.Probed()
    assert wrong == (len(p.shifts) - 1) * p.stages * 64 * p.pixels  # no two pixels have a channel in common


def test_products_that_were_not_written_are_wrong(monkeypatch):
    monkeypatch.setattr(probe, "launch", lambda *tensors: None)
    assert "of 32768 products wrong" in probe.fault(CPU)


def test_what_does_not_compile_is_a_fault_and_too_little_memory_is_none(monkeypatch):
    def fail(*tensors):
        raise error

    monkeypatch.setattr(probe, "launch", fail)
    error = ValueError("no such layout")
    assert probe.fault(CPU) == f"{probe.PROBED} failed: ValueError: no such layout"
    probe.fault.cache_clear()
    error = torch.OutOfMemoryError("none left")
    with pytest.raises(torch.OutOfMemoryError):
        probe.fault(CPU)


@pytest.mark.parametrize("geometry", (K4S2, K2S2), ids=("shift", "blocks"))
def test_a_fault_leaves_the_kernels_of_every_gpu_and_is_explained(geometry, request):
    problem = Problem(
        "forward", geometry, 8, 128, 128, (64, 64), torch.bfloat16, True, "width", vector=16, weight="taps", aligned=True, bias=True
    )  # fmt: skip
    assert dispatch.plan(problem, HOPPER).family == request.node.callspec.id
    plan = dispatch.plan(problem, replace(HOPPER, fault="the probe found 3 products wrong"))
    assert plan.family == "gemm"
    assert "the probe found 3 products wrong" in plan.reason


@pytest.mark.parametrize(
    ("arch", "version", "capturing", "probed"),
    (
        ((9, 0), "3.9.0", False, True),
        ((9, 0), "3.6.0", False, True),
        ((8, 0), "3.9.0", False, False),
        ((10, 0), "3.9.0", False, False),
        ((9, 0), "4.1.0", False, False),
        ((9, 0), "3.9.0", True, False),
    ),
)
def test_who_is_probed(arch, version, capturing, probed, monkeypatch):
    """Hopper GPUs under releases that have the kernels, but for what a graph captures, which is asked again."""
    properties = SimpleNamespace(major=arch[0], minor=arch[1], multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("triton.__version__", version)
    monkeypatch.setattr(probe, "fault", lambda device: f"asked of {device}")
    device = torch.device("cuda", 0)
    assert dispatch.target_of(device).fault == ("asked of cuda:0" if probed else "")
    if capturing:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert dispatch.target_of(device).fault == "asked of cuda:0"


@pytest.mark.skipif(not GPU, reason="needs a Hopper GPU")
def test_a_gpu_passes():
    assert probe.fault(torch.device("cuda", torch.cuda.current_device())) == ""


@pytest.mark.skipif(not GPU, reason="needs a Hopper GPU")
def test_the_first_call_may_be_one_that_a_graph_captures():
    x, w = torch.randn(4, 64, 32, 32, device="cuda"), torch.randn(64, 64, 4, 4, device="cuda")
    expected = tconv.conv_transpose2d(x, w, stride=2, padding=1)  # compiles
    dispatch._target.cache_clear()
    probe.fault.cache_clear()
    dispatch.plan.cache_clear()
    tconv.record.forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = tconv.conv_transpose2d(x, w, stride=2, padding=1)
    graph.replay()
    assert torch.equal(y, expected)
