"""Charts of a result: speed-ups in order, and the roofline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .report import Speedup, geomean, speedups
from .terminal import EXTRA, Refused

COLOURS = {"tconv": "#1f6fb4", "other": "#d1743c", "roof": "#555555"}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise Refused(f"charts are drawn by matplotlib, which is not installed: {EXTRA}") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _groups(found: list[Speedup]) -> dict[str, list[Speedup]]:
    groups: dict[str, list[Speedup]] = {}
    for s in found:
        groups.setdefault(f"{s.row['precision']} {s.row['memory_format']}", []).append(s)
    return groups


MANY = 100  # points, of which no figure's file should hold each


def speedup_chart(result: dict, path: Path) -> None:
    """Each pass's speed-ups over the best other provider, sorted, one panel a precision and memory format."""
    plt = _pyplot()
    found = speedups(result["rows"])
    groups = _groups(found)
    figure, axes = plt.subplots(1, len(groups), figsize=(4.6 * len(groups), 4.6), sharey=True, squeeze=False)
    # Whole powers of two around the data and 1, and at most nine of them named.
    low = min(-1, math.floor(math.log2(min(s.ratio for s in found))))
    high = max(1, math.ceil(math.log2(max(s.ratio for s in found))))
    ticks = [2.0**i for i in range(low, high + 1) if i % math.ceil((high - low) / 9) == 0]
    for ax, (name, group) in zip(axes[0], groups.items()):
        ax.axhspan(2.0 ** (low - 1), 1, color=COLOURS["other"], alpha=0.12, linewidth=0)
        for pass_name in dict.fromkeys(s.row["pass"] for s in group):
            of_pass = [s for s in group if s.row["pass"] == pass_name]
            ratios = sorted(s.ratio for s in of_pass)
            share = [(i + 0.5) / len(ratios) for i in range(len(ratios))]
            losses = f"{sum(s.lost for s in of_pass)} of {len(ratios)}"
            marker = "." if len(ratios) < MANY else None
            ax.plot(share, ratios, marker=marker, label=f"{pass_name}: {geomean(ratios):.2f}x, {losses}")
        ax.axhline(1, color=COLOURS["roof"], linewidth=0.8)
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.set(yscale="log", ylim=(2.0 ** (low - 0.2), 2.0 ** (high + 0.2)), title=name, xlabel="share of cases")
        ax.set_yticks(ticks, [f"{t:g}x" for t in ticks])
        ax.minorticks_off()
        _legend(ax, title="geometric mean, losses beyond the noise (shaded: below 1x)")
    axes[0][0].set_ylabel("speed-up over the best other")
    _write(plt, figure, result, path)


def roofline_chart(result: dict, path: Path) -> None:
    """Achieved TFLOP/s over operations per byte, tconv and the best other provider, under the measured roofs."""
    plt = _pyplot()
    roofs = result["head"]["roofs"]
    groups = _groups(speedups(result["rows"]))
    figure, axes = plt.subplots(1, len(groups), figsize=(4.6 * len(groups), 4.6), squeeze=False)
    for ax, (name, group) in zip(axes[0], groups.items()):
        rates, copy = roofs["matmul_tflops"], roofs["copy_gbps"]
        precision = group[0].row["precision"]
        rate = max(rates["fp32"], rates["tf32"] / 3) if precision == "fp32" else rates[precision]
        intensity = [s.row["flops"] / s.row["bytes"] for s in group]
        ridge = 1e3 * rate / copy  # operations a byte at which the two roofs meet
        low, high = min(*intensity, ridge) / 2, 2 * max(*intensity, ridge)
        roof = f"roof: {copy:.0f} GB/s, {rate:.0f} TFLOP/s"
        ax.plot([low, ridge, high], [low * copy / 1e3, rate, rate], color=COLOURS["roof"], linewidth=1, label=roof)
        for label, colour, face, rows in (
            ("best other", "other", COLOURS["other"], [s.rival for s in group]),
            ("tconv", "tconv", COLOURS["tconv"], [s.row for s in group if not s.lost]),
            ("tconv, a loss", "tconv", "none", [s.row for s in group if s.lost]),
        ):
            points = [r["flops"] / r["bytes"] for r in rows], [r["tflops"] for r in rows]
            ax.scatter(
                *points,
                s=12,
                facecolors=face,
                edgecolors=COLOURS[colour],
                linewidths=0.7,
                label=label,
                rasterized=len(rows) >= MANY,
            )
        ax.set(xscale="log", yscale="log", title=name, xlabel="operations a byte")
        _legend(ax)
    axes[0][0].set_ylabel("TFLOP/s")
    _write(plt, figure, result, path)


def _legend(ax: Any, **options: Any) -> None:
    """Below the panel, where it hides no point."""
    options |= {"fontsize": "small", "title_fontsize": "small", "frameon": False}
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1 + ("title" not in options), **options)


def _write(plt: Any, figure: Any, result: dict, path: Path) -> None:
    """Save a chart; without dates and random names in it, so that the same result gives the same file."""
    figure.suptitle(str(result["head"]["device"]), fontsize="small")
    figure.tight_layout()
    with plt.rc_context({"svg.hashsalt": "tconv"}):
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", dpi=150)
    plt.close(figure)


def draw(result: dict, folder: str) -> list[Path]:
    """Write speedup.svg and roofline.svg into a folder; returns their paths."""
    if not speedups(result["rows"]):
        raise Refused("nothing to draw: the result has no case timed on tconv and another provider")
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    speedup_chart(result, where / "speedup.svg")
    roofline_chart(result, where / "roofline.svg")
    return [where / "speedup.svg", where / "roofline.svg"]
