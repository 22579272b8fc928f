"""The benchmark's arithmetic, its command line and its processes; what it measures is for a GPU to say."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tconv.bench import __main__ as cli
from tconv.bench import cases, check, compare, measure, providers, report, run
from tconv.bench.prepare import distinct
from tconv.bench.store import Settings, Store
from tconv.bench.task import COLUMNS, Task, base_row
from tconv.bench.terminal import Plain, Refused, Rich
from tconv.workloads import layers

LAYER = "convtranspose2d 4 6 k3 s2 p1 op1 g2 @ 2x4x3x5"


# What is counted


def brute_force(layer):
    """Pairs of input and tap whose output exists, one by one."""
    g = layer.geometry
    count = 1
    for axis, size, out in zip(g.axes, layer.input_shape[2:], layer.output_shape[2:]):
        pairs = itertools.product(range(size), range(axis.kernel))
        count *= sum(0 <= i * axis.stride - axis.padding + axis.dilation * k < out for i, k in pairs)
    return 2 * layer.input_shape[0] * layer.in_channels * (layer.out_channels // g.groups) * count


@pytest.mark.parametrize(
    "text",
    (
        LAYER,
        "convtranspose1d 4 4 k5 @ 1x4x3",
        "convtranspose1d 2 2 k3 s5 p1 d2 @ 1x2x4",  # phases without a tap
        "convtranspose1d 2 3 k4 s2 p6 op1 @ 3x2x9",  # padding that swallows whole taps
        "convtranspose1d 2 3 k2 s7 op5 @ 3x2x1",
        "convtranspose3d 2 2 k3x1x2 s2x1x3 p1x0x0 @ 1x2x3x2x4",
    ),
)
def test_flops_and_bytes(text):
    layer = cases.parse_layer(text)
    case = cases.Case("layer", layer.name, (layer,))
    assert case.flops("forward") == case.flops("backward_weight") == brute_force(layer)
    assert case.flops("training") == 3 * brute_force(layer)
    tensors = [torch.empty(s).numel() for s in (layer.input_shape, layer.weight_shape, layer.output_shape)]
    assert case.bytes("backward_input", 2) == 2 * sum(tensors)
    assert case.bytes("training", 4) == 3 * 4 * sum(tensors)


def test_flops_of_shipped_layers():
    for layer in (*layers("kernelbench"), *layers("zoo")):
        small = cases.shrink(layer)
        assert cases._flops(small) == brute_force(small), layer
        assert cases.classes(small)[0] == cases.classes(layer)[0]
        assert small.geometry.kernel == layer.geometry.kernel and min(small.output_shape) >= 1


def test_roofs():
    roofs = {"copy_gbps": 4000.0, "matmul_tflops": {"tf32": 400.0, "fp32": 50.0, "fp16": 800.0, "bf16": 800.0}}
    assert measure.roof_ms(8e12, 0, "bf16", roofs) == pytest.approx(10)
    assert measure.roof_ms(0, 4e9, "tf32", roofs) == pytest.approx(1)
    assert measure.roof_ms(4e12, 0, "fp32", roofs) == pytest.approx(30)  # three TF32 products
    assert measure.reach_ms(0, 1000, "tf32", roofs) is None
    copies = roofs | {"copy_ms": {"1000": 0.002, "4000": 0.004, "400000000": 0.25}}
    expected = ((10, 0.002), (1000, 0.002), (2500, 0.003), (4000, 0.004), (1600000000, 1.0))
    for nbytes, ms in expected:
        assert measure.reach_ms(0, nbytes, "tf32", copies) == pytest.approx(ms)
    assert measure.reach_ms(8e12, 1000, "bf16", copies) == pytest.approx(10)  # the roof, where it is more


def test_the_commit_that_is_told_goes_before_the_checkouts(monkeypatch):
    monkeypatch.setenv("TCONV_COMMIT", "told")
    assert measure.head(False)["commit"] == "told"


# Cases


@pytest.mark.parametrize(
    "text, expected",
    (
        ("convtranspose2d 8 8 k4 s2 p1 @ 1x8x4x4", ("kernel = 2 x stride", "few output channels", "2-d")),
        ("convtranspose2d 8 16 k2 s2 @ 1x8x4x4", ("kernel = stride", "2-d")),
        ("convtranspose2d 8 16 k1 @ 1x8x4x4", ("stride 1", "2-d")),
        ("convtranspose1d 8 16 k3 s2 @ 1x8x4", ("other strided", "1-d")),
        ("convtranspose1d 16 16 k4 s2 g16 @ 1x16x4", ("kernel = 2 x stride", "depthwise", "1-d")),
        ("convtranspose1d 16 32 k4 s2 g4 @ 1x16x4", ("kernel = 2 x stride", "grouped", "1-d")),
        ("convtranspose3d 8 16 k1x2x2 s1x2x2 @ 1x8x2x4x4", ("kernel = stride", "3-d")),
        ("convtranspose2d 8 16 k8x1 s4x1 @ 1x8x2x4", ("kernel = 2 x stride", "2-d")),
        ("convtranspose2d 8 16 k4 s2 d2 @ 1x8x2x4", ("other strided", "2-d")),
        ("convtranspose2d 8 16 k3x4 s1x2 @ 1x8x2x4", ("other strided", "2-d")),
    ),
)
def test_classes(text, expected):
    assert cases.classes(cases.parse_layer(text)) == expected


def test_shrunken_layers_keep_their_classes():
    for name in ("kernelbench", "zoo"):
        for case in cases.suite(name):
            small = cases.shrink(case.layer)
            assert set(cases.classes(small)) == set(cases.classes(case.layer)), case.name


def test_core_spans_the_classes():
    core = cases.suite("core")
    assert 35 <= len(core) <= 45
    assert {c for case in core for c in cases.classes(case.layer)} == set(cases.CLASSES)


def test_descriptions_are_read_back():
    for layer in (*layers("kernelbench"), *layers("zoo")):
        read = cases.parse_layer(cases.describe(layer))
        assert (read.geometry, read.input_shape, read.in_channels, read.out_channels, read.bias) == (
            layer.geometry,
            layer.input_shape,
            layer.in_channels,
            layer.out_channels,
            layer.bias,
        )


@pytest.mark.parametrize(
    "text, message",
    (
        ("", "starts with none of"),
        ("conv2d 4 4 k3 @ 1x4x4x4", "starts with none of convtranspose1d, convtranspose2d, convtranspose3d"),
        ("convtranspose2d 4 4 k3", "size after @ is missing"),
        ("convtranspose2d 4 4 k3 @ big", "expected an input size such as 16x16x16x16 after @, got 'big'"),
        ("convtranspose2d 4 4 k3 @ 1x4x4", "expected 4 input sizes"),
        ("convtranspose2d 4 k3 @ 1x4x4x4", "numbers of input and output channels"),
        ("convtranspose2d 4 4 @ 1x4x4x4", r"the kernel \(k\) is missing"),
        ("convtranspose2d 4 4 k3 q2 @ 1x4x4x4", "'q2' is none of k, s, p, op, d, g"),
        ("convtranspose2d 4 4 k3 s2 s2 @ 1x4x4x4", "s is given twice"),
        ("convtranspose2d 4 4 k3x3x3 @ 1x4x4x4", "'k3x3x3' has 3 numbers, expected 1 or 2"),
        ("convtranspose2d 4 4 k3 @ 1x8x4x4", "the input has 8 channels, the layer takes 4"),
        ("convtranspose2d 4 4 k3 g3 @ 1x4x4x4", "groups 3 does not divide 4 output channels"),
        ("convtranspose2d 4 6 k3 g3 @ 1x4x4x4", "divisible by groups=3"),
        ("convtranspose2d 4 4 k3 s2 op2 @ 1x4x4x4", "output_padding to be smaller"),
        ("convtranspose2d 4 4 k3 p9 @ 1x4x4x4", "padding is too large"),
        ("convtranspose2d 4 4 k2 p1 @ 1x4x1x1", "output has size 1x4x0x0"),
    ),
)
def test_bad_descriptions(text, message):
    with pytest.raises(ValueError, match=f"bad layer description.*{message}.*an example is"):
        cases.parse_layer(text)


def test_every_problem_is_written():
    """All of KernelBench's problems with trailing operations build, and run on meta tensors."""
    from tconv.bench import problems

    found = cases.suite("kernelbench-problems")
    assert len(found) == 31
    for case in found:
        with torch.device("meta"):
            module = problems.build(case)
            output = module(*(torch.empty(s) for s in problems.input_shapes(case)))
        assert output.shape[0] == case.layer.input_shape[0]


