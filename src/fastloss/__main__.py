"""``python -m fastloss info | check | bench``."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fastloss as fl


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (ImportError, argparse.ArgumentTypeError) as error:
        parser.exit(2, f"{parser.prog} {options.command}: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m fastloss", description=fl.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="what runs here: CPU, backends, threads, versions")
    info.set_defaults(run=_info)

    check = commands.add_parser(
        "check",
        help="hold every backend and instruction set against the reference",
        description="Hold every operation of every backend and instruction set of this machine "
        "against the NumPy reference; exit with 1 on a disagreement.  The first run compiles the "
        "Numba kernels, which takes a few minutes; later ones less than a minute.",
    )
    check.set_defaults(run=_check)

    bench = commands.add_parser(
        "bench",
        help="measure against copy and read, and against other libraries",
        description="Time and error of the backends and of installed peers, beside a parallel "
        "copy and read of the same arrays.  Lists are separated by commas.",
    )
    bench.set_defaults(run=_bench)
    add = bench.add_argument
    add("--backend", type=_list, help="default: all that work here")
    add("--shapes", type=_list, help="such as 1024x32000 or, with the axis, 8x21x512x512@1")
    add("--dtype", type=_list, default=["float32"], help="default: float32")
    add("--operation", type=_list, help="or all; default: losses and softmaxes without options")
    add("--num-threads", type=int, default=fl.get_num_threads(), help="default: %(default)s")
    add("--peers", type=_list, help="or none; default: all that are installed")
    add("--json", type=Path, metavar="FILE", help="write what was measured")
    add("--plot", type=Path, metavar="FILE", help="draw time over limit against C (svg, png, pdf)")
    add("--quick", action="store_true", help="seconds instead of minutes: small shapes, few calls")
    add(
        "--small",
        action="store_true",
        help="by default small shapes and logsumexp, too: what a call costs before its kernel",
    )
    add(
        "--sweep",
        action="store_true",
        help="also C from 1 to 200,000 at N x C = 2**25, and N from 1 to 2**22 at fixed C, of "
        "cross_entropy_with_grad, or else the first operation, in the first dtype",
    )
    return parser


def _list(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


def _chosen(option: str, names: Iterable[str], known: Iterable[str]) -> list[str]:
    known = list(known)
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{option} {name!r} is not one of {', '.join(known)}")
    return list(names)


def _info(options: argparse.Namespace) -> int:
    fl.show_config()
    return 0


def _check(options: argparse.Namespace) -> int:
    from fastloss._tools import check

    backends, missing = check.backends()
    for reason in missing.values():
        print(f"not checked: {reason}")
    print("largest difference from the reference, as a share of what is allowed")
    width = max(map(len, check.CHECKED)) + 1
    print(f"{'operation':<{width}}{'dtype':<10}" + "".join(f"{name:>20}" for name in backends))
    complaints = []
    for outcome in check.run(backends):
        shares = "".join(f"{share:>20.3g}" for share in outcome.worst.values())
        print(f"{outcome.operation:<{width}}{outcome.dtype:<10}{shares}", flush=True)
        complaints += [
            f"{name} disagrees: {outcome.operation}, {outcome.dtype}: {outcome.where[name]}"
            for name in outcome.disagreeing
        ]
    print(*complaints or [f"{len(backends)} builds agree with the reference"], sep="\n")
    return 1 if complaints or not backends else 0


def _bench(options: argparse.Namespace) -> int:
    from fastloss._tools import measure, report

    console = measure.need("rich.console").Console()
    if options.plot:
        measure.need("matplotlib")
    if options.num_threads < 1:
        raise argparse.ArgumentTypeError("--num-threads is at least 1")
    backends = _chosen("--backend", options.backend or fl.available_backends(), measure.CHOICES)
    for name in backends:
        fl._backend.resolve(name)
    results = _measure(options, backends, _peer_names(options), _cases(options))

    if not console.is_terminal:
        console.width = 140
    console.print(report.table(results))
    console.print(*(f"cliff: {step}" for step in report.cliffs(results)), sep="\n")
    if options.plot:
        report.plot(results, options.plot)
    return 0


def _measure(
    options: argparse.Namespace, backends: list[str], names: list[str], cases: list[Any]
) -> dict[str, Any]:
    from fastloss._tools import measure, peers

    stderr = measure.need("rich.console").Console(stderr=True)
    progress = measure.need("rich.progress").Progress(console=stderr)
    for path in (options.json, options.plot):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    effort = measure.QUICK if options.quick else measure.FULL
    results = {**measure.environment(options.num_threads, peers.packages(names)), "results": []}
    with peers.Workers(names, options.num_threads) as workers, progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            result = measure.measure(
                case, backends, workers.contenders, options.num_threads, effort
            )
            results["results"].append(result)
            if options.json:  # after each case: an interrupted run leaves what it has
                options.json.write_text(json.dumps(results, indent=1) + "\n")
            progress.advance(task)
    return results


def _peer_names(options: argparse.Namespace) -> list[str]:
    from fastloss._tools import peers

    names = _chosen("--peers", options.peers or peers.installed(), ("none", *peers.PEERS))
    names = [name for name in names if name != "none"]
    peers.require(names)
    return names


def _cases(options: argparse.Namespace) -> list[Any]:
    from fastloss._tools import measure

    default = measure.SMALL_OPERATIONS if options.small else measure.DEFAULT_OPERATIONS
    operations = options.operation or list(default)
    if operations == ["all"]:
        operations = list(measure.OPERATIONS)
    _chosen("--operation", operations, measure.OPERATIONS)
    for dtype in _chosen("--dtype", options.dtype, measure.DTYPES):
        measure.as_dtype(dtype)
    try:
        usual = measure.QUICK_SHAPES if options.quick else measure.SHAPES
        shapes = options.shapes or (measure.SMALL_SHAPES if options.small else usual)
        shapes = [measure.parse_shape(text) for text in shapes]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"--shapes {error}") from None
    cases = [
        measure.Case(operation, shape, axis, dtype)
        for dtype in options.dtype
        for operation in operations
        for shape, axis in shapes
    ]
    if options.sweep:
        main = "cross_entropy_with_grad"  # what peers offer, too
        operation = main if main in operations else operations[0]
        elements = 1 << (14 if options.quick else 25)
        cases += [
            measure.Case(operation, shape, 1, options.dtype[0], series)
            for shape, series in measure.sweep(elements)
        ]
    return cases


if __name__ == "__main__":
    sys.exit(main())
