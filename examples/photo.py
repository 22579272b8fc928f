"""The demo's task: a photograph under lettering, how well it is filled in, and the picture of the outcome."""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


def load(size: int) -> torch.Tensor:
    """The photograph's upper square at size x size pixels, as (1, 3, size, size) in -1 to 1."""
    image = Image.open(Path(__file__).with_name("grace_hopper.jpg")).convert("RGB")
    pixels = np.array(image.crop((66, 0, 466, 400)).resize((size, size)))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


def lettering(size: int) -> torch.Tensor:
    """(1, 1, size, size): 0 where letters hide the photograph, 1 where it shows."""
    canvas = Image.new("L", (size, size), 255)
    draw, height = ImageDraw.Draw(canvas), size // 10
    font = ImageFont.load_default(height)
    for line in range(6):
        draw.text((-3 * height * (line % 3), 1.8 * height * line), "transposed convolution " * 3, fill=0, font=font)
    return torch.from_numpy(np.array(canvas) > 250)[None, None].float()


def loss(output: torch.Tensor, photo: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean squared error over the pixels where mask is 1."""
    return ((output - photo).square() * mask).sum() / (mask.sum() * photo.shape[1])


def psnr(output: torch.Tensor, photo: torch.Tensor, mask: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over the pixels where mask is 1; the peak is 2, from -1 to 1."""
    return (10 * torch.log10(4 / loss(output, photo, mask))).item()


def draw(path: Path, photo: torch.Tensor, mask: torch.Tensor, outputs: dict[str, torch.Tensor]) -> None:
    """Write the photograph, what the model saw of it, the two outputs by title, and their difference."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    images = {"photograph": photo, "what the model saw": photo * mask + (1 - mask), **outputs}
    figure, axes = plt.subplots(1, 5, figsize=(17, 3.9), layout="constrained")
    for axis, (title, image) in zip(axes, images.items(), strict=False):
        axis.imshow(((image[0] + 1) / 2).clamp(0, 1).permute(1, 2, 0).cpu())
        axis.set_title(title)
    first, second = outputs.values()
    difference = (first - second).abs().amax(1)[0].cpu() / 2
    shown = axes[4].imshow(difference, cmap="magma")
    axes[4].set_title("|difference| of the two,\n1 being black against white")
    figure.colorbar(shown, ax=axes[4], shrink=0.8)
    for axis in axes:
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