# Right and wrong


def test_judge():
    exact = torch.randn(1000, dtype=torch.float64)
    good = exact.float()
    peer = check.errors(good, exact)
    assert check.judge(good, exact, peer, "fp32")[1] == ""
    assert "allowed" in check.judge(good + 1e-5, exact, peer, "fp32")[1]
    assert check.judge(good + 1e-5, exact, None, "fp32")[1] == ""  # torch's own is bounded by CEILING alone
    assert "rms error" in check.judge(good * 1.1, exact, None, "fp32")[1]
    assert "rms error" in check.judge(good + 2e-4, exact, None, "fp32")[1]
    assert check.judge(good + 2e-4, exact, None, "fp32", terms=1 << 24)[1] == ""  # one by one, 2^24 products' roundings
    assert "NaN" in check.judge(torch.full_like(good, math.nan), exact, peer, "fp32")[1]
    assert "shape" in check.judge(good[1:], exact, peer, "fp32")[1]
    # A peer in full fp32 is no yardstick for TF32: the exact products of rounded operands are right too.
    rounded = check.round_tf32(good)
    assert "allowed" in check.judge(rounded, exact, peer, "tf32")[1]
    assert check.judge(rounded, exact, peer, "tf32", lambda: rounded.double())[1] == ""
    # A whole problem may enlarge what rounding makes; a layer does not.
    far, as_far = (exact + 0.2 * torch.randn(1000) for _ in range(2))
    assert "rms error" in check.judge(far, exact, None, "tf32", lambda: as_far)[1]
    assert "rms error" in check.judge(far, exact, None, "tf32", lambda: exact, slack=20.0)[1]
    assert check.judge(far, exact, None, "tf32", lambda: as_far, slack=20.0)[1] == ""
    assert "rms error" in check.judge(exact * 0, exact, None, "tf32", lambda: as_far, slack=20.0)[1]
    assert "NaN" in check.judge(far * math.nan, exact, None, "tf32", lambda: as_far, slack=20.0)[1]


@pytest.mark.parametrize(
    "name, left, precision, right",
    [
        ("backward_weight", True, "tf32", True),
        ("backward_weight", False, "tf32", False),
        ("backward_input", True, "tf32", False),
        ("backward_weight", True, "fp32", False),
    ],
)
def test_whose_error_bounds_what_is_left_to_torch(name, left, precision, right):
    """Of a weight's gradient at TF32 that tconv leaves to torch as it lies, torch's own on the same tensors; else of contiguous ones."""
    exact = torch.randn(64, 64, dtype=torch.float64)
    result = (exact * (1 + 7e-4)).float()
    layer = cases.parse_layer("convtranspose2d 8 8 k3 @ 2x8x6x6")
    work = Task.__new__(Task)
    work.precision, work.slack = precision, 1.0
    work.case = SimpleNamespace(problem="", layer=layer)
    work.truth = SimpleNamespace(result=lambda name, precision="": exact)
    work.peer = lambda name: (1e-3, 3e-4)
    work.own_peer = lambda name, provider: (5e-3, 8e-4)
    error, wrong = work.judge(providers.find("tconv"), name, result, left)
    assert (wrong == "") == right and error[1] == pytest.approx(7e-4, rel=1e-3)


@pytest.mark.parametrize("lead", ((2,), (0,), ()), ids=("batched", "no batch", "unbatched"))
@pytest.mark.parametrize("n", (1, 2, 3))
def test_rounded_oracle(n, lead):
    """On values that TF32 holds, rounding changes nothing, and the bias gradient is a sum of unrounded values."""
    layer = {"stride": (2,) * n, "padding": (0,) * n, "dilation": (1,) * n, "output_padding": (0,) * n, "groups": 1}
    shapes = (*lead, 4, *(3,) * n), (4, 5, *(2,) * n), (5,), (*lead, 5, *(6,) * n)
    tensors = check.draw(shapes, "half", "cpu")
    exact, rounded = (check.oracle(n, *tensors, tf32=tf32, **layer) for tf32 in (False, True))
    for one, other in zip(exact, rounded, strict=True):
        torch.testing.assert_close(one, other)
    fine = torch.randn(shapes[3])
    rounded = check.oracle(n, *tensors[:3], fine, tf32=True, **layer)
    torch.testing.assert_close(rounded[3], check.oracle(n, *tensors[:3], fine, **layer)[3])
    if lead:
        for name, one in zip(check.RESULTS, check.oracle(n, *tensors[:3], fine, **layer)):
            torch.testing.assert_close(check.oracle_pass(name, (*tensors[:3], fine), layer), one)


