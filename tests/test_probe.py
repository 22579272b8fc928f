"""The probe of the Hopper kernels' view of shared memory, and what dispatch makes of its findings."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from machine import Machine, Memory, namespace
from torch._subclasses.fake_tensor import FakeTensorMode

import tconv
from tconv import dispatch, probe, record
from tconv.configs import Target
from tconv.geometry import Geometry
from tconv.kernels import probe as kernels
from tconv.problem import Problem

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
CPU = torch.device("cpu")
HOPPER = Target("cuda", 90, 132, (3, 9))
K4S2 = Geometry((4, 4), (2, 2), (1, 1), (0, 0), 1, (1, 1))
K2S2 = replace(K4S2, kernel=(2, 2), padding=(0, 0))
PROBLEM = Problem(
    "forward", K4S2, 8, 128, 128, (64, 64), torch.bfloat16, True, "width", vector=16, weight="taps", aligned=True, bias=True
)  # fmt: skip
SIZES = pytest.mark.parametrize("size", probe.TILES, ids=lambda size: f"{size} bytes")


@pytest.fixture(autouse=True)
def afresh():
    probe._found.clear()
    record.forget()
    yield
    probe._found.clear()
    record.forget()


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setattr(probe, "compile", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def emulate(tile, x, weight, products, change=None):
    """The kernel's own code, by tests/machine.py."""
    machine = Machine((0, 0), (1, 1), tile.size, 0)
    machine.own.products = []
    memories = [Memory(t) for t in (x, weight, products)]
    namespace(machine, kernels, change)["probe"](*memories, tile)
    assert not machine.own.products
    memories[2].finish()


@SIZES
def test_the_kernel_makes_what_is_expected(size, compiled, monkeypatch):
    monkeypatch.setattr(probe, "launch", emulate)
    assert probe.fault(CPU, size) == ""


@SIZES
@pytest.mark.parametrize("offset", (1, 7, 8))  # rows are swizzled by the eight
def test_a_view_that_is_off_is_found(size, offset, compiled, monkeypatch):
    view = "gl.constexpr(p.shifts[i])", f"gl.constexpr(p.shifts[i] + {offset} * (i == 1))"
    monkeypatch.setattr(probe, "launch", lambda *tensors: emulate(*tensors, change=view))
    of_one_shift = 2 * 64 * 64  # no two pixels have a channel in common
    assert probe.fault(CPU, size).startswith(f"{of_one_shift} of {4 * of_one_shift} products were wrong")


def test_products_that_were_not_written_are_wrong(compiled, monkeypatch):
    monkeypatch.setattr(probe, "launch", lambda *tensors: None)
    assert "32768 of 32768 products were wrong" in probe.fault(CPU, 2)


def test_what_does_not_compile_is_a_fault(compiled, monkeypatch):
    def fail(*_):
        raise ValueError("at 22:4:\n" + "a line of source\n" * 20 + "no such layout")

    monkeypatch.setattr(probe, "compile", fail)
    told = probe.fault(CPU, 2)
    assert "does not compile: ValueError: " in told
    assert told.endswith("a line of source no such layout")


