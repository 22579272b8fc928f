"""Draw docs/figures/shift.svg: the shift kernel's tile, rings, phases and folds, from tconv.shift and tconv.geometry.

Run from the repository's root: python docs/figures/shift.py
"""

from math import nan
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from tconv import shift
from tconv.geometry import Axis

ACC, PALE = ("#1f6feb", "#d9480f"), ("#dbe9ff", "#ffe3d3")  # of accumulator 0, of accumulator 1
INK, LINE, GRID, HALO, PAPER = "#212529", "#495057", "#adb5bd", "#ced4da", "#f1f3f5"
FULL, EMPTY = "#2b8a3e", "#862e9c"  # barriers
AXIS, LONG = Axis(4, 2, 1, 1), Axis(16, 8, 4, 1)
# k4 s2 p1 from 64 to 128 channels of 16 bits, NCHW out: 16 pixels a row, 128 an accumulator, 64 channels, bulk copies.
FORM = 16, 128, 64, "tiles", True, False, (1, 2), "bulk", False, "channels", "width", 8, 4, False
TILE = shift.make((Axis(1, 1, 0, 1), AXIS, AXIS), "bf16", 64, 128, *FORM)
SHIFTS = [{divmod(block, AXIS.kernel): by for _, block, by in taps} for taps in TILE.taps]  # of (kh, kw), by phase
WIDTH, HEIGHT = 90, 132  # tenths of an inch

plt.rcParams.update({"svg.hashsalt": "tconv", "svg.fonttype": "none", "font.size": 8, "font.sans-serif": "DejaVu Sans"})
figure = plt.figure(figsize=(WIDTH / 10, HEIGHT / 10))
ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
ax.axis("off")


def text(x, y, words, colour=INK, ha="center", **more):
    ax.text(x, y, words, color=colour, ha=ha, va="center", linespacing=1.3, **more)


def title(y, words, more):
    text(2, y, words, ha="left", fontsize=11, weight="bold")
    text(2, y + 2.2, more, LINE, ha="left")


def box(x, y, width, height, face="white", edge=LINE, words="", colour=INK):
    ax.add_patch(plt.Rectangle((x, y), width, height, fc=face, ec=edge, linewidth=0.8, clip_on=False))
    if words:
        text(x + width / 2, y + height / 2, words, colour)


def line(points, colour, width=0.9, style="-"):
    ax.plot(*zip(*points), color=colour, linewidth=width, linestyle=style, solid_capstyle="butt", clip_on=False)


def arrow(start, end, colour=LINE, width=1.0, style="-"):
    how = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops={"color": colour, "linewidth": width, "linestyle": style, **how})


def grid(x, y, columns, rows, width, height):
    """Its lines as one path."""
    down = [(x + i * width, at) for i in range(columns + 1) for at in (y, y + rows * height, nan)]
    across = [(at, y + i * height) for i in range(rows + 1) for at in (x, x + columns * width, nan)]
    line(down + across, GRID, 0.5)