class Moment:
    """A CUDA event at a time in ms."""

    def __init__(self, at):
        self.at = at

    def elapsed_time(self, other):
        return other.at - self.at


def test_calls_with_a_late_host_do_not_count():
    events = [(Moment(0.0), Moment(ms)) for ms in (1.0, 9.0, 1.5, 2.0, 9.0)]
    run = measure.Run("tconv", lambda: None, host=[1e-4] * 5, events=events, late=[False, True, False, False, True])
    told = measure.statistics_of(run)
    assert (told["ms"], told["rounds"]) == (1.5, 3) and told["host_us"] == pytest.approx(100)
    run.late = [True, True, True, False, False]
    told = measure.statistics_of(run)
    assert (told["ms"], told["rounds"]) == (2.0, 5)


# Summaries


def row(case="a", provider="tconv", ms=1.0, **more):
    made = dict.fromkeys(COLUMNS)
    made.update(suite="s", case=case, precision="tf32", memory_format="contiguous", provider=provider, ms=ms)
    made.update(ms_spread=0.01 * ms if ms else None, rival=provider != "tconv", graph=False, status="ok", note="")
    made.update(tflops=1.0, gbps=1.0, roof_share=0.5, host_us=1.0, classes=["2-d", "stride 1"], flops=8, bytes=4)
    made["pass"] = "forward"
    return made | more


def test_speedups_and_summary():
    rows = [row("a", ms=1.0), row("a", "cudnn", 2.0), row("a", "cudnn-default", 3.0)]
    rows += [row("b", ms=2.0, family="shift"), row("b", "cudnn", 1.0), row("b", "cudnn-nhwc", 0.1, rival=False)]
    rows += [row("c", ms=1.0, family="shift,aten,gemm"), row("c", "cudnn", 8.0), row("c", "mine", 4.0, status="wrong")]
    rows += [row("d", ms=None, status="wrong", note="NaN"), row("d", "cudnn", 1.0)]
    rows += [row("a", "tconv-graph", 0.5, rival=False, graph=True), row("a", "cudnn-graph", 0.25, graph=True)]
    found = report.speedups(rows)
    assert [s.ratio for s in found] == [2.0, 0.5, 8.0]
    slow_host = report.speedups([row("a", ms=1.0, host_us=4000.0), row("a", "cudnn", 2.0, host_us=500.0)])
    assert [(s.ratio, s.eager) for s in slow_host] == [(2.0, 0.5)]
    assert report.summarise("", slow_host).cells()[2:5] == ["2.00x", "0.50x", "50%"]
    reached = report.speedups([row("a", ms=1.0, reach_ms=0.75), row("a", "cudnn", 2.0)])
    assert report.summarise("", reached).cells()[4:6] == ["50%", "75%"]
    for some, columns in ((reached, 9), (slow_host, 8)):  # what nothing fills is left out
        assert {len(line) for line in report._summaries("", report.by_class(some))[2]} == {columns}
    summary = report.summarise("all", found)
    assert summary.count == 3 and summary.losses == summary.left == 1
    assert summary.geomean == pytest.approx(2.0)
    assert summary.worst.row["case"] == "b" and summary.worst.rival["provider"] == "cudnn"
    assert [s.ratio for s in report.speedups(rows, "tconv-graph")] == [0.5]
    assert [line.label for line in report.by_class(found)] == ["stride 1", "2-d", "all"]
    assert [line.label for line in report.by_axis(found)] == ["s tf32 contiguous forward"]
    assert [line.label for line in report.by_axis(found, suites=False)] == ["tf32 contiguous forward"]
    assert report.failures(rows) == [
        ["c forward tf32 contiguous", "mine", "wrong", ""],
        ["d forward tf32 contiguous", "tconv", "wrong", "NaN"],
    ]
    text = report.markdown({"head": {"device": "none"}, "rows": rows})
    assert "| b forward tf32 | shift | 2.0000 |" in text and "0.50x b forward tf32 (to cudnn)" in text
    assert "slower than the best other provider, beyond the noise, in **1 of 3** cases, and leaves 1 to aten" in text
    assert math.isnan(report.geomean([]))


@pytest.mark.parametrize(
    "ms, spread, lost", [(1.02, 0.0, False), (1.04, 0.0, True), (1.04, 0.05, False), (0.5, 0.0, False)]
)
def test_a_loss_is_one_beyond_the_noise(ms, spread, lost):
    rows = [row("a", ms=ms, ms_spread=spread), row("a", "cudnn", 1.0, ms_spread=0.0)]
    assert report.summarise("", report.speedups(rows)).losses == lost


def test_charts(tmp_path):
    pytest.importorskip("matplotlib")
    from tconv.bench import plots

    roofs = {"copy_gbps": 4000.0, "matmul_tflops": {"tf32": 400.0, "fp32": 50.0, "fp16": 800.0, "bf16": 800.0}}
    rows = [row("a"), row("a", "cudnn", 2.0), row("b", precision="fp32"), row("b", "cudnn", 0.5, precision="fp32")]
    drawn = plots.draw({"head": {"device": "none", "roofs": roofs}, "rows": rows}, str(tmp_path))
    assert [p.name for p in drawn] == ["speedup.svg", "roofline.svg"]
    assert all("</svg>" in p.read_text() for p in drawn)
    with pytest.raises(Refused, match="nothing to draw"):
        plots.draw({"head": {}, "rows": []}, str(tmp_path))


def test_results_merge():
    new = {"head": {"commit": "b"}, "rows": [row(ms=1.0), row(provider="cudnn", ms=2.0)]}
    old = {
        "head": {"commit": "a"},
        "rows": [row(ms=4.0), row(provider="compile", ms=0.1), row(ms=8.0, **{"pass": "x"})],
    }
    merged = report.merge([new, old])
    assert [(r["provider"], r["pass"], r["ms"]) for r in merged["rows"]][2:] == [("tconv", "x", 8.0)]
    assert [h["commit"] for h in report.heads(merged)] == ["b", "a"]
    assert report.heads(new) == [new["head"]]


