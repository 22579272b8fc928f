"""What only a GPU can show: graphs, streams, threads, several devices, memory formats."""

import threading

import pytest
import torch

import tconv
from tconv.workloads import layers

pytestmark = pytest.mark.gpu


def layer_and_input(device="cuda", dtype=torch.float16):
    layer = tconv.ConvTranspose2d(32, 16, 4, stride=2, padding=1, device=device, dtype=dtype)
    return layer, torch.randn(2, 32, 9, 10, device=device, dtype=dtype)


def test_cuda_graph_of_a_training_step():
    layer, x = layer_and_input()
    x.requires_grad_(True)

    def step():
        grads = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
        return [g.clone() for g in grads]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        layer.weight.copy_(torch.randn_like(layer.weight))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


def test_other_streams():
    layer, x = layer_and_input()
    expected = layer(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        y = layer(x.clone())
    stream.synchronize()
    assert torch.equal(y, expected)


def test_many_threads_from_a_cold_start():
    """Kernels of a dtype and layout that nothing has compiled yet, asked for by eight threads at once."""
    x = torch.randn(2, 24, 5, 7, 6, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
    w = torch.randn(24, 7, 3, 2, 3, device="cuda", dtype=torch.bfloat16)
    results, errors = {}, []

    def work(i):
        try:
            for _ in range(5):
                results[i] = tconv.conv_transpose3d(x, w, stride=(1, 2, 3), padding=1)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    torch.cuda.synchronize()
    assert not errors
    assert all(torch.equal(r, results[0]) for r in results.values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device_and_not_the_current_one():
    here = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        layer, x = layer_and_input(f"cuda:{index}")
        x.requires_grad_(True)
        y = layer(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        reference = torch.nn.functional.conv_transpose2d(x, layer.weight, layer.bias, 2, 1)
        assert y.device == grad.device == x.device
        torch.testing.assert_close(y, reference, atol=2e-2, rtol=2e-2)
    assert torch.cuda.current_device() == here


def test_a_size_compiles_nothing_new():
    from tconv.kernels.gemm import gather_gemm

    def compiled():
        return sum(len(cache[0]) for cache in gather_gemm.device_caches.values())

    layer = tconv.ConvTranspose1d(32, 32, 8, stride=4, padding=2, device="cuda")
    with torch.no_grad():
        layer(torch.randn(1, 32, 6000, device="cuda"))
        before = compiled()
        for length in (6001, 7000, 9999, 16384):
            layer(torch.randn(1, 32, length, device="cuda"))
            tconv.conv_transpose1d(torch.randn(1, 32, length, device="cuda"), layer.weight[..., :7], layer.bias, 3, 1)
    assert compiled() == before


@pytest.mark.parametrize("suite", ("kernelbench", "zoo"))
def test_memory_formats_are_torchs(suite):
    """Strides of the output equal torch's for contiguous and channels_last inputs and weights, on small copies."""
    for layer in layers(suite):
        ndim = layer.geometry.ndim
        if ndim == 1:
            continue
        last = torch.channels_last if ndim == 2 else torch.channels_last_3d
        x = torch.randn((2, layer.in_channels, *[min(i, 4) for i in layer.input_shape[2:]]), device="cuda")
        w = torch.randn(layer.weight_shape, device="cuda")
        aten, ours = (getattr(m, f"conv_transpose{ndim}d") for m in (torch.nn.functional, tconv))
        for xf in (torch.contiguous_format, last):
            for wf in (torch.contiguous_format, last):
                args = x.contiguous(memory_format=xf), w.contiguous(memory_format=wf)
                assert ours(*args, **layer.options).stride() == aten(*args, **layer.options).stride(), (layer, xf, wf)


def test_compiled_by_inductor():
    layer, x = layer_and_input(dtype=torch.float32)

    def loss(x):
        return torch.relu(layer(x)).square().mean()

    compiled = torch.compile(loss, fullgraph=True)
    x.requires_grad_(True)
    expected = torch.autograd.grad(loss(x), (x, layer.weight))
    actual = torch.autograd.grad(compiled(x), (x, layer.weight))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
