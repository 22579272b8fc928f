"""Results turned into tables: speed-ups, their geometric mean, the worst case, losses, by axis and by class.

Rows are dicts as a run writes them; nothing here needs a GPU.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .cases import CLASSES
from .store import stopped, task_id

KEY = ("suite", "case", "pass", "precision", "memory_format")
BAD = ("wrong", "error", "crashed", "timeout", "skipped")
BEGIN, END = "<!-- tconv.bench report: begin -->", "<!-- tconv.bench report: end -->"
LONG = 30  # rows; a longer table is folded in Markdown
MOST, WORST = 400, 100  # of more cases than the first, so many are listed: those furthest behind


# Medians differ by more than the spread within each (clocks, temperature, where memory lies), so a difference below this
# share is never called one.
FLOOR = 0.03


def noise(one: dict, other: dict) -> float:
    """Milliseconds by which two rows' medians may differ: both interquartile ranges, and at least FLOOR."""
    return max(FLOOR * min(one["ms"], other["ms"]), one["ms_spread"] + other["ms_spread"])


@dataclass(frozen=True)
class Speedup:
    """One case's time on tconv beside the best other provider's."""

    row: dict
    rival: dict

    @property
    def ratio(self) -> float:
        return self.rival["ms"] / self.row["ms"]

    @property
    def eager(self) -> float:
        """The ratio where call follows call in eager code: a call takes the device's time or the host's, whichever is longer."""
        return _with_host(self.rival) / _with_host(self.row)

    @property
    def lost(self) -> bool:
        """Whether tconv is slower beyond the noise."""
        return self.row["ms"] - self.rival["ms"] > noise(self.row, self.rival)

    @property
    def left(self) -> bool:
        return "aten" in (self.row.get("family") or "").split(",")

    @property
    def name(self) -> str:
        r = self.row
        return f"{r['case']} {r['pass']} {r['precision']}" + (
            " channels_last" if r["memory_format"] == "channels_last" else ""
        )


def _with_host(row: dict) -> float:
    return max(row["ms"], row["host_us"] / 1e3)


@dataclass(frozen=True)
class Summary:
    """Of some speed-ups: how many, their geometric mean, that with the host's time (Speedup.eager), that of tconv's shares of the
    roof and of what it can reach (NaN where not all of it was measured), how many are losses beyond the noise, how many are of passes that tconv leaves to aten (a training step counts if one of
    its passes is left), and the worst."""

    label: str
    count: int
    geomean: float
    eager: float
    roof: float
    reach: float
    losses: int
    left: int
    worst: Speedup

    def cells(self) -> list[str]:
        worst = f"{self.worst.ratio:.2f}x {self.worst.name} (to {self.worst.rival['provider']})"
        ratios = (
            f"{self.geomean:.2f}x",
            f"{self.eager:.2f}x",
            *("" if math.isnan(s) else f"{100 * s:.0f}%" for s in (self.roof, self.reach)),
        )
        return [self.label, str(self.count), *ratios, str(self.losses), str(self.left), worst]


SUMMARY_COLUMNS = ["", "cases", "geomean", "eager", "of roof", "of reach", "losses", "left to aten", "worst"]