def test_a_summary_tells_each_device_and_its_versions_once():
    """And what was run there, each commit and day once."""
    of = dict(device="H200", triton="3.9.0", cudnn=91900)
    heads = [
        of | {"commit": "a", "date": "2026-11-29T10:00:00"},
        of | {"commit": "b", "date": "2026-11-30T10:00:00"},
        of | {"commit": "a", "date": "2026-11-29T11:00:00"},
        of | {"triton": "3.6.0"},
    ]
    assert report.describe_versions(heads) == [
        "H200, triton 3.9.0, cudnn 91900, commit a (2026-11-29), commit b (2026-11-30)",
        "H200, triton 3.6.0, cudnn 91900",
    ]


def test_a_case_that_one_result_lost_and_another_has_is_not_lost():
    lost = row("a", "", ms=None, status="timeout", **{"pass": ""})
    one, other = (
        {"head": {}, "rows": [lost, row("b"), row("c"), lost | {"case": "c"}]},
        {"head": {}, "rows": [row("a")]},
    )
    for results in ((one, other), (other, one)):
        merged = report.merge(list(results))["rows"]
        assert sorted((r["case"], r["status"]) for r in merged) == [
            ("a", "ok"),
            ("b", "ok"),
            ("c", "ok"),
            ("c", "timeout"),
        ]


def test_failures_in_short():
    bad = [
        row(c, p, status=s, ms=None)
        for c, p, s in (("a", "tconv", "wrong"), ("b", "tconv", "wrong"), ("c", "", "timeout"))
    ]
    bad.append(row("a", status="wrong", ms=None, **{"pass": "training"}))
    found = report.sections({"head": {}, "rows": [row("d"), row("d", "cudnn"), *bad]}, summary=True)
    tables = {title: lines for title, _, lines in found}
    assert tables["Not timed"] == [["a, b", "tconv", "wrong", "3"], ["c", "", "timeout", "1"]]


def test_report_into_a_page(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    roofs = {"copy_gbps": 4000.0, "matmul_tflops": {"tf32": 400.0}}
    rows = [r for case in map(str, range(report.LONG + 1)) for r in (row(case), row(case, "cudnn", 0.5))]
    (tmp_path / "r.json").write_text(json.dumps({"head": {"device": "none", "roofs": roofs}, "rows": rows}))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    argv = "report", "r.json", "--into", "docs/page.md"
    for more in (("--plots", "docs/figures"), ("--summary",)):
        code, printed = out_of(capsys, *argv, *more)
        assert code == 0 and "written: " in printed and "docs/page.md" in printed
        text = page.read_text()
        assert text.startswith(f"before\n{report.BEGIN}\n\nnone") and text.endswith(f"\n\n{report.END}\nafter\n")
        assert "old" not in text and text.count("| 31 | 0.50x | 0.50x | 50% | 31 |") == 4
        assert ("(figures/speedup.svg)" in text) == ("<details>" in text) == ("--plots" in more)
    for broken in ("no markers", report.BEGIN, f"{report.END} {report.BEGIN}", 2 * f"{report.BEGIN} {report.END}"):
        page.write_text(broken)
        code, printed = out_of(capsys, *argv)
        assert code == 2 and f"docs/page.md must hold the line {report.BEGIN}" in printed and page.read_text() == broken
    code, printed = out_of(capsys, "report", "r.json", "--into", "missing.md")
    assert code == 2 and "cannot read missing.md" in printed


def test_pages_have_their_markers():
    """And README stays short, tables and all."""
    root = Path(__file__).parent.parent
    for name in ("README.md", "docs/benchmarks.md"):
        text = (root / name).read_text()
        assert text.count(report.BEGIN) == text.count(report.END) == 1
    assert (root / "README.md").read_text().count("\n") < 150


def test_compare_calls_only_what_is_beyond_the_noise():
    def moved(before, after):
        (change,) = compare.changes({"rows": [before], "head": {}}, {"rows": [after], "head": {}})
        return change.moved

    assert not moved(row(ms=1.0), row(ms=1.025))  # below the floor
    assert moved(row(ms=1.0), row(ms=1.04)) and moved(row(ms=1.0), row(ms=0.95))
    assert not moved(row(ms=1.0, ms_spread=0.1), row(ms=1.15, ms_spread=0.1))  # within the spreads
    assert moved(row(ms=1.0, ms_spread=0.1), row(ms=1.25, ms_spread=0.1))
    old = {"rows": [row("a"), row("b"), row("a", "cudnn", 2.0)], "head": {"device": "A"}}
    new = {"rows": [row("a"), row("b", status="wrong", note="NaN"), row("a", "cudnn", 2.2)], "head": {"device": "B"}}
    assert compare.statuses(old, new) == [["b forward tf32 contiguous", "tconv", "ok -> wrong", "NaN"]]
    assert len(compare.changes(old, new)) == 2
    notes = compare.remarks(old, new)
    assert notes[0] == "device differs: A and B" and "0.909x" in notes[1]
    runs = [{"rows": [], "head": {"commit": c}, "settings": {"budget": b}} for c, b in (("a", 0.15), ("b", 0.05))]
    assert compare.remarks(*runs) == ["commit differs: a and b", "budget differs: 0.15 and 0.05"]
    moved = compare.changes({"rows": [row("a", family="gemm")]}, {"rows": [row("a", ms=0.5, family="shift")]})
    assert moved[0].cells() == [
        "a forward tf32 contiguous",
        "tconv",
        "gemm -> shift",
        "1.0000",
        "0.5000",
        "0.0150",
        "2.00x faster",
    ]


def test_compare_knows_models():
    def result(ms):
        step = {"mode": "training", "ms": {"torch": 4.0, "tconv": ms}, "ms_spread": {"torch": 0.0, "tconv": 0.0}}
        return {
            "head": {},
            "rows": [],
            "models": [{"spec": "m:f", "precision": "tf32", "memory_format": "contiguous", "rows": [step]}],
        }

    found = [c for c in compare.changes(result(2.0), result(1.0)) if c.moved]
    assert [c.cells()[0] for c in found] == ["m:f training tf32 contiguous"]
    assert found[0].ratio == 2.0


# The command line


def out_of(capsys, *argv):
    code = cli.main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "_has_gpu", lambda: False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_list(capsys):
    code, text = out_of(capsys, "list", "--suite", "zoo", "--match", "DCGAN", "--plain")
    assert code == 0 and "DCGAN/g4" in text and "few output channels" in text and "5 cases" in text
    code, text = out_of(capsys, "list", "--suite", "core", "--match", "depthwise", "--plain")
    assert code == 0 and "MedNeXt-L-k5/up_dw32" in text and "DCGAN" not in text


@pytest.mark.parametrize(
    "argv, message",
    (
        (["--suite", "zo"], "unknown suite 'zo', expected one of core, kernelbench, kernelbench-problems, zoo"),
        (["--provider", "cudn"], "unknown provider 'cudn', expected one of tconv, tconv-portable, cudnn,"),
        (["--provider", "nowhere:f"], "provider 'nowhere:f' cannot be imported: ModuleNotFoundError"),
        (["--layer", "convtranspose2d"], "bad layer description"),
        (["--match", "("], "is not a regular expression"),
        (["--match", "no such case"], "no case is left"),
        (["list", "--match", "no such case"], "no case matches 'no such case'"),
        (["--model", "models:alone", "--suite", "zoo"], "--suite is about cases; a model has"),
        (["--model", "models:alone", "--pass", "forward"], "--pass is about cases; a model has"),
        (["report", "odd.json"], "odd.json is not a result of tconv.bench: a row has only case"),
        (["report", "empty.json", "--markdown", "nowhere/x.md"], "No such file or directory: 'nowhere/x.md'"),
        (["--resume"], "there is nothing to resume"),
        (["--output", "nowhere/x.json"], "cannot write nowhere/x.json.partial"),
        (["--model", "model"], "expected --model package.module:factory, got 'model'"),
        (["--model", "no_such_module:f"], "cannot import no_such_module"),
        (["--model", "broken:f"], "importing broken raised ZeroDivisionError: division by zero"),
        (["--model", "models:nothing"], "models has no nothing"),
        (["--model", "models:raises"], "raises() raised RuntimeError: no weights"),
        (["--model", "models:alone"], "expected alone() to return (model, example inputs), got Linear"),
        (["report", "missing.json"], "cannot read missing.json"),
        (["report", "models.py"], "models.py is not a result of tconv.bench"),
    ),
)
def test_errors_are_clear(argv, message, capsys, no_gpu):
    (no_gpu / "broken.py").write_text("1 / 0")
    (no_gpu / "odd.json").write_text('{"head": {}, "rows": [{"case": "a"}]}')
    (no_gpu / "empty.json").write_text('{"head": {}, "rows": []}')
    (no_gpu / "models.py").write_text(
        "import torch\ndef raises():\n    raise RuntimeError('no weights')\ndef alone():\n    return torch.nn.Linear(1, 1)\n"
    )
    sys.modules.pop("models", None)
    code, text = out_of(capsys, *argv)
    assert code == 2 and message in text.replace("\n", " ")


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs the interpreter, which a machine with a GPU may lack NumPy for"
)
def test_without_a_gpu_it_checks_and_says_so(capsys, no_gpu):
    argv = ["--layer", LAYER, "--pass", "forward", "backward_weight", "--precision", "fp32", "--format", "contiguous"]
    code, text = out_of(capsys, *argv, "--output", "r.json", "--plain")
    assert code == 0 and "nothing was measured" in text
    result = json.loads((no_gpu / "r.json").read_text())
    assert [(r["pass"], r["status"], r["ms"]) for r in result["rows"]] == [
        ("forward", "checked", None),
        ("backward_weight", "checked", None),
    ]
    assert set(result["rows"][0]) == set(COLUMNS)
    assert {"device", "driver", "torch", "triton", "cudnn", "commit", "date", "clocks"} <= set(result["head"])
    assert (
        (no_gpu / "r.csv").read_text().startswith("suite,case,pass,dtype,precision,memory_format,provider,ms,ms_spread")
    )
    assert not (no_gpu / "r.json.partial").exists()