def tile(top):
    t, cell, x, y = TILE, 1.6, 2, top + 7.5
    words = f"k4 s2 p1: {t.rows} rows of {t.useful} pixels and their halo, {t.kb} channels: one reading for all {AXIS.kernel**2} taps"
    title(top, "1. The tile: every tap sees it from another pixel on", words)
    text(x + t.box * cell / 2, y - 1.8, f"{t.halo_rows} rows of box = {t.box} input pixels")
    box(x, y, t.box * cell, t.halo_rows * cell, HALO)
    box(x - t.low_w * cell, y - t.low[0] * cell, t.useful * cell, t.rows * cell, "white", "none")
    grid(x, y, t.box, t.halo_rows, cell, cell)
    box(x, y + 17.4, cell, cell, HALO)
    text(x + 2.2, y + 18.2, "halo", ha="left")
    # Shared memory: the 16 bytes of channels 0 to 7 are where the swizzle of 128 bytes puts them.
    strip, high, shown = 38, 0.72, 23
    text(strip + 4, y - 2.4, f"shared memory: a pixel\na row of {t.kb * t.size} bytes, swizzled")
    line([(strip + r % 8 + i, y + (r + 0.5) * high) for r in range(shown) for i in (0, 1, nan)], GRID, 7.2 * high)
    grid(strip, y, 8, shown, 1, high)
    for r in (0, 8, 16):
        text(strip - 0.5, y + (r + 0.5) * high, f"pixel {r}", LINE, ha="right")
    box(strip - 5.2, y + 17.4, 1.6, 1.6, GRID, "none")
    text(strip - 3, y + 18.2, "channels 0 to 7: 16 bytes", ha="left")
    for g, (kh, kw) in enumerate(((1, 1), (3, 0))):
        begin, style = SHIFTS[0][kh, kw], "--" if g else "-"
        (r0, c0), (r1, c1) = divmod(begin, t.box), divmod(begin + t.pixels, t.box)
        corners = (c0, r0), (t.box, r0), (t.box, r1), (c1, r1), (c1, r1 + 1), (0, r1 + 1), (0, r0 + 1), (c0, r0 + 1)
        inside = [(min(max(c, 0.25 * g), t.box - 0.25 * g), r) for c, r in (*corners, corners[0])]
        line([(x + c * cell, y + r * cell) for c, r in inside], ACC[g], 1.8, style)
        line([(x + 7 + g * 10, y + 18.2), (x + 9 + g * 10, y + 18.2)], ACC[g], 1.8, style)
        text(x + 9.6 + g * 10, y + 18.2, f"w[{kh},{kw}] sees", ACC[g], ha="left")
        arrow((strip + 9 + g, y + begin * high), (strip + 9 + g, y + shown * high), ACC[g], 1.8, style)
        text(strip + 10.6, y + (begin + 0.6) * high, f"from {begin}", ACC[g], ha="left")
    # The product of w[1,1].
    left, wide, low, begin = 65, 22, y + 7.2, SHIFTS[0][1, 1]
    unused = (t.box - t.useful) / t.box * wide / t.rows
    text(left + wide / 2, y - 1.2, "operand B of tap w[1,1]")
    words = f"the tile from pixel {begin} on:\n{t.kb} channels x {t.pixels} pixels"
    box(left, y, wide, 6, PALE[0], ACC[0], words, ACC[0])
    text(left - 4.2, low - 1.2, "operand A")
    box(left - 7.2, low, 6, 6, PALE[0], ACC[0], f"w[1,1]\n{shift.M} x {t.kb}", ACC[0])
    ends = [left + r * wide / t.rows for r in range(1, t.rows + 1)]
    line([(x - unused / 2, at) for x in ends for at in (low, low + 6, nan)], HALO, 7.2 * unused)
    box(left, low, wide, 6, "none", ACC[0])
    text(left + wide / 2, low + 7.4, f"acc 0: {shift.M} rows x {t.pixels} pixels", ACC[0])
    words = f"Its pixel n reads the tile's pixel n + {begin}. Where\nn % {t.box} is {t.useful} or more (grey), it stores nothing."
    text(left + 7.4, y + 17.5, words)


def ring(y, what, who, names):
    """A ring in shared memory, who fills it and from where, and the way to who empties it."""
    box(2, y, 9, 7, words=what)
    arrow((11, y + 3.5), (15, y + 3.5))
    box(15, y, 21, 7, words=who)
    for i, name in enumerate(names):
        box(45 + i * 5.6, y, 5.6, 3, PAPER, LINE, name)
    for down, name, colour, end in ((1.5, "", LINE, 45), (4.2, "full", FULL, 40), (6, "empty", EMPTY, 40)):
        for span in ((36, end), (45 + len(names) * 5.6, 67)):
            arrow(*((x, y + down) for x in (span if name != "empty" else span[::-1])), colour)
        text(44.2, y + down, name, colour, ha="right")
        dots = [47.8 + i * 5.6 for i in range(len(names) if name else 0)]
        ax.plot(dots, [y + down] * len(dots), "o", mfc="white" if name == "empty" else colour, color=colour, ms=5)