def load(path: str) -> dict:
    """A result file, or a stopped run's partial one.  Raises ValueError where it is neither."""
    try:
        result = stopped(Path(path)) if path.endswith(".partial") else json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a result of tconv.bench: {error}") from error
    if not isinstance(result, dict) or "rows" not in result or "head" not in result:
        raise ValueError(f"{path} is not a result of tconv.bench: it has no head and rows")
    if odd := next((row for row in result["rows"] if not {*KEY, "provider", "status"} <= row.keys()), None):
        raise ValueError(f"{path} is not a result of tconv.bench: a row has only {', '.join(odd)}")
    return result


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def speedups(rows: list[dict], provider: str = "tconv") -> list[Speedup]:
    """For each case that `provider` was timed on, its best rival: those marked so, or of its kind under a CUDA graph."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["status"] == "ok":
            groups.setdefault(tuple(row[k] for k in KEY), []).append(row)
    found = []
    for group in groups.values():
        own = [r for r in group if r["provider"] == provider]
        if not own:
            continue
        graph = own[0]["graph"]
        rivals = [r for r in group if r["provider"] != provider and r["rival"] and r["graph"] == graph]
        if rivals:
            found.append(Speedup(own[0], min(rivals, key=lambda r: r["ms"])))
    return found


def summarise(label: str, found: list[Speedup]) -> Summary:
    ratios = [s.ratio for s in found]
    worst = min(found, key=lambda s: s.ratio)
    eager, roof = geomean(s.eager for s in found), geomean(s.row["roof_share"] for s in found)
    shares = [(s.row.get("reach_ms") or math.nan) / s.row["ms"] for s in found]
    lost, left = sum(s.lost for s in found), sum(s.left for s in found)
    return Summary(label, len(found), geomean(ratios), eager, roof, geomean(shares), lost, left, worst)


def by_axis(found: list[Speedup], suites: bool = True) -> list[Summary]:
    """One line for each suite (or all of them together), precision, memory format and pass that was measured, in that order
    of appearance."""
    groups: dict[str, list[Speedup]] = {}
    axes = ("suite",) * suites + ("precision", "memory_format", "pass")
    for s in found:
        groups.setdefault(" ".join(s.row[axis] for axis in axes), []).append(s)
    return [summarise(label, group) for label, group in groups.items()]


def by_class(found: list[Speedup]) -> list[Summary]:
    """One line for each class that has a case, and one for all."""
    groups = {c: [s for s in found if c in s.row["classes"]] for c in CLASSES}
    lines = [summarise(c, group) for c, group in groups.items() if group]
    return [*lines, summarise("all", found)] if found else []


def failures(rows: list[dict]) -> list[list[str]]:
    """Case, provider, status and note of everything that was not timed."""
    return [
        [
            " ".join(filter(None, (r["case"], r["pass"], r["precision"], r["memory_format"]))),
            r["provider"],
            r["status"],
            r["note"] or "",
        ]
        for r in rows
        if r["status"] in BAD
    ]


CASE_COLUMNS = [
    "case",
    "kernel",
    "tconv ms",
    "spread",
    "TFLOP/s",
    "GB/s",
    "of roof",
    "host us",
    "best other",
    "ms",
    "speed-up",
]


def case_cells(s: Speedup) -> list[str]:
    """One case's line in the table of all cases."""
    r = s.row
    own = [f"{r['ms']:.4f}", f"{r['ms_spread']:.4f}", f"{r['tflops']:.1f}", f"{r['gbps']:.0f}"]
    own += [f"{100 * r['roof_share']:.0f}%", f"{r['host_us']:.0f}"]
    return [
        s.name,
        (r.get("family") or "").replace(",", ", "),
        *own,
        s.rival["provider"],
        f"{s.rival['ms']:.4f}",
        f"{s.ratio:.2f}x",
    ]


def merge(results: list[dict]) -> dict:
    """Several results as one.  A case that more than one of them holds comes from the first, with all its providers; what one of
    them says of a whole case (that it took too long, say) holds unless another has measured the case."""
    rows: list[dict] = []
    measured = [{task_id(r) for r in result["rows"] if r["pass"]} for result in results]
    for i, result in enumerate(results):
        known = {tuple(r[k] for k in KEY) for r in rows}
        elsewhere = set().union(*measured[:i], *measured[i + 1 :])
        rows += [
            r
            for r in result["rows"]
            if tuple(r[k] for k in KEY) not in known and (r["pass"] or task_id(r) not in elsewhere)
        ]
    lists = {key: [r for x in results for r in x.get(key) or ()] for key in ("first_calls", "models")}
    return dict(results[0], rows=rows, heads=[x["head"] for x in results], **lists)


def heads(result: dict) -> list[dict]:
    """The heads of a result, or of all that were merged into it."""
    return result.get("heads") or [result["head"]]


def _named(head: dict, *keys: str) -> str:
    return ", ".join(str(head[k]) if k == "device" else f"{k} {head[k]}" for k in keys if head.get(k))


VERSIONS = "device", "driver", "torch", "triton", "cudnn"


def describe_versions(heads: list[dict]) -> list[str]:
    """A line for each device and versions that several results come from, with what they were run on."""
    runs: dict[str, list[str]] = {}
    for head in heads:
        when = " ".join(filter(None, (_named(head, "commit"), f"({head['date'][:10]})" if head.get("date") else "")))
        runs.setdefault(_named(head, *VERSIONS), []).append(when)
    return [", ".join([versions, *dict.fromkeys(filter(None, whens))]) for versions, whens in runs.items()]