def test_model_without_a_gpu(capsys, no_gpu):
    (no_gpu / "upsampler.py").write_text(
        "import torch\ndef make():\n"
        "    return torch.nn.Sequential(torch.nn.ConvTranspose2d(3, 2, 2, stride=2)), torch.randn(1, 3, 4, 4)\n"
    )
    code, text = out_of(capsys, "--model", "upsampler:make")
    assert code == 0 and "0: conv_transpose2d 3 to 2 k2 s2, input 1x3x4x4" in text and "nothing was measured" in text
    assert "converted 1" in text


def test_models_without_a_gpu_are_explained_or_refused(capsys, no_gpu):
    (no_gpu / "explained.py").write_text(
        "import torch\n"
        "class Own(torch.nn.ConvTranspose2d):\n    def forward(self, image):\n        return super().forward(image)\n"
        "def keywords():\n    return Own(3, 2, 2), {'image': torch.randn(1, 3, 4, 4)}\n"
        "def misfit():\n    return Own(3, 2, 2), torch.randn(1, 5, 4, 4)\n"
    )
    code, text = out_of(capsys, "--model", "explained:keywords")
    assert code == 0 and "(the model itself): conv_transpose2d 3 to 2 k2" in text and "subclass" in text
    assert cli.main(["--model", "explained:misfit"]) == 2
    assert "--model explained:misfit: its inputs do not fit it: RuntimeError" in capsys.readouterr().err


# Processes

FAKE = """
import os, time, torch
def fake(work):
    if work.layer.in_channels == 3:
        os.abort()
    if work.layer.in_channels == 5:
        time.sleep(100)
    if work.layer.in_channels == 2:
        raise RuntimeError("not today")
    scale = 2 if work.layer.in_channels == 1 else 1
    return lambda: scale * torch.conv_transpose1d(work.input, work.weight, work.bias, **work.layer.options)
"""


def test_a_crash_costs_its_case_alone(capsys, no_gpu):
    (no_gpu / "fake_provider.py").write_text(FAKE)
    argv = [a for c in (4, 3, 5, 2, 1) for a in ("--layer", f"convtranspose1d {c} 4 k2 @ 1x{c}x3")]
    argv += ["--provider", "fake_provider:fake", "--pass", "forward", "--precision", "fp32", "--timeout", "5"]
    code, text = out_of(capsys, *argv, "--output", "r.json", "--plain")
    rows = {r["case"].split()[1]: r for r in json.loads((no_gpu / "r.json").read_text())["rows"]}
    assert {c: r["status"] for c, r in rows.items()} == {
        "4": "checked",
        "3": "crashed",
        "5": "timeout",
        "2": "error",
        "1": "wrong",
    }
    assert rows["3"]["note"].startswith("signal 6") and rows["3"]["note"].endswith(", at forward of fake_provider:fake")
    assert rows["5"]["note"] == "no result after 5 s, at forward of fake_provider:fake"
    assert rows["2"]["note"] == "RuntimeError: not today" and rows["1"]["note"].startswith("forward: rms error")
    assert rows["1"]["ms"] is None
    assert code == 1 and "CRASHED" not in text and "crashed" in text and "WRONG" in text


