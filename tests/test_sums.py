"""The second stage of weights' gradients: its launches, and that they add what the first stage wrote."""

import pytest
import torch

from tconv.geometry import Geometry
from tconv.launches.sums import FEW_SUMS, MANY_SPLITS, sum_partials
from tconv.layouts import strides5
from tconv.record import Record


class Noted(Record):
    """A record that keeps what it launched with."""

    def launch(self, kernel, grid, *args, **constants):
        self.constants = constants
        super().launch(kernel, grid, *args, **constants)


@pytest.mark.parametrize(
    "shape, splits, last, expected",
    [
        ((96, 128, 4, 4), 2, False, dict(DENSE=True, ROWS=1, TAPS=16, BLOCK=64)),
        ((96, 128, 4, 4), 2, True, dict(DENSE=False, ROWS=1, TAPS=1, BLOCK=1024)),
        ((96, 500, 3), 1, False, dict(DENSE=True, ROWS=1, TAPS=4, BLOCK=256)),
        ((60, 85, 3, 3, 3), 3, False, dict(DENSE=True, ROWS=1, TAPS=16, BLOCK=64)),
        ((130, 1100, 1, 1), 2, False, dict(DENSE=True, ROWS=1, TAPS=1, BLOCK=1024)),
        ((1, 9000, 4, 4), 2, False, dict(DENSE=True, ROWS=1, TAPS=16, BLOCK=64)),
        ((60, 85, 3, 3, 3), MANY_SPLITS + 1, False, dict(DENSE=True, ROWS=8, TAPS=1, BLOCK=128)),
        ((20, 17, 5, 2), 3, False, dict(DENSE=True, ROWS=8, TAPS=1, BLOCK=32)),
        ((20, 17, 5, 2), 9, True, dict(DENSE=False, ROWS=128, TAPS=1, BLOCK=32)),
    ],
    ids=str,
)
def test_sums(shape, splits, last, expected, device):
    """Bit for bit the sum in float64; taps side by side where the gradient has them so."""
    weight = torch.empty(shape, device=device)
    if last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    kernel, c_out = shape[2:], shape[1]
    taps, n = weight[0, 0].numel(), len(kernel)
    assert (weight.numel() > FEW_SUMS) == (expected["BLOCK"] > 32)
    partials = torch.randn(splits, taps, shape[0] * c_out, device=device)
    geometry = Geometry(kernel, (1,) * n, (0,) * n, (0,) * n, 1, (1,) * n)
    noted = Noted(partials, weight)
    sum_partials(noted, partials, weight, strides5(weight), c_out, geometry.axes3)
    assert noted.constants == expected
    exact = partials.double().sum(0).reshape(*kernel, *shape[:2]).movedim((-2, -1), (0, 1))
    assert torch.equal(weight, exact.float())
