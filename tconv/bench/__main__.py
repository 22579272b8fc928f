"""`python -m tconv.bench`: run, list, report, compare."""

from __future__ import annotations

import argparse
import os
import sys
from itertools import product
from pathlib import Path

from . import cases
from .terminal import Plain, Refused, Rich, table

# What is measured when nothing else is asked for: (passes, precisions, memory formats).
SUITE_AXES = (("forward", "backward_input", "backward_weight"), ("tf32", "bf16"), ("contiguous",))
LAYER_AXES = (cases.PASSES, ("tf32", "bf16"), ("contiguous", "channels_last"))

_EPILOG = """without a subcommand: run.  docs/benchmarks.md says how it measures and what each figure means.

examples:
  python -m tconv.bench
  python -m tconv.bench --suite kernelbench zoo --output all.json
  python -m tconv.bench --layer "convtranspose2d 256 128 k4 s2 p1 @ 16x256x32x32"
  python -m tconv.bench --model package.module:factory
  python -m tconv.bench compare before.json after.json
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m tconv.bench", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="check and measure (the default)")
    listing = commands.add_parser("list", help="what a run would do: cases, classes, work")
    for sub in (run, listing):
        sub.add_argument("--suite", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(cases.SUITES)}")
        sub.add_argument("--layer", action="append", default=[], metavar="TEXT", help="a layer of your own, in words")
        sub.add_argument(
            "--match", default="", metavar="REGEX", help="only cases whose suite, name, description or classes match"
        )
        sub.add_argument("--plain", action="store_true", help="plain lines, without rich")
    run.add_argument("--model", metavar="MODULE:FACTORY", help="a callable that returns (model, example inputs)")
    run.add_argument(
        "--pass", dest="passes", nargs="+", choices=cases.PASSES, help="default: forward and the gradients"
    )
    run.add_argument("--precision", nargs="+", choices=cases.PRECISIONS, help="default: tf32 bf16")
    run.add_argument("--format", dest="formats", nargs="+", choices=cases.FORMATS, help="default: contiguous")
    run.add_argument("--provider", nargs="+", metavar="NAME", help="names, or module:function for one of your own")
    run.add_argument(
        "--output", default="tconv-bench.json", metavar="FILE", help="default: %(default)s; a .csv beside it"
    )
    run.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    run.add_argument("--quick", action="store_true", help="fewer repetitions, no cold first calls")
    run.add_argument("--budget", type=float, metavar="S", help="seconds of timing a pass of a case; default 0.1")
    run.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds a case or a model may take; default 300"
    )
    run.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that share the cases; default 1")
    run.add_argument(
        "--compilers",
        type=int,
        metavar="N",
        help="processes that compile beforehand; 0 for none; default: half the cores",
    )

    report = commands.add_parser("report", help="tables and charts of results")
    report.add_argument("results", nargs="+", metavar="RESULT.json")
    report.add_argument("--markdown", metavar="FILE", help="write the tables as Markdown, instead of showing them")
    report.add_argument("--into", metavar="FILE", help="the same, between the two markers of a Markdown file")
    report.add_argument("--plots", metavar="FOLDER", help="write speedup.svg and roofline.svg; Markdown shows them")
    report.add_argument("--summary", action="store_true", help="only the speed-ups by suite and by class")
    report.add_argument("--plain", action="store_true", help="plain lines, without rich")

    compare = commands.add_parser("compare", help="what moved beyond the noise")
    compare.add_argument("before", metavar="A.json")
    compare.add_argument("after", metavar="B.json")
    compare.add_argument("--all", action="store_true", help="every provider, not tconv's alone")
    compare.add_argument("--plain", action="store_true", help="plain lines, without rich")
    return p


def settings_of(args):
    from . import providers
    from .store import Settings

    alone = bool(args.layer) and not args.suite
    passes, precisions, formats = LAYER_AXES if alone else SUITE_AXES
    settings = Settings(
        suites=args.suite or ([] if args.layer else ["core"]),
        layers=args.layer,
        passes=list(args.passes or passes),
        precisions=list(args.precision or precisions),
        formats=list(args.formats or formats),
        providers=list(args.provider or (providers.PROVIDERS if alone else providers.DEFAULT)),
        match=args.match,
        timeout=args.timeout,
        gpus=args.gpus,
        gpu=_has_gpu(),
    )
    if not 1 <= args.gpus <= max(1, _gpus()):
        raise Refused(f"--gpus {args.gpus}: this machine has {_gpus()}")
    for name in settings.providers:
        providers.find(name)
    if args.quick:
        settings.budget, settings.fewest, settings.most, settings.first_calls = 0.05, 3, 20, 0
    if args.budget is not None:
        settings.budget = args.budget
    settings.compilers = (os.cpu_count() or 1) // 2 if args.compilers is None else args.compilers
    return settings


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def command_run(args) -> int:
    if args.model:
        return _run_model(args)
    from .run import run, tasks
    from .store import Store

    settings = settings_of(args)
    if not tasks(settings):
        raise Refused(
            "no case is left: nothing matches (1-d layers have no channels_last, whole problems run forward alone)"
        )
    if not settings.gpu:
        print("No CUDA device: cases are checked on shrunken sizes in Triton's interpreter; nothing is measured.")
    progress = Plain() if args.plain else Rich()
    store = Store(Path(args.output), settings, args.resume)
    try:
        with progress:
            run(settings, store, progress)
    except Refused:
        store.stop()
        raise
    except KeyboardInterrupt:
        store.stop()
        print(f"\nstopped after {len(store.done)} of {len(tasks(settings))}; the same command with --resume goes on")
        return 130
    result = store.finish(settings)
    show(result, args.plain, cases=not settings.gpu or len(store.done) <= 8)
    if not settings.gpu:
        checked = sum(r["status"] == "checked" for r in result["rows"])
        print(f"No CUDA device: {checked} results were checked on shrunken sizes, nothing was measured.")
    print(f"written: {args.output}, {Path(args.output).with_suffix('.csv')}")
    return int(any(r["status"] in ("wrong", "crashed", "timeout") for r in result["rows"]))


def _run_model(args) -> int:
    if args.gpus != 1:
        raise Refused(f"--gpus {args.gpus}: a model is measured on one GPU")
    of_cases = ("suite", "layer", "match", "passes", "provider", "resume", "compilers")
    if given := [name.replace("passes", "pass") for name in of_cases if getattr(args, name)]:
        raise Refused(
            f"--{given[0]} is about cases; a model has its inference and its training step, on torch and on tconv"
        )
    if not _has_gpu():
        from .model import describe_model

        print(describe_model(args.model))
        print("No CUDA device: nothing was measured.")
        return 0
    from .run import run_models
    from .store import dump

    budget, most = (0.5, 20) if args.quick else (5.0, 100)
    common = {"mode": "model", "gpu": True, "spec": args.model, "budget": args.budget or budget, "most": most}
    axes = product(args.precision or ("tf32",), args.formats or ("contiguous",))
    requests = [common | {"precision": precision, "memory_format": form} for precision, form in axes]
    result: dict = {"head": {}, "settings": {}, "rows": [], "models": []}
    output = Path(args.output)
    if not os.access(output.parent, os.W_OK):  # known before the time is spent
        raise Refused(f"cannot write {output}")
    try:
        for told in run_models(requests, args.timeout):
            result["head"] = result["head"] or told["head"]
            result["models"].append(told["model"])
            print(told["model"].get("converted") or told["model"]["check"]["note"], flush=True)
            output.write_text(dump(result))
    except KeyboardInterrupt:
        print(f"\nstopped after {len(result['models'])} of {len(requests)}")
        return 130
    show(result, args.plain)
    print(f"written: {args.output}")
    return int(any(m["check"]["status"] != "ok" for m in result["models"]))


def show(result: dict, plain: bool, cases: bool = True, summary: bool = False) -> None:
    """Print a result's tables."""
    from . import report

    for head in report.heads(result):
        print(report.describe_head(head))
    for title, columns, rows in report.sections(result, cases, summary):
        table(title, columns, rows, plain)


