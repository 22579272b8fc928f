"""torch.compile and torch.export: whole graphs, dynamic sizes, the same results as in eager mode."""

import io

import pytest
import torch
from samples import OURS, TORCHS, assert_near, each, sample
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import tconv

CONV_TRANSPOSE = (torch.ops.tconv.conv_transpose, torch.ops.tconv.conv_transpose.default)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorder:
    """A backend that keeps the graphs it is given and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, _):
        self.graphs.append(graph)
        return graph

    @property
    def targets(self):
        return operators(self.graphs[-1])

    def count(self):
        """How many times tconv's operator is in the last graph."""
        return sum(t in CONV_TRANSPOSE for t in self.targets)


def layer_of(case, function=None):
    function = function or case.ours
    return lambda *t: function(*t, **case.layer)


def run(f, tensors):
    """(output, gradients)"""
    output = f(*tensors)
    return output, *torch.autograd.grad(output.sin().sum(), [t for t in tensors if t.requires_grad])


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.stride() == b.stride()
        assert_near(a, b)


DYNAMIC = pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))


@DYNAMIC
@each([sample("1d"), sample("1d_grouped"), sample("2d"), sample("2d_depthwise"), sample("3d")])
def test_functional(sample, dynamic, device):
    tensors = sample.tensors(device)
    f = layer_of(sample)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_same(run(compiled, tensors), run(f, tensors))


@DYNAMIC
def test_inductor(dynamic, device):
    """With work of inductor's own on both sides of the layer."""
    case = sample("2d")
    tensors = case.tensors(device)

    def f(x, w, b):
        return case.ours(x.sin(), w, b, **case.layer).relu() * 2

    assert_same(run(torch.compile(f, fullgraph=True, dynamic=dynamic), tensors), run(f, tensors))


def test_channels_last_and_expanded_gradients(device):
    """The fake tensors' strides are those of the real ones, or inductor's code would read wrong addresses."""
    case = sample("2d")
    x, w, b = case.tensors(device)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    f = layer_of(case)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager_decomp_partition")
    assert f(x, w, b).is_contiguous(memory_format=torch.channels_last)
    assert_same(run(compiled, (x, w, b)), run(f, (x, w, b)))
    for a, e in zip(*(torch.autograd.grad(g(x, w, b).sum(), (x, w, b)) for g in (compiled, f)), strict=True):
        assert_near(a, e)


@DYNAMIC
@pytest.mark.parametrize("n", (1, 2, 3), ids="{}d".format)
def test_module(n, dynamic, device):
    """A converted module, batched and not, with and without output_size: one operator in one graph each."""
    model = nn.Sequential(nn.ReLU(), TORCHS[n](3, 2, 3, stride=2, device=device))
    tconv.convert(model)
    recorder = Recorder()
    compiled = torch.compile(model, fullgraph=True, backend=recorder, dynamic=dynamic)
    for shape in ((2, 3, *(3,) * n), (3, *(3,) * n)):
        x = torch.randn(shape, device=device)
        assert_near(compiled(x), model(x))
        assert recorder.count() == 1
    layer = torch.compile(model[1], fullgraph=True, backend=recorder, dynamic=dynamic)
    x = torch.randn(2, 3, *(3,) * n, device=device)
    assert layer(x, output_size=(8,) * n).shape[2:] == (8,) * n
    assert recorder.count() == 1


@pytest.mark.parametrize("where", ("inside", "around"))
def test_autocast(where, device):
    case = sample("2d")
    tensors = case.tensors(device)
    layer = layer_of(case)

    def inside(*t):
        with torch.autocast(device, torch.bfloat16):
            return layer(*t)

    f = inside if where == "inside" else layer
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, torch.bfloat16, enabled=where == "around"):
        actual, expected = run(compiled, tensors), run(f, tensors)
    assert actual[0].dtype is torch.bfloat16
    assert [t.dtype for t in actual[1:]] == [torch.float32] * 3
    assert_same(actual, expected)


