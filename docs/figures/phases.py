"""Draw docs/figures/phases.svg: which taps reach which outputs, from tconv.geometry itself.

Run from the repository's root: python docs/figures/phases.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from tconv.geometry import Axis

COLOURS = ("#1f6feb", "#d9480f", "#2b8a3e", "#862e9c")
PANELS = (
    ("kernel 4, stride 2, padding 1: two phases of two taps", Axis(4, 2, 1, 1), 5, 0),
    ("kernel 3, stride 2, padding 1, output_padding 1: one tap and two", Axis(3, 2, 1, 1), 5, 1),
    ("kernel 3, stride 4, dilation 2: the odd phases get the bias alone", Axis(3, 4, 0, 2), 3, 0),
)


def draw(ax, title, axis, size, output_padding):
    outputs = axis.output_size(size, output_padding)
    centre = (outputs - 1) / 2
    place = [centre + (i - (size - 1) / 2) * axis.stride for i in range(size)]
    for i, x in enumerate(place):
        ax.add_patch(plt.Rectangle((x - 0.4, 2.0), 0.8, 0.6, facecolor="#e9ecef", edgecolor="#495057"))
        ax.text(x, 2.3, f"x{i}", ha="center", va="center", fontsize=8)
    for o in range(outputs):
        phase = o % axis.stride
        colour = COLOURS[phase % len(COLOURS)]
        ax.add_patch(plt.Rectangle((o - 0.4, 0), 0.8, 0.6, facecolor="white", edgecolor=colour, linewidth=1.6))
        ax.text(o, 0.3, f"y{o}", ha="center", va="center", fontsize=8, color=colour)
        for tap, offset in axis.taps(phase):
            i = o // axis.stride + offset
            if 0 <= i < size:
                ax.plot([place[i], o], [2.0, 0.6], color=colour, linewidth=0.9)
                x, y = 0.22 * place[i] + 0.78 * o, 0.22 * 2.0 + 0.78 * 0.6
                ax.text(
                    x,
                    y,
                    f"w{tap}",
                    fontsize=6.5,
                    ha="center",
                    va="center",
                    color=colour,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
                )
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xlim(-1.2, 14.2)
    ax.set_ylim(-0.2, 2.8)
    ax.axis("off")


def main():
    plt.rcParams.update({"svg.hashsalt": "tconv", "svg.fonttype": "none"})
    figure, axes = plt.subplots(len(PANELS), 1, figsize=(9, 6.4))
    for ax, panel in zip(axes, PANELS, strict=True):
        draw(ax, *panel)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("phases.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
