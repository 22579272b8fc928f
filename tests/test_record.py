"""A call like an earlier one launches what that one launched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_aot import releases

import tconv
from tconv import record


@pytest.mark.parametrize("directory", releases())
def test_repeated_calls_launch_the_same(directory, tmp_path):
    """Of every kernel family and pass, under the installed Triton and others, with a driver that launches nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    if directory is not None:
        environment["PYTHONPATH"] = directory
    command = [sys.executable, Path(__file__).with_name("recorded.py")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    assert process.stdout.count("the same") == 83


@pytest.mark.gpu
def test_records_on_a_gpu():
    """The second call repeats the first one's record, on other tensors, to the same values as deciding anew."""
    layer = tconv.ConvTranspose2d(64, 64, 4, stride=2, padding=1, device="cuda")
    x, other = torch.randn(2, 8, 64, 64, 64, device="cuda", requires_grad=True).unbind(0)

    def step(x):
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))

    step(x)
    count = len(record._records)
    assert count == 5  # three passes, the bias, and that aten makes no two of them in one call
    repeated = step(other)
    assert len(record._records) == count
    record.forget()
    for one, two in zip(repeated, step(other), strict=True):
        assert torch.equal(one, two)


def test_many_records_are_forgotten(monkeypatch):
    monkeypatch.setattr(record, "MOST_RECORDS", 2)
    for i in range(5):
        noted = record.Record(torch.zeros(1))
        result = noted.result((1,), torch.zeros(1), torch.contiguous_format)
        assert noted.keep((i,)) is result
        assert record.find((i,)) is noted and len(record._records) <= 2
    assert record.find((0,)) is None