def describe_head(head: dict) -> str:
    """The device and versions, and the roofs as they were measured."""
    text = _named(head, *VERSIONS, "commit", "date")
    if head.get("gpus", 1) > 1:
        text += f", {head['gpus']} GPUs shared the cases"
    roofs = head.get("roofs")
    if roofs:
        rates = ", ".join(f"{p} {v:.0f}" for p, v in roofs["matmul_tflops"].items())
        text += f"\nroofs measured in this run: copy {roofs['copy_gbps']:.0f} GB/s, matrix product {rates} TFLOP/s"
    clocks = head.get("clocks") or {}
    if clocks:
        text += "\nclocks read: " + ", ".join(f"{k} {v}" for k, v in clocks.items())
    if "stopped" in head:
        text += f"\nstopped after {head['stopped']} tasks (cases, precisions and memory formats)"
    if "all" in head.get("seconds", ()):
        text += f"\nthe run took {head['seconds']['all']:.0f} s"
    return text


def sections(result: dict, cases: bool = True, summary: bool = False) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables of a report: (title, columns, rows).

    Args:
        cases: the tables of cases too; of more than MOST, the WORST.
        summary: only what is timed from eager code, all suites together, and by class, and what was not timed.
    """
    rows = result["rows"]
    found = speedups(rows)
    tables = []
    cases = cases and not summary
    if found and cases:
        title, listed = "Cases: tconv and the best other provider", found
        if len(found) > MOST:
            title = f"Cases: the {WORST} of {len(found)} in which tconv is furthest behind the best other provider"
            listed = sorted(found, key=lambda s: s.ratio)[:WORST]
        tables.append((title, CASE_COLUMNS, [case_cells(s) for s in listed]))
    if found:
        tables.append(_summaries("Speed-up over the best other provider", by_axis(found, suites=not summary)))
        tables.append(_summaries("By class, all passes and precisions", by_class(found)))
    graphs = speedups(rows, "tconv-graph")
    if graphs and not summary:
        tables.append(_summaries("Small layers, both sides under a CUDA graph", by_axis(graphs)))
    first = [
        [f["name"], f["precision"], f["provider"], f"{f['ms'] / 1e3:.2f}"] for f in result.get("first_calls") or ()
    ]
    if first and not summary:
        tables.append(("Cold first call, seconds", ["case", "precision", "provider", "s"], first))
    checked = [r for r in rows if r["status"] == "checked"]
    if checked and cases:
        names = "case", "pass", "precision", "memory_format", "provider", "family", "checked_as"
        lines = [[*(r.get(name) or "" for name in names), f"{r['rms_err']:.1e}"] for r in checked]
        columns = ["case", "pass", "precision", "format", "provider", "kernel", "checked as", "rms error"]
        tables.append(("Checked on shrunken sizes; nothing was measured", columns, lines))
    for model in result.get("models") or ():
        tables += model_sections(model)
    bad = failures(rows)
    if bad and summary:
        tables.append(("Not timed", ["cases", "provider", "status", "results"], counted(bad)))
    elif bad:
        tables.append(("Not timed", ["case", "provider", "status", "why"], bad))
    return tables


def _summaries(title: str, found: list[Summary]) -> tuple[str, list[str], list[list[str]]]:
    """A table of summaries, without columns that none of them fills."""
    lines = [s.cells() for s in found]
    filled = [i for i in range(len(SUMMARY_COLUMNS)) if i == 0 or any(line[i] for line in lines)]
    return title, [SUMMARY_COLUMNS[i] for i in filled], [[line[i] for i in filled] for line in lines]


def counted(bad: list[list[str]]) -> list[list[str]]:
    """`failures` in short: of each provider and status the layers' names, and how many results."""
    found: dict[tuple[str, str], list[str]] = {}
    for case, provider, status, _ in bad:
        found.setdefault((provider, status), []).append(case.split()[0])
    return [[", ".join(dict.fromkeys(names)), *key, str(len(names))] for key, names in found.items()]


