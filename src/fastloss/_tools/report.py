"""Showing what `measure` measured: the table and the plot."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastloss._tools.measure import BACKENDS, format_shape, need

Report = Mapping[str, Any]

_CLIFF = 1.5  # the step between neighbours in a sweep that wants an explanation


def heading(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['cpu']}, {report['threads']} threads, {report['date']}; {versions}"


def contenders(report: Report) -> list[str]:
    """Their names in the order of the run."""
    names = (name for result in report["results"] for name in result["contenders"])
    return list(dict.fromkeys(names))


def limit_name(result: Mapping[str, Any]) -> str:
    limit = result["limit"]
    return " + ".join(kind for kind, key in (("copy", "copies"), ("read", "reads")) if limit[key])


def case_name(result: Mapping[str, Any]) -> str:
    shape = format_shape(result["shape"], result["axis"])
    return f"{result['operation']} {shape} {result['dtype']}"


def format_time(seconds: float) -> str:
    """Three digits and the unit."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def insert(text: str, section: str, begin: str, end: str) -> str:
    """A page with the section between its markers."""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"needs the markers {begin} and {end}, in this order")
    return f"{before}{begin}\n{section}\n{end}{after}"


def table(report: Report) -> Any:
    """For each case the limit and every contender, as a rich table."""
    result_table = need("rich.table").Table(title=heading(report))
    result_table.add_column("case")
    result_table.add_column("contender")
    for name in ("best", "median", "x limit", "GB/s", "loss ulp", "array ulp"):
        result_table.add_column(name, justify="right")
    for result in report["results"]:
        for row in _rows(result):
            result_table.add_row(*row)
        result_table.add_section()
    return result_table


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    case, limit = case_name(result), limit_name(result)
    for kind in ("copy", "read"):
        mark = " (limit)" if kind in limit else ""
        times = (format_time(result[kind][key]) for key in ("best", "median"))
        yield case, kind + mark, *times
        case = ""
    for name, entry in result["contenders"].items():
        if "error" in entry:
            first_line = entry["error"].splitlines()[0][:60]
            yield "", name, need("rich.markup").escape(first_line)
            continue
        times = (format_time(entry[key]) for key in ("best", "median"))
        errors = (_number(entry[key]) for key in ("loss_ulp", "array_ulp"))
        yield "", name, *times, f"{entry['ratio']:.2f}", f"{entry['gb_per_s']:.1f}", *errors


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def series(report: Report, name: str, operation: str, dtype: str) -> list[Mapping[str, Any]]:
    """The points of a sweep or, as "shapes", the listed shapes with the classes last."""
    return [
        result
        for result in report["results"]
        if (result["series"], result["operation"], result["dtype"]) == (name, operation, dtype)
        and result["axis"] == len(result["shape"]) - 1
    ]


def cliffs(report: Report) -> list[str]:
    """Steps between neighbours of a sweep, at which our time over the limit jumps."""
    found = []
    for points in _sweeps(report):
        for name, (a, b) in itertools.product(BACKENDS, itertools.pairwise(points)):
            before, after = (point["contenders"].get(name, {}).get("ratio") for point in (a, b))
            if before and after and max(before / after, after / before) > _CLIFF:
                found.append(
                    f"{name}: {before:.2f} x limit at {case_name(a)}, "
                    f"{after:.2f} at {format_shape(b['shape'], b['axis'])}"
                )
    return found


def _sweeps(report: Report) -> Iterator[list[Mapping[str, Any]]]:
    for operation, dtype in _measured(report):
        yield series(report, "classes", operation, dtype)
        points = series(report, "rows", operation, dtype)
        for num_classes in dict.fromkeys(point["shape"][-1] for point in points):
            yield [point for point in points if point["shape"][-1] == num_classes]


def _measured(report: Report) -> list[tuple[str, str]]:
    pairs = {(result["operation"], result["dtype"]): None for result in report["results"]}
    return list(pairs)


def plot(report: Report, path: str | Path) -> None:
    """Time over limit against C, one line per contender; with a sweep over N, that beside it."""
    sweeps = [points for points in _sweeps(report) if points]
    if not sweeps:
        main = sorted(
            _measured(report),
            key=lambda pair: pair != ("cross_entropy_with_grad", "float32"),
        )
        sweeps = [series(report, "shapes", *main[0])]
    figure = need("matplotlib.figure").Figure(figsize=(7 * len(sweeps), 5), layout="constrained")
    for axes, points in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps, strict=True):
        _draw(axes, points, contenders(report))
    figure.suptitle(heading(report), fontsize=8, wrap=True)
    # Neither a date nor random identifiers: the same measurement gives the same file.
    with need("matplotlib").rc_context({"svg.hashsalt": "fastloss"}):
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def _draw(axes: Any, points: list[Mapping[str, Any]], names: list[str]) -> None:
    rows = bool(points) and points[0]["series"] == "rows"
    for name in names:
        line = sorted(
            (point["shape"][0 if rows else -1], point["contenders"][name]["ratio"])
            for point in points
            if "ratio" in point["contenders"].get(name, {})
        )
        if line:
            axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=name)
    axes.axhline(1, color="black", linewidth=1, linestyle="--", label="limit")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("rows N" if rows else "classes C")
    axes.set_ylabel(f"time / {limit_name(points[0])}" if points else "time / limit")
    if points:
        fixed = f"C = {points[0]['shape'][-1]}" if rows else "classes last"
        axes.set_title(f"{points[0]['operation']}, {points[0]['dtype']}, {fixed}")
    axes.grid(True, alpha=0.3)
    axes.legend()
