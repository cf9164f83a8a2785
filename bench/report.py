"""Makes the README's table and the plot from JSON files of ``python -m fastloss bench``.

Prints where we lose, and writes that below the table, too.
"""

import argparse
import json
import math
import os
from pathlib import Path

from fastloss._tools.measure import BACKENDS, format_shape
from fastloss._tools.peers import PEERS
from fastloss._tools.report import (
    case_name,
    cliffs,
    contenders,
    format_time,
    heading,
    insert,
    limit_name,
    markdown,
    plot,
)

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
MAIN = ("cross_entropy_with_grad", "float32")

_SMALL_CALL = [32, 10]
_SMALL_CALL_SECONDS = {"cython": 3e-6, "numba": 8e-6}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    files = sorted(ROOT.glob("bench/results/report*.json"))
    parser.add_argument("json", nargs="*", type=Path, default=files)
    parser.add_argument("--readme", type=Path, default=ROOT / "bench/README.md")
    parser.add_argument("--plot", type=Path, help="default: report.svg beside the first file")
    options = parser.parse_args(arguments)
    drawing = options.plot or options.json[0].with_name("report.svg")

    results = merged([json.loads(file.read_text()) for file in options.json])
    losses = where_we_lose(results)
    plot(results, drawing)
    picture = Path(os.path.relpath(drawing, options.readme.parent)).as_posix()
    try:
        readme = insert(options.readme.read_text(), section(results, losses, picture), BEGIN, END)
    except ValueError as error:
        parser.exit(2, f"{options.readme}: {error}\n")
    options.readme.write_text(readme)
    print(*losses or ["We lose nowhere in this run."], sep="\n")


def merged(reports):
    """The results of several runs on one machine as those of one."""
    first, versions = reports[0], {}
    for report in reports:
        for key in ("cpu", "cpus", "threads", "system"):
            require_same(key, first[key], report[key])
        for name, version in report["versions"].items():
            require_same(name, versions.setdefault(name, version), version)
    cases = {}  # what was measured twice counts as measured first
    for result in (result for report in reports for result in report["results"]):
        cases.setdefault((case_name(result), result["series"]), result)
    return {**first, "versions": versions, "results": list(cases.values())}


def require_same(name, one, other):
    if one != other:
        raise SystemExit(f"{name} differs between the files: {one} and {other}")


def section(results, losses, picture):
    """What stands between the markers."""
    lines = [
        f"Measured on {heading(results)}.",
        "",
        "Loss and gradient, float32: the best time and, in brackets, that over a parallel copy.",
        "",
        *main_table(results),
        "",
        *others_table(results),
        f"![Time over limit against the number of classes]({picture})",
        "",
        "<details>",
        f"<summary>Where we lose in this run: {len(losses) or 'nowhere'}</summary>",
        "",
        *(f"- {loss}" for loss in losses),
        "",
        "</details>",
    ]
    return "\n".join(lines)


def main_table(results):
    listed = [r for r in shapes(results) if (r["operation"], r["dtype"]) == MAIN]
    names = [name for name in contenders(results) if any(name in r["contenders"] for r in listed)]
    rows = [
        [format_shape(r["shape"], r["axis"]), format_time(r["limit"]["seconds"])]
        + [timing(r["contenders"].get(name)) for name in names]
        for r in listed
    ]
    rows.append(["largest error, ulp", ""] + [largest_error(listed, name) for name in names])
    return markdown(["shape", "copy", *names], rows)


def others_table(results):
    """The other operations and dtypes: for each shape the ratios of the two backends."""
    listed = shapes(results)
    cases = dict.fromkeys((r["operation"], r["dtype"]) for r in listed)
    cases.pop(MAIN, None)
    if not cases:
        return []
    columns = list(dict.fromkeys(format_shape(r["shape"], r["axis"]) for r in listed))
    found = {(r["operation"], r["dtype"], format_shape(r["shape"], r["axis"])): r for r in listed}
    rows = [
        [operation, dtype] + [ratios(found.get((operation, dtype, column))) for column in columns]
        for operation, dtype in cases
    ]
    text = "The other operations and types: time over the limit of each, Cython / Numba."
    return [text, "", *markdown(["operation", "dtype", *columns], rows), ""]


def shapes(results):
    return [result for result in results["results"] if result["series"] == "shapes"]


def timing(entry):
    if not entry or "error" in entry:
        return "-"
    return f"{format_time(entry['best'])} ({entry['ratio']:.2f})"


def ratios(result):
    entries = [result["contenders"].get(name, {}) for name in BACKENDS] if result else []
    return " / ".join(f"{e['ratio']:.2f}" if "ratio" in e else "-" for e in entries) or "-"


def largest_error(results, name):
    entries = (result["contenders"].get(name, {}) for result in results)
    errors = [
        e[key] for e in entries for key in ("loss_ulp", "array_ulp") if e.get(key) is not None
    ]
    return f"{max(errors):.2g}" if errors else "-"


def where_we_lose(results):
    """Targets missed, peers that are faster, cliffs, and what failed."""
    found, faster = [], {}
    for result in results["results"]:
        case, entries = case_name(result), result["contenders"]
        for name in BACKENDS:
            entry = entries.get(name, {})
            if "error" in entry:
                found.append(f"{name}: {case} failed: {entry['error']}")
            if "ratio" not in entry:
                continue
            if result["series"] == "shapes":
                found += missed_target(result, name, entry)
            for peer, share in faster_peers(name, entries):
                key = f"{name}: {result['operation']} {result['dtype']}: {peer} is faster"
                shape = format_shape(result["shape"], result["axis"])
                faster.setdefault(key, []).append(f"{shape} ({share:.2f} of the time)")
    found += [f"{key} at {', '.join(places)}" for key, places in faster.items()]
    return found + [f"cliff, {step}" for step in cliffs(results)]


def faster_peers(name, entries):
    for peer in PEERS:
        share = entries.get(peer, {}).get("best", math.inf) / entries[name]["best"]
        if share < 1:
            yield peer, share


def missed_target(result, name, entry):
    case = case_name(result)
    if result["shape"] == _SMALL_CALL:
        target = _SMALL_CALL_SECONDS[name]
        if result["dtype"] == "float32" and entry["best"] > target:
            time, most = (format_time(t) for t in (entry["best"], target))
            yield f"{name}: {case}: {time} (target {most})"
        return
    target = target_ratio(result)
    if target and entry["ratio"] > target:
        limit = limit_name(result)
        yield f"{name}: {case}: {entry['ratio']:.2f} x {limit} (target {target:.2f})"


def target_ratio(result):
    """The most that a case should take over its limit; None where nothing was promised."""
    operation, dtype, shape = result["operation"], result["dtype"], result["shape"]
    num_classes = shape[result["axis"]]
    if operation in ("cross_entropy", "cross_entropy_with_grad+soft"):
        return 1.3 if num_classes >= 64 and dtype == "float32" else None
    if operation not in ("cross_entropy_with_grad", "softmax", "log_softmax"):
        return None
    if dtype != "float32":
        return {"float64": 1.2}.get(dtype, 2.0) if num_classes >= 1000 else None
    if result["axis"] != len(shape) - 1:
        return 1.8
    return 1.1 if num_classes >= 64 else None


if __name__ == "__main__":
    main()