STUB = """
import json, os, sys, time
request = json.load(sys.stdin)
print(json.dumps({"head": {"device": "none"}}), flush=True)
if request["precision"] == "tf32":
    os.abort()
if request["precision"] == "fp32":
    time.sleep(100)
check = {"status": "ok", "rms_err": {"torch": 1e-3, "tconv": 1e-3}}
model = {k: request[k] for k in ("spec", "precision", "memory_format")}
print(json.dumps({"model": model | {"converted": "1 of 1", "check": check, "rows": []}}))
"""


def test_a_crash_costs_its_model_alone(capsys, no_gpu, monkeypatch):
    monkeypatch.setattr(cli, "_has_gpu", lambda: True)
    monkeypatch.setattr(run.Worker, "module", "stub")
    (no_gpu / "stub.py").write_text(STUB)
    argv = ["--model", "mine:make", "--precision", "tf32", "fp32", "bf16", "--timeout", "2", "--output", "r.json"]
    code, text = out_of(capsys, *argv, "--plain")
    crashed, late, right = json.loads((no_gpu / "r.json").read_text())["models"]
    assert crashed["check"] == {"status": "crashed", "note": "signal 6"}
    assert late["check"] == {"status": "timeout", "note": "no result after 2 s"}
    assert right["check"]["status"] == "ok"
    assert "mine:make, tf32, contiguous: CRASHED, not timed" in text and "fp32, contiguous: TIMEOUT" in text
    assert code == 1 and "bf16, contiguous: checked" in text


def test_a_worker_refuses_what_is_no_model(no_gpu):
    (no_gpu / "refused.py").write_text("def make():\n    raise RuntimeError('no weights')\n")
    request = {"mode": "model", "gpu": False, "spec": "refused:make", "precision": "tf32"}
    with pytest.raises(Refused, match=r"--model refused:make: make\(\) raised RuntimeError: no weights"):
        list(run.run_models([request | {"memory_format": "contiguous", "budget": 1.0, "most": 1}], 100))


def test_what_a_further_precision_refuses_leaves_the_first(monkeypatch, no_gpu):
    monkeypatch.setattr(run.Worker, "module", "stub")
    (no_gpu / "stub.py").write_text(
        STUB.replace(
            "    os.abort()", "    print(json.dumps({'refused': 'its fp64 step ran out of memory'})); sys.exit()"
        )
    )
    asked = [
        {"mode": "model", "gpu": False, "spec": "mine:make", "memory_format": "contiguous", "precision": p}
        for p in ("bf16", "tf32")
    ]
    right, refused = (told["model"] for told in run.run_models(asked, 100))
    assert right["check"]["status"] == "ok"
    assert refused["check"] == {"status": "refused", "note": "its fp64 step ran out of memory"}
    with pytest.raises(Refused, match="ran out of memory"):
        list(run.run_models(asked[1:], 100))


@pytest.mark.parametrize("other", (["--suite", "zoo"], ["--precision", "bf16"], ["--match", "k2"]), ids=lambda o: o[0])
def test_another_run_does_not_resume(other, capsys, no_gpu):
    """Nor does it harm what the stopped one left, which can be reported."""
    argv = ["--suite", "core", "--precision", "fp32", "--pass", "forward", "--output", "r.json", "--plain"]
    settings = cli.settings_of(cli.parser().parse_args(["run", *argv]))
    store = Store(no_gpu / "r.json", settings, False)
    task = run.tasks(settings)[0]
    row = base_row(task, cases.find(task["suite"], task["name"])) | {"pass": "forward", "provider": "tconv"}
    for message in (
        {"head": measure.head(False)},
        {"row": row | {"status": "checked", "rms_err": 1e-7}},
        {"end": task["id"]},
    ):
        store.take(message)
    store.stop()
    left = (no_gpu / "r.json.partial").read_text()
    assert cli.main([*argv, *other, "--resume"]) == 2
    assert "was begun with other options: " in capsys.readouterr().err
    assert (no_gpu / "r.json.partial").read_text() == left
    code, text = out_of(capsys, "report", "r.json.partial", "--plain")
    assert code == 0 and "stopped after 1 tasks" in text and task["name"] in text


def test_resume(capsys, no_gpu):
    (no_gpu / "fake_provider.py").write_text(FAKE)
    names = [f"convtranspose1d 4 4 k{k} @ 1x4x3" for k in (2, 3, 4)]
    argv = [a for n in names for a in ("--layer", n)]
    argv += [
        "--provider",
        "fake_provider:fake",
        "--pass",
        "forward",
        "--precision",
        "fp32",
        "--output",
        "r.json",
        "--plain",
    ]
    settings = cli.settings_of(cli.parser().parse_args(["run", *argv]))
    store = Store(no_gpu / "r.json", settings, False)
    ids = [f"layer|{n}|fp32|contiguous" for n in names]
    told = base_row(
        {"suite": "layer", "name": names[0], "precision": "fp32", "memory_format": "contiguous"},
        cases.find("layer", names[0]),
    )
    store.take({"head": measure.head(False)})
    store.take({"row": told | {"status": "checked", "rms_err": 123.0}})
    store.take({"end": ids[0]})
    store.take({"row": told | {"case": names[1], "status": "checked", "rms_err": 456.0}})  # and then it was stopped
    store.file.write('{"row": {"su')
    store.file.close()

    code, text = out_of(capsys, *argv)
    assert code == 2 and "r.json.partial is what a stopped run left: --resume" in text
    code, text = out_of(capsys, *argv, "--quick", "--resume")
    assert code == 2 and "was begun with other options: budget 0.1 (now 0.05)" in text
    code, text = out_of(capsys, *argv, "--resume")
    assert code == 0, text
    rows = json.loads((no_gpu / "r.json").read_text())["rows"]
    assert [r["case"] for r in rows] == names
    assert rows[0]["rms_err"] == 123.0 and all(r["rms_err"] < 1e-6 for r in rows[1:])
    with pytest.raises(Refused, match="is finished"):
        Store(no_gpu / "r.json", settings, True)