def rings(top):
    words = "One CTA an SM walks over tiles. Who brings waits for a stage's empty and sets full; who multiplies, the reverse."
    title(top, "2. The rings: some warps bring, others multiply", words)
    columns = (6.5, "global memory"), (25.5, "warps that bring"), (53.4, "shared memory"), (77.5, "warps that multiply")
    for x, words in columns:
        text(x, top + 5.4, words, weight="bold")
    x_row, w_row, y_row, work = top + 7, top + 16, top + 26, top + 33
    words = "bulk copies: 1 warp\nthreads: 4 warps, by registers\nstaged: bulk copies, then threads"
    ring(x_row, "input x", words, ("stage 0", "stage 1", "..."))
    words = "1 warp; none where all blocks\nfit: these are brought once,\nbefore the first tile"
    ring(w_row, "weight,\npacked", words, (f"{shift.M} x KB", f"{shift.M} x KB", "..."))
    for group, x in (0, 67), (1, 78):
        box(x, x_row, 10, 16, PAPER)
        text(x + 5, x_row + 2.4, f"group {group}:\n4 warps")
        for g in range(2):
            box(x + 0.6 + g * 4.6, x_row + 5, 4.2, 5, PALE[g], ACC[g], f"acc\n{g}", ACC[g])
        text(x + 5, x_row + 13, "all taps of a\nstage, then\nthe next")
        arrow((x + 5, x_row + 16), (x + 5, y_row))
    box(67, y_row, 21, 5, words="bias; in NCHW, phases\ninterleaved; chunk by chunk")
    box(45, y_row, 16.8, 5, PAPER, words="output buffer,\none a consumer")
    box(2, y_row, 9, 5, words="output y")
    arrow((67, y_row + 2.5), (61.8, y_row + 2.5))
    arrow((45, y_row + 2.5), (11, y_row + 2.5))
    text(28, y_row + 1.1, "read back and stored by the same warps,")
    text(28, y_row + 3.9, "along the pixels or the channels")
    text(2, work + 1.5, "How the groups\nshare tiles:", ha="left")
    for x, parts, words in (
        (15, ("01", "01"), "halves: one multiplies\nwhile the other stores"),
        (39, ("0", "1"), "every other tile: so, too;\nneeds all weights there"),
        (64, (["0 + 1"], ["0 + 1"]), "together: one consumer\nof 8 warps, half the code"),
    ):
        for i, part in enumerate(parts):
            for j, who in enumerate(part):
                box(x + i * 4.1, work + j * 3 / len(part), 3.6, 3 / len(part), PAPER, LINE, who)
        text(x + 8.8, work + 1.5, words, ha="left")


