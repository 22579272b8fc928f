"""Charts of a result: speed-ups in order, and the roofline."""

from __future__ import annotations

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


def speedup_chart(result: dict, path: Path) -> None:
    """Each pass's speed-ups over the best other provider, sorted, one panel a precision and memory format."""
    plt = _pyplot()
    groups = _groups(speedups(result["rows"]))
    figure, axes = plt.subplots(1, len(groups), figsize=(4.6 * len(groups), 3.8), sharey=True, squeeze=False)
    for ax, (name, group) in zip(axes[0], groups.items()):
        for pass_name in dict.fromkeys(s.row["pass"] for s in group):
            ratios = sorted(s.ratio for s in group if s.row["pass"] == pass_name)
            share = [(i + 0.5) / len(ratios) for i in range(len(ratios))]
            ax.plot(share, ratios, marker=".", label=f"{pass_name}: {geomean(ratios):.2f}x")
        ax.axhline(1, color=COLOURS["roof"], linewidth=0.8)
        ax.set(yscale="log", title=name, xlabel="share of cases")
        ax.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5x", "1x", "2x", "4x", "8x", "16x"])
        ax.legend(fontsize="small", title="geometric mean", title_fontsize="small")
    axes[0][0].set_ylabel("speed-up over the best other provider")
    figure.suptitle(str(result["head"]["device"]), fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def roofline_chart(result: dict, path: Path) -> None:
    """Achieved TFLOP/s over operations per byte, tconv and the best other provider, under the measured roofs."""
    plt = _pyplot()
    roofs = result["head"]["roofs"]
    groups = _groups(speedups(result["rows"]))
    figure, axes = plt.subplots(1, len(groups), figsize=(4.6 * len(groups), 3.8), squeeze=False)
    for ax, (name, group) in zip(axes[0], groups.items()):
        rates = roofs["matmul_tflops"]
        precision = group[0].row["precision"]
        rate = max(rates["fp32"], rates["tf32"] / 3) if precision == "fp32" else rates[precision]
        intensity = [s.row["flops"] / s.row["bytes"] for s in group]
        ridge = 1e3 * rate / roofs["copy_gbps"]  # operations a byte at which the two roofs meet
        low, high = min(*intensity, ridge) / 2, 2 * max(*intensity, ridge)
        ax.plot([low, ridge, high], [low * roofs["copy_gbps"] / 1e3, rate, rate], color=COLOURS["roof"], linewidth=1)
        for label, pick in (("other", lambda s: s.rival), ("tconv", lambda s: s.row)):
            points = [pick(s)["tflops"] for s in group]
            ax.scatter(intensity, points, s=9, color=COLOURS[label], label={"other": "best other"}.get(label, label))
        ax.set(xscale="log", yscale="log", title=name, xlabel="operations a byte", ylabel="TFLOP/s")
        ax.legend(fontsize="small")
    figure.suptitle(str(result["head"]["device"]), fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
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