SIZES = [(2, 3, 4, 5), (4, 3, 6, 5), (3, 3, 5, 7), (6, 3, 7, 4), (5, 3, 4, 8)]


@pytest.mark.parametrize("dynamic", (True, None), ids=("dynamic", "automatic"))
def test_recompiles_no_more_than_torch(dynamic, device):
    """A new batch or image size under dynamic shapes costs what it costs with torch's module."""
    counts = []
    for kinds in (OURS, TORCHS):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        module = kinds[2](3, 2, 2, stride=2, device=device)
        compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=dynamic)
        for size in SIZES:
            x = torch.randn(size, device=device)
            assert compiled(x).shape == (size[0], 2, 2 * size[2], 2 * size[3])
        counts.append(counter.frame_count)
    assert counts[0] <= counts[1]
    assert counts[0] == 1 or not dynamic


def test_values_under_changing_sizes(device):
    case = sample("2d_depthwise")
    _, w, b = case.tensors(device)
    f = layer_of(case)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((1, 3, 2, 3), (2, 3, 3, 2), (2, 3, 4, 1)):
        tensors = torch.randn(size, device=device, requires_grad=True), w, b
        assert_same(run(compiled, tensors), run(f, tensors))


def test_precision_is_read_at_the_call(device):
    """A flag changed after compilation counts, as it does for aten's convolution."""
    flags = torch.backends.cudnn.conv
    x, w = torch.randn(1, 64, 3, device=device), torch.randn(64, 16, 4, device=device)  # sums that TF32 would take
    compiled = torch.compile(tconv.conv_transpose1d, fullgraph=True, backend="aot_eager")
    results = {}
    for flags.fp32_precision in ("ieee", "tf32"):
        results[flags.fp32_precision] = tconv.conv_transpose1d(x, w)
        assert torch.equal(compiled(x, w), results[flags.fp32_precision])
    assert not torch.equal(results["ieee"], results["tf32"])


def test_errors_are_those_of_eager_mode(device):
    compiled = torch.compile(lambda x, w: tconv.conv_transpose2d(x, w, padding=5), backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"conv_transpose2d\(\): .*padding is too large"):
        compiled(torch.randn(1, 2, 3, 3, device=device), torch.randn(2, 2, 2, 2, device=device))


@pytest.mark.parametrize("where", ("inside", "around"))
def test_override(where, device):
    """Torch's function in the source, tconv's operator in the graph; outside override, torch's again."""
    case = sample("2d")
    tensors = case.tensors(device)
    plain = layer_of(case, case.aten)

    def inside(*t):
        with tconv.override():
            return plain(*t)

    recorder = Recorder()
    compiled = torch.compile(inside if where == "inside" else plain, fullgraph=True, backend=recorder)
    if where == "inside":
        compiled(*tensors)
    else:
        with tconv.override():
            compiled(*tensors)
    assert recorder.count() == 1
    if where == "around":
        compiled(*tensors)
        assert recorder.count() == 0
        assert case.aten in recorder.targets


def test_func_transforms(device, ieee):
    case = sample("1d")
    x, w, b = case.tensors(device, requires_grad=False)

    def per_sample(x, w, b):
        return vmap(grad(lambda w, x: case.ours(x, w, b, **case.layer).sin().sum()), (None, 0))(w, x)

    def tangents(x, w, b):
        return jvp(lambda x: case.ours(x, w, b, **case.layer), (x,), (x,))

    for f in (per_sample, tangents):
        actual = torch.compile(f, fullgraph=True, backend="aot_eager")(x, w, b)
        for a, e in zip(*map(torch.utils._pytree.tree_leaves, (actual, f(x, w, b))), strict=True):
            assert_near(a, e)