def phases(top):
    words = "k4 s2 p1: all outputs of a phase take the same taps, w[k], at the same offsets from their input pixel q"
    title(top, "3. The phases: along the width, an accumulator each", words)
    y = top + 7
    for g in range(AXIS.stride):
        x = 2 + g * 22
        words = f"y[2q+{g}] = " + " + ".join(f"w[{k}] x[q{d:+d}]" for k, d in AXIS.taps(g))
        text(x + 9, y - 1.4, words.replace("+0", ""), ACC[g])
        text(x + (0.9, 17.1)[g], y + 8, f"acc {g}", ACC[g])
        for i in range(6):
            box(x + i * 3, y, 3, 2, "white" if 0 < i < 5 else HALO, LINE, f"x{i - 1}")
        for q in range(4):
            at, end, name = x + 4.5 + q * 3, 7.2 + q * 8 + g * 4, f"y{2 * q + g}"
            for k, d in AXIS.taps(g):
                line([(at + d * 3, y + 2), (at, y + 7)], ACC[g])
                if q == 2:
                    patch = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                    text(at + d * 2.2, y + 3.4, f"w{k}", ACC[g], bbox=patch)
            line([(at, y + 9), (end, y + 15)], ACC[g])
            box(at - 1.5, y + 7, 3, 2, PALE[g], ACC[g], name, ACC[g])
            box(end - 2, y + 15, 4, 2, PALE[g], ACC[g], name, ACC[g])
    words = "NCHW: interleaved on the way to the buffer, so that\nneighbouring threads store neighbouring pixels"
    text(22, y + 19.8, words)
    words = "In two dimensions: taps w[kh,kw] on the 3 x 3 inputs around\na pixel, and from which pixel of the tile in 1 they see it"
    text(71, y - 2, words)
    for a in range(AXIS.stride):
        text(51.5, y + 6.1 + a * 11, f"phase {a}\nalong the\nheight")
        for b in range(AXIS.stride):
            x, row = 56 + b * 16.6, y + 1 + a * 11
            box(x, row, 15.6, 10.2)
            grid(x, row, 3, 3, 5.2, 3.4)
            for kh, dh in AXIS.taps(a):
                for kw, dw in AXIS.taps(b):
                    words = f"w[{kh},{kw}]\n{SHIFTS[a][kh, kw]}"
                    box(x + (dw + 1) * 5.2, row + (dh + 1) * 3.4, 5.2, 3.4, PALE[b], ACC[b], words, ACC[b])
            box(x + 5.2, row + 3.4, 5.2, 3.4, "none", INK)
    for b in range(AXIS.stride):
        text(63.8 + b * 16.6, y + 24.4, f"acc {b}: phase {b}\nalong the width", ACC[b])


def folds(top):
    f, y = shift.fold(LONG, *shift.folds(LONG, 384)[0]), top + 6
    words = f"k16 s8 p4: the {shift.M} rows are {f.channels} channels times F = {f.phases} phases"
    title(top, "4. Folding: more phases than accumulators", f"{words}, with a block of weights for each input offset")
    for g in range(f.accumulators):
        x = 2 + g * 29
        text(x + 3, y - 1.2, f"acc {g}", ACC[g])
        grid(x, y, 1, f.channels, 6, 16 / f.channels)
        box(x, y, 6, 16 / f.channels, PALE[g], ACC[g])
        box(x, y, 6, 16, "none", ACC[g])
        zoom = (6, 0), (8.4, 2), (8.4, 2 + 2 * f.many[g]), (6, 16 / f.channels)
        line([(x + i, y + j) for i, j in zoom], ACC[g])
        for i in range(f.count[g]):
            text(x + 17.2 + i * 5, y + 1, f"x[q{f.low[g] + i:+d}]".replace("+0", ""), ACC[g])
        for r in range(f.many[g]):
            b = f.first[g] + r
            text(x + 14.2, y + 3 + 2 * r, f"phase {b}", ACC[g], ha="right")
            box(62 + b * 3.25, y + 2, 3.25, 2, PALE[g], ACC[g], str(b), ACC[g])
            for k, d in LONG.taps(b):
                box(x + 14.7 + (d - f.low[g]) * 5, y + 2 + 2 * r, 5, 2, PALE[g], ACC[g], f"w{k}", ACC[g])
        text(x + 16.6, y + 13.4, f"channel 0: its {f.phases} rows\nof {f.count[g]} blocks of weights")
    text(75, y + 1, f"y[{LONG.stride}q + phase], stored together in NCHW")
    words = "All phases of an accumulator must read\nthe same offsets: where one does not, a weight\nof zero would make a NaN of an infinity."
    text(60.5, y + 8.5, words, ha="left")


def main():
    tile(2)
    rings(32)
    phases(72.5)
    folds(108)
    figure.savefig(Path(__file__).with_name("shift.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