def command_list(args) -> int:
    names = args.suite or ([] if args.layer else ["core"])
    rows = []
    found = [case for name in names for case in cases.suite(name)]
    for text in args.layer:
        layer = cases.parse_layer(text)
        found.append(cases.Case("layer", "", (layer,)))
    from .run import matches

    for case in found:
        if matches(args.match, case.suite, case):
            work = f"{case.flops('forward') / 1e9:.2f}", f"{case.bytes('forward', 4) / 1e6:.1f}"
            rows.append([case.suite, case.name, case.description, *work, ", ".join(cases.classes(case.layer))])
    if not rows:
        raise Refused(f"no case matches {args.match!r}")
    table("", ["suite", "case", "layer", "GFLOP", "MB fp32", "classes"], rows, args.plain)
    print(f"{len(rows)} cases")
    return 0


def command_report(args) -> int:
    from . import plots, report

    results = [report.load(path) for path in args.results]
    merged = report.merge(results)
    if not args.markdown and not args.into:
        show(merged, args.plain, summary=args.summary)
    charts = plots.draw(merged, args.plots) if args.plots else []
    if args.markdown:
        Path(args.markdown).write_text(report.markdown(merged, args.summary, charts, args.markdown), encoding="utf-8")
    if args.into:
        report.put_into(args.into, report.markdown(merged, args.summary, charts, args.into))
    written = [str(path) for path in (*charts, args.markdown, args.into) if path]
    if written:
        print("written: " + ", ".join(written))
    return 0


def command_compare(args) -> int:
    from . import compare, report

    before, after = report.load(args.before), report.load(args.after)
    for note in compare.remarks(before, after):
        print(note)
    found = compare.changes(before, after)
    if not args.all:
        found = [c for c in found if c.after["provider"].startswith("tconv")]
    moved = sorted((c for c in found if c.moved), key=lambda c: c.ratio)
    if moved:
        table("Beyond the noise, slowest first", compare.COLUMNS, [c.cells() for c in moved], args.plain)
    changed = compare.statuses(before, after)
    if changed:
        table("Status changed", ["case", "provider", "status", "why"], changed, args.plain)
    print(f"{len(moved)} of {len(found)} rows moved beyond the noise")
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"run": command_run, "list": command_list, "report": command_report, "compare": command_compare}
    if not argv or (argv[0] not in commands and argv[0] not in ("-h", "--help")):
        argv.insert(0, "run")
    args = parser().parse_args(argv)
    try:
        return commands[args.command](args)
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Refused, ValueError, OSError) as error:
        print(f"tconv.bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