def test_what_fails_at_the_launch_is_raised_and_asked_again(compiled, monkeypatch):
    """Too little memory, say, or what an earlier kernel has done."""

    def fail(*_):
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    monkeypatch.setattr(probe, "launch", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        probe.fault(CPU, 2)
    monkeypatch.setattr(probe, "launch", emulate)
    assert probe.fault(CPU, 2) == ""


def test_it_is_found_out_once_and_never_while_a_graph_is_captured(compiled, monkeypatch):
    """What is known holds in a capture, too."""
    capturing, launched = True, []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(probe, "launch", lambda *_: launched.append(1))
    assert probe.fault(CPU, 2) is None
    assert not launched
    capturing = False
    found = probe.fault(CPU, 2)
    assert "were wrong" in found
    capturing = True
    assert probe.fault(CPU, 2) == found
    assert len(launched) == 1


def test_a_mode_does_not_see_it(compiled, monkeypatch):
    monkeypatch.setattr(probe, "launch", lambda *_: pytest.fail("fake tensors were launched on"))
    with FakeTensorMode():
        assert probe.fault(CPU, 2) is None
    assert not probe._found


@pytest.mark.parametrize(
    ("change", "family", "size"),
    (({}, "shift", 2), ({"dtype": torch.float32}, "shift", 4), ({"geometry": K2S2}, "blocks", 2)),
    ids=("shift", "TF32", "blocks"),
)
def test_a_fault_leaves_the_kernels_of_every_gpu(change, family, size, monkeypatch):
    """Asked is for the elements at hand, before a Hopper kernel runs; explain() has the fault from the plan's reason."""
    problem, asked = replace(PROBLEM, **change), []
    monkeypatch.setattr(probe, "fault", lambda *facts: asked.append(facts) or "")
    device = torch.device("cuda", 0)
    assert dispatch.decide(problem, HOPPER, device).family == family
    assert asked == [(device, size)]
    monkeypatch.setattr(probe, "fault", lambda *_: "3 products were wrong")
    plan = dispatch.decide(problem, HOPPER, device)
    assert plan.family == "gemm"
    assert plan.lasting
    assert "3 products were wrong" in plan.reason
    monkeypatch.setattr(probe, "fault", lambda *_: None)
    plan = dispatch.decide(problem, HOPPER, device)
    assert plan.family == family
    assert not plan.lasting


@pytest.mark.parametrize(
    ("problem", "target"),
    (
        (PROBLEM, replace(HOPPER, arch=80)),
        (PROBLEM, replace(HOPPER, arch=100)),
        (PROBLEM, replace(HOPPER, triton=(4, 1))),
        (PROBLEM, replace(HOPPER, without=("shift", "blocks"))),
        (replace(PROBLEM, direction="backward_input"), HOPPER),
        (replace(PROBLEM, c_in=2, c_out=2), HOPPER),
    ),
    ids=("sm_80", "sm_100", "another Triton", "left out", "a gradient", "few channels"),
)
def test_who_is_not_probed(problem, target, monkeypatch):
    monkeypatch.setattr(probe, "fault", lambda *_: pytest.fail("was probed"))
    dispatch.decide(problem, target, torch.device("cuda", 0))


def test_the_users_sync_debug_mode_is_left_alone(compiled, monkeypatch):
    modes = [2]
    of_torch = SimpleNamespace(
        is_available=lambda: True,
        is_current_stream_capturing=lambda: False,
        get_sync_debug_mode=lambda: modes[-1],
        set_sync_debug_mode=modes.append,
    )
    monkeypatch.setattr(torch, "cuda", of_torch)
    monkeypatch.setattr(probe, "launch", lambda *tensors: (emulate(*tensors), modes.append("launched")))
    assert probe.fault(CPU, 2) == ""
    assert modes == [2, 0, "launched", 2]


@pytest.mark.skipif(not GPU, reason="needs a Hopper GPU")
@SIZES
def test_a_gpu_passes(size):
    with torch.cuda.device(0):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert probe.fault(torch.device("cuda", 0), size) == ""
        finally:
            torch.cuda.set_sync_debug_mode(before)


@pytest.mark.skipif(not GPU, reason="needs a Hopper GPU")
@SIZES
def test_a_gpu_shows_what_is_wrong(size, monkeypatch):
    """A weight that moves one channel: the comparison, not the kernel."""
    sample = probe.sample
    monkeypatch.setattr(probe, "sample", lambda *facts: (lambda x, w, y: (x, w.roll(1, 0), y))(*sample(*facts)))
    assert "32768 of 32768 products were wrong" in probe.fault(torch.device("cuda", 0), size)


@pytest.mark.skipif(not GPU, reason="needs a Hopper GPU")
def test_the_first_call_may_be_one_that_a_graph_captures(monkeypatch):
    x, w = torch.randn(4, 64, 32, 32, device="cuda"), torch.randn(64, 64, 4, 4, device="cuda")
    layer = dict(stride=2, padding=1)
    expected = tconv.conv_transpose2d(x, w, **layer)  # compiles
    assert tconv.explain(x, w, **layer).passes[0].plan.family == "shift"
    probe._found.clear()
    record.forget()
    launched, launch = [], probe.launch
    monkeypatch.setattr(probe, "launch", lambda *tensors: (launched.append(1), launch(*tensors)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = tconv.conv_transpose2d(x, w, **layer)
    assert not launched
    graph.replay()
    assert torch.equal(y, expected)
    assert torch.equal(tconv.conv_transpose2d(x, w, **layer), expected)
    assert launched


def test_what_does_not_last_is_not_recorded(monkeypatch):
    made = record.Record(torch.empty(1))
    made.result((1,), torch.empty(1), torch.contiguous_format)
    monkeypatch.setattr(record, "keep", lambda *_: pytest.fail("was recorded"))
    made.keep(None)
