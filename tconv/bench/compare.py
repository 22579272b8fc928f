"""What moved between two results beyond the noise."""

from __future__ import annotations

from dataclasses import dataclass

from .report import KEY, geomean, model_rows, noise


@dataclass(frozen=True)
class Change:
    """One row's time in both results; `moved` says whether the difference is beyond the noise."""

    before: dict
    after: dict

    @property
    def ratio(self) -> float:
        """How many times faster it has become."""
        return self.before["ms"] / self.after["ms"]

    @property
    def noise(self) -> float:
        """Milliseconds by which the medians may differ."""
        return noise(self.before, self.after)

    @property
    def moved(self) -> bool:
        return abs(self.before["ms"] - self.after["ms"]) > self.noise

    def cells(self) -> list[str]:
        r = self.after
        name = f"{r['case']} {r['pass']} {r['precision']} {r['memory_format']}"
        word = "faster" if self.ratio > 1 else "slower"
        times = f"{self.before['ms']:.4f}", f"{self.after['ms']:.4f}", f"{self.noise:.4f}"
        kernels = dict.fromkeys(row.get("family") or "" for row in (self.before, r))
        return [name, r["provider"], " -> ".join(kernels), *times, f"{max(self.ratio, 1 / self.ratio):.2f}x {word}"]


COLUMNS = ["case", "provider", "kernel", "before ms", "after ms", "noise ms", ""]
DIFFERENCES = ("device", "gpus", "driver", "torch", "triton", "cudnn", "commit")  # of heads


def _by_key(result: dict) -> dict[tuple, dict]:
    return {(*(r[k] for k in KEY), r["provider"]): r for r in (*result["rows"], *model_rows(result))}


def changes(before: dict, after: dict) -> list[Change]:
    """Every row that was timed in both results."""
    old, new = _by_key(before), _by_key(after)
    ok = [k for k in new if k in old and new[k]["status"] == old[k]["status"] == "ok"]
    return [Change(old[k], new[k]) for k in ok]


def statuses(before: dict, after: dict) -> list[list[str]]:
    """Rows of both results whose status is another one now."""
    old, new = _by_key(before), _by_key(after)
    return [
        [" ".join(k[1:5]), k[5], f"{old[k]['status']} -> {new[k]['status']}", new[k]["note"] or ""]
        for k in new
        if k in old and new[k]["status"] != old[k]["status"]
    ]


def missing(before: dict, after: dict) -> int:
    """How many rows are in one of the results alone."""
    return len(_by_key(before).keys() ^ _by_key(after).keys())


def remarks(before: dict, after: dict) -> list[str]:
    """What to know before believing the comparison: other machines or versions, and how far the machine drifted."""
    notes = []
    pairs = [(name, before["head"].get(name), after["head"].get(name)) for name in DIFFERENCES]
    pairs += [
        (name, before.get("settings", {}).get(name), after.get("settings", {}).get(name))
        for name in ("budget", "fewest", "most")
    ]
    notes += [f"{name} differs: {old} and {new}" for name, old, new in pairs if old != new]
    found = changes(before, after)
    others = [c.ratio for c in found if c.after["provider"].startswith("cudnn")]
    if others:
        notes.append(
            f"cuDNN's times, which no change of tconv moves, are {geomean(others):.3f}x as fast in the second "
            f"result (geometric mean of {len(others)})"
        )
    own = [c.ratio for c in found if c.after["provider"] == "tconv"]
    if own:
        notes.append(f"tconv is {geomean(own):.3f}x as fast (geometric mean of {len(own)})")
    only = missing(before, after)
    if only:
        notes.append(f"{only} rows are in one result alone")
    return notes