PREPARING = """
import json, os, subprocess, sys, time
request = json.loads(sys.stdin.readline())
mode = request.get("mode", "measure")

def say(**message):
    print(json.dumps(message), flush=True)

def log(what, about, more=None):
    with open("log", "a") as f:
        f.write(json.dumps([what, about, more]) + "\\n")

def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().split()[2] != "Z"
    except OSError:
        return False

if mode == "compile":
    os.setpgrp()
    log("process", os.getpid())
    say(ready=True)
    for line in sys.stdin:
        (task,) = json.loads(line)
        log("begin", task["id"])
        if "1d 30 4" in task["id"]:
            os.abort()
        if "1d 5 4" in task["id"]:
            compiler = subprocess.Popen(["sleep", "100"])
            log("process", compiler.pid)
            compiler.wait()
        time.sleep(0.7)
        log("prepared", task["id"])
        say(end=task["id"])
elif mode == "first":
    log("first", os.environ["TRITON_CACHE_DIR"])
else:
    processes = [about for what, about, _ in map(json.loads, open("log")) if what == "process"]
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpu == "dead":
        sys.exit(3)
    begun = not request["head"]
    if begun:
        time.sleep(0.5)
        say(head={"device": gpu})
    for line in sys.stdin:
        for task in json.loads(line):
            say(begin=task["id"])
            log("measured", task["id"], [[p for p in processes if lives(p)], gpu, begun])
            if "1d 40 4" in task["id"]:
                os.abort()
            time.sleep(0.2)
            say(end=task["id"])
"""


class Steps(Plain):
    """The steps that a run shows, each with its total and what was done at its begin and its end."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def start(self, total, done):
        self.steps.append([total, done, done])

    def at(self, what, done=None):
        self.steps[-1][2] = done


@pytest.fixture
def prepare(no_gpu, monkeypatch):
    """Runs with a stand-in for the workers; what they noted, as (what, about, more), and the steps shown."""
    monkeypatch.setattr(run.Worker, "module", "stub")
    monkeypatch.setattr(run, "WORTH", 1)
    (no_gpu / "stub.py").write_text(PREPARING)

    def go(channels, done=(), **settings):
        (no_gpu / "log").write_text("")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(no_gpu / "cache"))
        layers = [f"convtranspose1d {c} 4 k2 @ 1x{c}x3" for c in channels]
        common = dict(passes=["forward"], precisions=["tf32"], formats=["contiguous"], providers=["tconv"], gpu=True)
        settings = Settings(**(common | dict(layers=layers, timeout=3) | settings))
        store, progress = Store(no_gpu / "r.json", settings, False), Steps()
        for c in done:
            store.take({"end": f"layer|convtranspose1d {c} 4 k2 @ 1x{c}x3|tf32|contiguous"})
        run.run(settings, store, progress)
        store.stop()
        (no_gpu / "r.json.partial").unlink()
        return [json.loads(line) for line in (no_gpu / "log").read_text().splitlines()], progress.steps

    return go


def channels_of(log, what):
    return [int(about.split()[1]) for w, about, _ in log if w == what]


def test_preparation_loses_a_crash_and_a_hang_alone_and_is_over_before_the_first_timing(prepare):
    log, steps = prepare([1, 2, 4, 5, 6, 7, 30], done=[2], compilers=3, first_calls=1)
    assert sorted(channels_of(log, "begin")) == [1, 4, 5, 6, 7, 30]  # each once, and nothing that was done before
    assert sorted(channels_of(log, "prepared")) == [1, 4, 6, 7]
    assert channels_of(log, "measured") == [1, 4, 5, 6, 7, 30]
    assert all(more[0] == [] for what, _, more in log if what == "measured")
    assert steps == [[6, 0, 6], [7, 1, 7]]
    (cold,) = [cache for what, cache, _ in log if what == "first"]
    assert cold != os.environ["TRITON_CACHE_DIR"] and not Path(cold).exists()  # a folder that was made for it alone


def test_few_processes_prepare_much(prepare):
    """Two, and one in the place of the one that crashed."""
    channels = [30, 2, 4, *range(6, 19)]
    log, steps = prepare(channels, compilers=2, first_calls=0, timeout=30)
    assert sorted(channels_of(log, "prepared")) == [c for c in channels if c != 30] and steps[0] == [16, 0, 16]
    assert sum(what == "process" for what, *_ in log) == 3


COMPILING = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from tconv.bench import cases, compiler
from tconv.configs import Target
target = Target("cuda", 90, 132, tuple(map(int, triton.__version__.split(".")[:2])))
compiler.stand_in(target, compiler.Driver(GPUTarget("cuda", 90, 32), {"max_shared_mem": 232448}))
for layer, precision, memory_format in (
    ("convtranspose2d 64 64 k4 s2 p1 @ 8x64x32x32", "bf16", "channels_last"),
    ("convtranspose1d 64 64 k8 s4 p2 @ 2x64x4096", "tf32", "contiguous"),
):
    compiler.compile_layer(cases.parse_layer(layer), ["training"], precision, memory_format)
assert "torch.cuda" not in sys.modules or not sys.modules["torch.cuda"].is_initialized()
"""


def test_kernels_are_compiled_without_a_device(tmp_path):
    """Those of all passes, and what aten is left with copies of, but nothing of aten's."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILING], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = sorted(p.stem for p in tmp_path.rglob("*.cubin"))
    assert sum("shift" in name for name in compiled) == 2, compiled
    assert {"arrange", "sum_pixels", "probe"} <= set(compiled), compiled


@pytest.mark.parametrize(
    "settings", (dict(compilers=4, gpu=False), dict(compilers=1), dict(compilers=4, providers=["cudnn"]))
)
def test_nothing_is_prepared(settings, prepare):
    log, steps = prepare([1, 2], **({"first_calls": 0} | settings))
    assert [what for what, *_ in log] == ["measured"] * 2 and steps == [[2, 0, 2]]


def test_gpus_share_the_cases(prepare, monkeypatch):
    """Each case once and whole, at first in the process that measures the roofs alone; a crash costs its task alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,7")
    channels = [1, 2, 4, 40, 6, 7, 8, 9]
    log, _ = prepare(channels, compilers=0, first_calls=0, gpus=2, batch=4, precisions=["tf32", "bf16"])
    where = {}
    for what, about, more in log:
        if what == "measured":
            where.setdefault(about.split()[1], []).append(more[1:])
    assert sorted(map(int, where)) == sorted(channels) and all(len(found) == 2 for found in where.values())
    assert all(a == b for c, ((a, _), (b, _)) in where.items() if c != "40")
    assert {gpu for found in where.values() for gpu, _ in found} == {"5", "3"}
    assert where["1"] == [["5", True]] * 2
    assert {gpu for found in where.values() for gpu, begun in found if begun} == {"5"}