def model_sections(model: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables of a whole model: its steps, and its layers in them."""
    title = f"{model['spec']}, {model['precision']}, {model['memory_format']}"
    status = model["check"]["status"]
    if status in ("crashed", "timeout", "refused"):
        return [(f"{title}: {status.upper()}, not timed", ["", "why"], [["its process", model["check"]["note"]]])]
    errors = model["check"]["rms_err"]
    if status != "ok":
        why = f"rms error {errors['tconv']:.1e}, torch's is {errors['torch']:.1e}"
        return [(f"{title}: WRONG, not timed", ["", "why"], [["outputs and gradients against fp64", why]])]
    columns = ["step", "torch ms", "in transposed convolutions", "converted ms", "in them then", "speed-up"]
    steps, layers = [], []
    for row in model["rows"]:
        ms, share = row["ms"], row["share"]
        cells = [
            f"{ms['torch']:.3f}",
            f"{100 * share['torch']:.0f}%",
            f"{ms['tconv']:.3f}",
            f"{100 * share['tconv']:.0f}%",
        ]
        steps.append([row["mode"], *cells, f"{ms['torch'] / ms['tconv']:.2f}x"])
        for name, before in row["layers"]["torch"].items():
            after = row["layers"]["tconv"].get(name, math.nan)
            ratio = f"{before / after:.2f}x" if after else ""
            layers.append([name or "(the model itself)", row["mode"], f"{before:.3f}", f"{after:.3f}", ratio])
    return [
        (f"{title}: checked, rms error {errors['tconv']:.1e} (torch {errors['torch']:.1e})", columns, steps),
        (f"{title}: layers", ["layer", "step", "torch ms", "converted ms", "speed-up"], layers),
    ]


def model_rows(result: dict) -> list[dict]:
    """The steps of whole models as rows: pass "inference" or "training", provider "torch" or "tconv"."""
    rows = []
    for model in result.get("models") or ():
        of_model = {"suite": "model", "case": model["spec"], **{k: model[k] for k in ("precision", "memory_format")}}
        for step in model["rows"]:
            for provider, ms in step["ms"].items():
                figures = {"provider": provider, "ms": ms, "ms_spread": step["ms_spread"][provider]}
                rows.append(of_model | figures | {"pass": step["mode"], "status": "ok", "note": ""})
    return rows


def verdict(found: list[Speedup]) -> str:
    """What all cases come to, in sentences, the losses first."""
    s = summarise("", found)
    own, other = (statistics.median(r["host_us"] for r in rows) for rows in zip(*((x.row, x.rival) for x in found)))
    return (
        f"tconv is slower than the best other provider, beyond the noise, in **{s.losses} of {s.count}** cases"
        + (f", and leaves {s.left} to aten" if s.left else "")
        + f". The geometric mean of the speed-ups on the device is **{s.geomean:.2f}x**, the worst is {s.cells()[-1]}. The median call "
        f"keeps the host busy for {own:.0f} us, the best other provider's for {other:.0f} us: call after call in eager code, where the "
        f"longer of host and device decides, the geometric mean is **{s.eager:.2f}x**."
    )


def markdown(result: dict, summary: bool = False, charts: Iterable[Path] = (), page: str = "") -> str:
    """The report for a page, such as README: what it comes to, charts, tables; long tables last and folded."""
    found = speedups(result["rows"])
    told = heads(result)
    lines = describe_versions(told) if summary else [line for h in told for line in describe_head(h).splitlines()]
    text = ["  \n".join(lines), ""]
    if found:
        text += [verdict(found), ""]
    for chart in charts:
        text += [f"![{chart.stem}]({Path(os.path.relpath(chart, Path(page).parent)).as_posix()})", ""]
    tables = sections(result, summary=summary)
    for title, columns, rows in sorted(tables, key=lambda t: len(t[2]) > LONG):
        fold = len(rows) > LONG
        text += ["<details>", f"<summary>{title} ({len(rows)})</summary>", ""] if fold else [f"### {title}", ""]
        text += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        text += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        text += ["", "</details>", ""] if fold else [""]
    return "\n".join(text)


def put_into(path: str, text: str) -> None:
    """Replace what lies between the two markers of a Markdown file.  Raises ValueError where it has not both, once."""
    try:
        page = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end or BEGIN in rest or END in after:
        raise ValueError(f"{path} must hold the line {BEGIN} and below it {END}, once: the report goes between them")
    Path(path).write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