@pytest.mark.parametrize("mode", ("real", "fake", "symbolic"))
def test_make_fx(mode, device):
    case = sample("2d")
    tensors = case.tensors(device, requires_grad=False)
    graph = make_fx(layer_of(case), tracing_mode=mode)(*tensors)
    assert CONV_TRANSPOSE[1] in operators(graph)
    x = torch.randn(3, 3, 4, 2, device=device) if mode == "symbolic" else tensors[0]
    assert_near(graph(x, *tensors[1:]), case.ours(x, *tensors[1:], **case.layer))


def operators(graph_or_program):
    return [n.target for n in graph_or_program.graph.nodes if n.op == "call_function"]


# Export.


class UNet(nn.Module):
    """Down and up again, to the size of the input whatever it was."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1)

    def forward(self, x):
        return self.up(self.down(x), output_size=x.shape[2:])


def converted_unet(device):
    model = UNet().to(device)
    assert tconv.convert(model).changed == ["up"]
    return model


STRICT = pytest.mark.parametrize("strict", (False, True), ids=("nonstrict", "strict"))


@STRICT
def test_export(strict, device):
    model = converted_unet(device)
    x = torch.randn(2, 2, 5, 6, device=device)
    program = torch.export.export(model, (x,), strict=strict)
    assert CONV_TRANSPOSE[1] in operators(program)
    assert_near(program.module()(x), model(x))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    assert_near(torch.export.load(buffer).module()(x), model(x))


@STRICT
def test_export_with_named_sizes(strict, device):
    layer = OURS[2](2, 3, 3, stride=2, device=device)
    dims = {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}
    program = torch.export.export(
        layer, (torch.randn(2, 2, 5, 6, device=device),), dynamic_shapes=(dims,), strict=strict
    )
    assert CONV_TRANSPOSE[1] in operators(program)
    for size in ((2, 2, 5, 6), (3, 2, 1, 4)):
        x = torch.randn(size, device=device)
        assert_near(program.module()(x), layer(x))


@STRICT
def test_export_with_dynamic_output_padding(strict, device):
    """output_padding stays a symbol too: it is 1 for even sizes and 0 for odd ones.

    DYNAMIC rather than named sizes: the solver cannot prove the guard of torch's own output_size for all sizes.
    """
    model = converted_unet(device)
    dims = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    x = torch.randn(2, 2, 5, 6, device=device)
    program = torch.export.export(model, (x,), dynamic_shapes=(dims,), strict=strict)
    assert CONV_TRANSPOSE[1] in operators(program)
    for size in ((2, 2, 5, 6), (3, 2, 6, 5), (2, 2, 4, 4)):
        x = torch.randn(size, device=device)
        y = program.module()(x)
        assert y.shape == x.shape
        assert_near(y, model(x))


def test_export_under_override(device):
    model = UNet().to(device)
    x = torch.randn(2, 2, 5, 6, device=device)
    with tconv.override():
        program = torch.export.export(model, (x,))
    assert CONV_TRANSPOSE[1] in operators(program)
    assert_near(program.module()(x), model(x))


def test_exported_programs_decompose_and_train(device):
    """run_decompositions keeps the operator whole; the joint graph holds its gradients."""
    model = converted_unet(device)
    x = torch.randn(1, 2, 4, 3, device=device)
    program = torch.export.export(model, (x,)).run_decompositions()
    assert CONV_TRANSPOSE[1] in operators(program)
    module = program.module()
    module(x).sum().backward()
    expected = torch.autograd.grad(model(x).sum(), model.up.weight)[0]
    assert_near(module.up.weight.grad, expected)


def test_compiled_autograd(device):
    """torch.compile's own autograd traces an eager graph of ours."""
    from torch._dynamo import compiled_autograd

    layer = tconv.ConvTranspose2d(4, 3, 4, stride=2, padding=1, device=device)
    x = torch.randn(2, 4, 3, 5, device=device, requires_grad=True)
    leaves = x, *layer.parameters()
    expected = torch.autograd.grad(layer(x).sin().sum(), leaves)
    loss = layer(x).sin().sum()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    for leaf, wanted in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, wanted)