def test_a_gpu_that_starts_no_process_leaves_its_cases_to_the_others(prepare, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,dead")
    log, _ = prepare([1, 2, 4, 6], compilers=0, first_calls=0, gpus=2)
    assert sorted(channels_of(log, "measured")) == [1, 2, 4, 6]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "dead")
    with pytest.raises(Refused, match="did not start: exit status 3"):
        prepare([1, 2], compilers=0, first_calls=0)


def test_gpus_that_cannot_be_had(capsys, no_gpu, monkeypatch):
    code, text = out_of(capsys, "--gpus", "1000", "--plain")
    assert code == 2 and "--gpus 1000: this machine has" in text
    code, text = out_of(capsys, "--model", "mine:make", "--gpus", "2")
    assert code == 2 and "--gpus 2: a model is measured on one GPU" in text


def test_distinct_calls():
    axes = dict(precisions=["tf32", "bf16"], formats=["contiguous", "channels_last"])
    settings = Settings(suites=["core", "kernelbench"], match="L2/91", passes=["forward", "backward_input"], **axes)
    assert len(run.tasks(settings)) == 8
    once = distinct(run.tasks(settings))
    assert [t["passes"] for t in once] == [settings.passes] * 4
    assert len({(t["precision"], t["memory_format"]) for t in once}) == 4
    settings.passes = ["forward", "backward_weight", "training"]
    assert [t["passes"] for t in distinct(run.tasks(settings))] == [["training"]] * 4


def test_a_bar_for_each_step(no_gpu):
    pytest.importorskip("rich")
    with Rich() as progress:
        progress.start(3, 0)
        progress.at("preparing", 3)
        progress.start(5, 1)
        assert [(task.total, task.completed) for task in progress.bar.tasks] == [(5, 1)]


def test_missing_extra(monkeypatch, capsys, no_gpu):
    for name in ("rich", "rich.console", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    code, text = out_of(capsys, "list")
    assert code == 2 and "rich, which is not installed: pip install 'tconv[bench]', or --plain" in text
    (no_gpu / "r.json").write_text(json.dumps({"head": {"device": "x"}, "rows": [row(), row(provider="cudnn")]}))
    code, text = out_of(capsys, "report", "r.json", "--plain", "--plots", "p")
    assert code == 2 and "matplotlib, which is not installed: pip install 'tconv[bench]'" in text


# On a GPU


@pytest.mark.gpu
def test_every_provider_measures(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--layer", LAYER, "--layer", "convtranspose1d 32 16 k4 s2 p1 nobias @ 2x32x100", "--provider"]
    code, printed = out_of(capsys, *argv, *providers.DEFAULT, "--quick", "--output", "r.json", "--plain")
    assert code == 0, printed
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {r["status"] for r in rows} == {"ok"}, printed
    assert {r["provider"] for r in rows} == set(providers.DEFAULT)
    assert {r["provider"] for r in rows if r["case"] != LAYER} == set(providers.DEFAULT) - {
        "cudnn-nhwc",
        "cudnn-nhwc-convert",
    }
    assert all(r["ms"] > 0 and r["ms_spread"] >= 0 and r["roof_ms"] > 0 and r["cold_l2"] for r in rows)


@pytest.mark.gpu
def test_what_is_measured_was_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    names = [f"convtranspose2d {c} 16 k4 s2 p1 @ 2x{c}x16x16" for c in (16, 32, 48)]
    axes = dict(passes=list(cases.PASSES), precisions=["tf32", "bf16"], formats=list(cases.FORMATS), gpu=True)
    fast = dict(budget=0.01, fewest=1, most=2, first_calls=0)
    settings = Settings(layers=names, providers=["tconv", "tconv-graph"], compilers=3, **axes, **fast)
    store = Store(tmp_path / "r.json", settings, False)
    compiled = lambda: {p.parent.name for p in (tmp_path / "cache").rglob("*.cubin")}  # noqa: E731
    run.prepare(settings, store, run.tasks(settings), Plain())
    prepared = compiled()
    settings.compilers = 0
    run.run(settings, store, Plain())
    assert prepared and compiled() == prepared
    assert store.rows and not [r for r in store.rows if r["status"] != "ok"]


@pytest.mark.gpu
def test_compiled_by_inductor(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--layer", LAYER, "--provider", "tconv", "compile", "--pass", "forward", "training", "--precision", "fp32"]
    code, printed = out_of(capsys, *argv, "--format", "contiguous", "--quick", "--output", "r.json", "--plain")
    assert code == 0, printed
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {(r["provider"], r["status"]) for r in rows} == {("tconv", "ok"), ("compile", "ok")}, printed


@pytest.mark.gpu
def test_model_on_a_gpu(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpu_model.py").write_text(
        "import torch\nfrom torch import nn\ndef make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ConvTranspose2d(32, 16, 4, stride=2)), torch.randn(4, 3, 64, 64)\n"
    )
    code, printed = out_of(capsys, "--model", "gpu_model:make", "--quick", "--output", "r.json", "--plain")
    assert code == 0, printed
    (model,) = json.loads((tmp_path / "r.json").read_text())["models"]
    assert model["check"]["status"] == "ok", printed
    assert [r["mode"] for r in model["rows"]] == ["inference", "training"]
    assert all(0 < share < 1 for r in model["rows"] for share in r["share"].values())


def test_settings_are_the_command_lines(monkeypatch):
    monkeypatch.setattr(cli, "_has_gpu", lambda: True)
    core = cli.settings_of(cli.parser().parse_args(["run"]))
    assert core.suites == ["core"] and "compile" not in core.providers
    assert (core.passes, core.precisions, core.formats) == tuple(map(list, cli.SUITE_AXES))
    one = cli.settings_of(cli.parser().parse_args(["run", "--layer", LAYER]))
    assert one.suites == [] and "compile" in one.providers and "training" in one.passes
    quick = cli.settings_of(cli.parser().parse_args(["run", "--quick", "--budget", "1"]))
    assert quick.budget == 1 and quick.most < Settings().most
    assert core.compilers <= max(1, (os.cpu_count() or 1) // 2)
    assert cli.settings_of(cli.parser().parse_args(["run", "--compilers", "32"])).compilers == 32
