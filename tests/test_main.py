"""The command line, the measurements behind it and the report made from them."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import report as report_script
import rich.console
from support.backends import need

import fastloss as fl
from fastloss.__main__ import main
from fastloss._operations import BY_FUNCTION
from fastloss._tools import check, measure, peers
from fastloss._tools.report import contenders, table

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ("cython", "numba", "numpy")


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "fastloss", *arguments], capture_output=True, text=True, check=False
    )


def test_info_prints_the_configuration(capsys):
    done = run("info")
    assert (done.returncode, done.stderr) == (0, "")
    fl.show_config()
    here = capsys.readouterr().out
    # The threading layer of Numba starts with the first parallel call, so it may differ.
    ours, theirs = (
        [line for line in text.splitlines() if "layer" not in line] for text in (here, done.stdout)
    )
    assert theirs == ours
    assert theirs[0].split() == ["fastloss", fl.__version__]


def test_a_command_is_needed():
    done = run()
    assert done.returncode == 2
    assert "info" in done.stderr


# check


@pytest.mark.timeout(900)  # a cold cache: Numba compiles every kernel for every type
def test_check_passes_on_every_build(capsys):
    builds, missing = check.backends()
    assert not missing
    status = main(["check"])
    lines = capsys.readouterr().out.splitlines()
    assert (status, lines[-1]) == (0, f"{len(builds)} builds agree with the reference")
    checked = [line for line in lines if re.match(r"\w+.* (b?float\d\d)\s", line)]
    assert len(checked) == len(check.CHECKED) * len(check.dtypes())


def test_check_covers_every_instruction_set():
    from fastloss import _cython

    assert set(check.backends()[0]) == {"numba"} | {
        f"cython {isa}" for isa in _cython.available_isas()
    }


def _scaled(kernel, factor):
    """softmax a little wrong everywhere."""

    def wrong(logits, out, num_threads):
        kernel(logits, out, num_threads)
        out *= factor

    return wrong


def _wrong_in_place(kernel):
    def wrong(logits, out, num_threads):
        kernel(logits, out, num_threads)
        if out is logits:
            out[-1, -1, -1] += 0.01

    return wrong


def _without_nan(kernel):
    def wrong(logits, out, num_threads):
        kernel(logits, out, num_threads)
        np.nan_to_num(out, copy=False)

    return wrong


def _wrong_sum(kernel):
    return lambda *arguments: 1.0001 * kernel(*arguments)


def _wrong_gradient(kernel):
    def wrong(*arguments):
        total = kernel(*arguments)
        grad = arguments[-2]
        if grad is not None:
            grad[0, 0, 0] *= 1.001
        return total

    return wrong


def _any_target(kernel):
    return lambda *arguments: kernel(*arguments)._replace(bad=-1)


MISTAKES = {
    "softmax": [lambda kernel: _scaled(kernel, np.float32(1.00001)), _wrong_in_place, _without_nan],
    "cross_entropy": [_wrong_sum, _wrong_gradient],
    "nll_loss": [_wrong_sum, _wrong_gradient],
    "check_target": [_any_target],
}


@pytest.mark.parametrize(
    ("operation", "mistake"),
    [(operation, mistake) for operation, kinds in MISTAKES.items() for mistake in kinds],
)
def test_check_finds_a_wrong_kernel(monkeypatch, capsys, operation, mistake):
    builds, _ = check.backends()
    name = "cython baseline"
    kernels = builds[name]
    monkeypatch.setattr(check, "backends", lambda: ({name: kernels}, {}))
    monkeypatch.setattr(check, "dtypes", lambda: ["float32"])
    monkeypatch.setattr(check, "CHECKED", [o for o in check.CHECKED if o.startswith(operation)])
    assert main(["check"]) == 0
    monkeypatch.setattr(kernels, operation, mistake(getattr(kernels, operation)))
    assert main(["check"]) == 1
    assert f"{name} disagrees: {operation}" in capsys.readouterr().out


def test_check_without_any_backend_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(check, "backends", lambda: ({}, {"numba": "it is not there"}))
    assert main(["check"]) == 1
    assert "not checked: it is not there" in capsys.readouterr().out


# bench


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The report of one quick run, with one peer, and the plot's path."""
    folder = tmp_path_factory.mktemp("bench")
    paths = folder / "new" / "report.json", folder / "report.svg"
    status = main(
        [
            "bench", "--quick", "--operation", "all", "--shapes", "40x70,3x5x4@1",
            "--num-threads", "2", "--peers", "sklearn", "--json", str(paths[0]),
            "--plot", str(paths[1]),
        ]
    )  # fmt: skip
    assert status == 0
    return json.loads(paths[0].read_text()), paths[1]


def test_bench_says_where_the_numbers_come_from(quick):
    report, _ = quick
    assert report["cpu"]
    assert report["threads"] == 2
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", report["date"])
    packages = {"python", "fastloss", "numpy", "numba", "scikit-learn"}
    assert set(report["versions"]) == packages
    assert report["config"]["fastloss"] == fl.__version__


def test_bench_measures_every_operation_on_every_shape(quick):
    report, _ = quick
    measured = [(r["operation"], r["shape"], r["axis"], r["dtype"]) for r in report["results"]]
    assert measured == [
        (operation, shape, 1, "float32")
        for operation in measure.OPERATIONS
        for shape in ([40, 70], [3, 5, 4])
    ]


def test_bench_relates_times_to_the_limit(quick):
    report, _ = quick
    for result in report["results"]:
        limit = result["limit"]
        copy, read = result["copy"], result["read"]
        assert {copy["by"], read["by"]} <= {"numba", "numpy"}
        seconds = limit["copies"] * copy["best"] + limit["reads"] * read["best"]
        assert limit["seconds"] == pytest.approx(seconds)
        assert result["threads"] == 1  # as small as these are
        nbytes = 4 * math.prod(result["shape"]) * (2 * limit["copies"] + limit["reads"])
        for entry in result["contenders"].values():
            assert 0 < entry["best"] <= entry["median"]
            assert entry["calls"] >= measure.QUICK.repeats
            assert entry["ratio"] == pytest.approx(entry["best"] / seconds)
            assert entry["gb_per_s"] == pytest.approx(nbytes / entry["best"] / 1e9)


def test_bench_measures_errors(quick):
    report, _ = quick
    for result in report["results"]:
        name = result["operation"].partition("+")[0]
        is_loss = BY_FUNCTION[name].is_loss
        has_array = not is_loss or name.endswith("_with_grad")
        for entry in result["contenders"].values():
            assert (entry["loss_ulp"] is not None) == is_loss
            assert (entry["array_ulp"] is not None) == has_array
            assert all(0 <= (entry[key] or 0) < 32 for key in ("loss_ulp", "array_ulp"))


def test_peers_run_what_they_can(quick):
    report, _ = quick
    for result in report["results"]:
        peers = [name for name in result["contenders"] if name not in CONTENDERS]
        plain_rows = (result["operation"], result["shape"]) == ("cross_entropy_with_grad", [40, 70])
        assert peers == ["sklearn"] * plain_rows
        assert set(CONTENDERS) <= set(result["contenders"])


PEER_CASES = [
    (name, case)
    for operation, shape in itertools.product(measure.SMALL_OPERATIONS, ("32x10", "4x3x5@1"))
    for case in [measure.Case(operation, *measure.parse_shape(shape), "float32")]
    for name, peer in peers.PEERS.items()
    if peer.supports(case)
]


@pytest.mark.parametrize(("name", "case"), PEER_CASES, ids=str)
def test_peers_give_what_we_give(name, case):
    need(peers.PEERS[name].module)
    data = measure.Data(case.shape, case.axis, case.dtype)
    call, result = peers.PEERS[name].bind(case, data, fl.get_num_threads())
    loss, array = result(call())
    expected = measure.OPERATIONS[case.operation].run(data, backend="numpy")
    assert loss is None or loss == pytest.approx(expected[0], rel=1e-6)
    np.testing.assert_allclose(array, expected[1], rtol=1e-5, atol=1e-6)


def test_bench_measures_small_calls(capsys):
    assert main(["bench", "--quick", "--small", "--backend", "cython", "--peers", "none"]) == 0
    printed = capsys.readouterr().out
    for operation in measure.SMALL_OPERATIONS:
        assert all(f"{operation} {shape} float32" in printed for shape in measure.SMALL_SHAPES)


def test_bench_draws_every_contender(quick):
    report, plot = quick
    svg = plot.read_text()
    assert all(name in svg for name in contenders(report))


def test_bench_runs_as_a_module():
    done = run("bench", "--quick", "--backend", "cython", "--peers", "none", "--shapes", "8x4")
    assert done.returncode == 0, done.stderr
    assert "softmax 8x4 float32" in done.stdout


def test_bench_sweeps(tmp_path, monkeypatch):
    """The first of the operations and dtypes, or cross_entropy_with_grad if it is among them."""
    sweep, file = measure.sweep, tmp_path / "report.json"
    monkeypatch.setattr(measure, "sweep", lambda elements: sweep(1 << 6))
    status = main(
        [
            "bench", "--quick", "--backend", "cython", "--peers", "none",
            "--operation", "softmax,cross_entropy_with_grad",
            "--sweep", "--shapes", "8x4", "--dtype", "float64,float16", "--json", str(file),
        ]
    )  # fmt: skip
    assert status == 0
    results = json.loads(file.read_text())["results"]
    assert {r["series"] for r in results} == {"shapes", "classes", "rows"}
    swept = {(r["operation"], r["dtype"]) for r in results if r["series"] != "shapes"}
    assert swept == {("cross_entropy_with_grad", "float64")}
    assert all(list(r["contenders"]) == ["cython"] for r in results)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--backend", "fortran", "--backend 'fortran' is not one of cython, numba, numpy"),
        ("--dtype", "int8", "--dtype 'int8' is not one of float32"),
        ("--operation", "argmax", "--operation 'argmax' is not one of softmax"),
        ("--peers", "mlx", "--peers 'mlx' is not one of none, torch"),
        ("--shapes", "32by10", "--shapes '32by10' is not a shape such as"),
        ("--shapes", "32x0", "lengths are at least 1"),
        ("--shapes", "32x10@2", "the axis is one of the shape's"),
        ("--num-threads", "0", "--num-threads is at least 1"),
    ],
)
def test_bench_refuses(capsys, option, value, message):
    with pytest.raises(SystemExit) as exit_status:
        main(["bench", option, value])
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("rich.console", []),
        ("matplotlib", ["--plot", "x.svg"]),
        ("ml_dtypes", ["--dtype", "bfloat16"]),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, capsys, module, options):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as exit_status:
        main(["bench", *options])
    assert exit_status.value.code == 2
    assert "pip install 'fastloss[bench]'" in capsys.readouterr().err


def test_a_missing_peer_is_named(monkeypatch, capsys):
    absent = peers.PEERS["torch"]._replace(module="no_such_module")
    monkeypatch.setitem(peers.PEERS, "torch", absent)
    assert "torch" not in peers.installed()
    with pytest.raises(SystemExit):
        main(["bench", "--peers", "torch"])
    assert "peer 'torch' is not installed; run `pip install torch`" in capsys.readouterr().err


# what bench measures with


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_limits_copy_and_read_everything(threads):
    source = np.random.default_rng(0).integers(0, 1 << 62, 1001)
    for name in ("copy numba", "copy numpy"):
        destination = np.zeros_like(source)
        with measure.Limits(source, destination, threads) as limits:
            limits.calls()[name]()
        np.testing.assert_array_equal(destination, source)
    folded = measure._read_parallel(source.view(np.uint64), threads)
    assert np.bitwise_xor.reduce(folded) == np.bitwise_xor.reduce(source.view(np.uint64))


def test_limits_leave_numbas_thread_count_alone():
    import numba

    before = numba.get_num_threads()
    with measure.Limits(np.ones(100), np.ones(100), 1) as limits:
        for call in limits.calls().values():
            call()
    assert numba.get_num_threads() == before


def test_everything_is_visited_in_turn():
    visited = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def visit(self, seconds):
            visited.append(self.name)
            if self.name == "b":
                raise MemoryError("too large")
            return [seconds]

    contenders = {name: Recorder(name) for name in "abc"}
    times, errors = measure.interleave(contenders, measure.Effort(3, 0.5))
    assert "".join(visited) == "abcacac"
    assert times == {"a": [0.5] * 3, "c": [0.5] * 3}
    assert errors == {"b": "MemoryError: too large"}


def test_a_contender_that_fails_does_not_end_the_run():
    class Failing:
        def visit(self, seconds):
            return [1.0]

        def sample(self, rows):
            raise RuntimeError("no [/result]")

    case = measure.Case("softmax", (6, 5), 1, "float32")
    measured = measure.measure(case, ["cython"], lambda case: {"x": Failing()}, 1, measure.QUICK)
    assert measured["contenders"]["x"] == {"error": "RuntimeError: no [/result]"}
    assert measured["contenders"]["cython"]["best"] > 0
    console = rich.console.Console(record=True, width=140)
    console.print(table({"results": [measured], **REPORT_HEAD}))
    assert "RuntimeError: no [/result]" in console.export_text()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_ulp_is_the_spacing(dtype):
    values = np.array([0.0, 1.0, 1.5, 3e-5, 6e4, np.finfo(dtype).tiny], dtype)
    np.testing.assert_array_equal(measure.ulp(values, np.dtype(dtype)), np.spacing(values))


def test_ulp_of_bfloat16():
    dtype = measure.as_dtype("bfloat16")
    np.testing.assert_array_equal(measure.ulp(np.array([1.0, 3.0]), dtype), [2**-7, 2**-6])


def test_errors_are_in_ulp_of_the_size_of_the_row():
    array = np.array([[1.0, -0.5], [4.0, 0.0], [0.0, 0.0]])
    expected = measure.Expected(2.0, array, np.array([1.0, 4.0, 2.0]))
    error = np.array([[0, 3 * 2**-23], [2**-21, 0], [0, 5 * 2**-22]])
    got = 2.0 + 2**-22, array + error
    errors = measure.errors_in_ulp(got, expected, np.dtype(np.float32))
    assert errors == {"loss_ulp": 1.0, "array_ulp": 5.0}
    wrong = measure.errors_in_ulp((math.nan, None), expected, np.dtype(np.float32))
    assert math.isnan(wrong["loss_ulp"])


def test_the_exact_loss_is_that_of_all_rows(monkeypatch):
    monkeypatch.setattr(measure, "_CHUNK_ELEMENTS", 30)
    monkeypatch.setattr(measure, "_SAMPLE_ELEMENTS", 30)
    case = measure.Case("cross_entropy_with_grad+all", (4, 7, 5), 1, "float64")
    data = measure.Data(case.shape, case.axis, case.dtype)
    rows = measure.sample_rows(case)
    assert len(rows) == 4
    expected = measure.exact(case, data, rows)
    loss, grad = fl.cross_entropy_with_grad(
        data.logits, data.target, axis=1, weight=data.weight, sample_weight=data.sample_weight,
        **BY_FUNCTION["cross_entropy"].options, normalizer=20.0, backend="numpy",
    )  # fmt: skip
    assert expected.loss == pytest.approx(loss, rel=1e-14)
    np.testing.assert_allclose(expected.array, measure.pick(grad, 1, rows), rtol=1e-13)
    assert (expected.size >= np.abs(expected.array).max(axis=1)).all()


def test_pick_counts_rows_over_the_other_axes():
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    rows = np.moveaxis(array, 1, -1).reshape(8, 3)
    np.testing.assert_array_equal(measure.pick(array, 1, np.array([0, 5, 7])), rows[[0, 5, 7]])


@pytest.mark.parametrize("elements", [1 << 14, 1 << 25])
def test_sweep(elements):
    points = list(measure.sweep(elements))
    classes = [shape for shape, series in points if series == "classes"]
    assert [c for _, c in classes] == sorted({c for _, c in classes})
    assert all(elements - c < n * c <= elements for n, c in classes)
    rows = {c: [n for (n, k), series in points if series == "rows" and k == c] for c in (10, 1000)}
    assert all(counts == [1 << i for i in range(len(counts))] for counts in rows.values())
    if elements == 1 << 25:
        assert (classes[0][1], classes[-1][1], rows[10][-1]) == (1, 200_000, 1 << 22)
        steps = itertools.pairwise(num_classes for _, num_classes in classes if num_classes > 9)
        assert all(after <= 2 * before for before, after in steps)


# bench/report.py


def result(shape, dtype="float32", operation="cross_entropy_with_grad", series="shapes", **ratios):
    axis = 1
    reads = operation == "cross_entropy"
    times = {"best": 1e-3, "median": 2e-3, "calls": 3}
    return {
        "operation": operation, "shape": shape, "axis": axis, "dtype": dtype, "series": series,
        "threads": 2, "copy": {"by": "numba", **times}, "read": {"by": "numpy", **times},
        "limit": {"copies": 1 - reads, "reads": int(reads), "seconds": 1e-3},
        "contenders": {
            name: {
                "best": ratio / 1e3, "median": ratio / 1e3, "calls": 3, "ratio": ratio,
                "gb_per_s": 1.0, "loss_ulp": 0.5, "array_ulp": 2.5,
            }
            for name, ratio in ratios.items()
        },
    }  # fmt: skip


REPORT_HEAD = {
    "date": "2030-01-02", "cpu": "A CPU", "cpus": 2, "threads": 2, "system": "Linux",
    "versions": {"python": "3.13.0", "torch": "9.9"}, "config": {},
}  # fmt: skip
REPORT = {
    **REPORT_HEAD,
    "results": [
        result([1024, 32000], cython=1.05, numba=1.25, torch=2.0),
        result([1000, 10], cython=2.0, numba=2.5, torch=1.5),
        result([2, 21, 16], cython=1.2, numba=1.3),
        result([32, 10], cython=0.002, numba=0.026),
        result([1024, 32000], "float64", cython=1.1, numba=1.25),
        result([1024, 32000], operation="cross_entropy", cython=1.3, numba=1.5),
        result([4000, 64], series="classes", cython=1.0, numba=1.0),
        result([2000, 128], series="classes", cython=1.6, numba=1.4, torch=0.8),
    ],
}


@pytest.fixture
def written(tmp_path, capsys):
    """The README, the plot and the output of bench/report.py on REPORT, which is in two files."""
    results, paths = REPORT["results"], [tmp_path / "report.json", tmp_path / "report_sweep.json"]
    slower = result([1024, 32000], cython=9.0, numba=9.0)  # measured again in the other file
    for path, some in zip(paths, (results[:-2], [slower, *results[-2:]]), strict=True):
        path.write_text(json.dumps({**REPORT, "results": some}))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark:begin -->old<!-- benchmark:end -->\nafter\n")
    arguments = [*map(str, paths), "--readme", str(readme)]
    report_script.main(arguments)
    first = readme.read_text(), (tmp_path / "report.svg").read_bytes()
    printed = capsys.readouterr().out
    report_script.main(arguments)
    assert first == (readme.read_text(), (tmp_path / "report.svg").read_bytes())
    return first[0], first[1].decode(), printed


def test_report_fills_the_readme_between_its_markers(written):
    readme, svg, _ = written
    assert readme.startswith("before\n<!-- benchmark:begin -->\n")
    assert readme.endswith("\n<!-- benchmark:end -->\nafter\n")
    assert "old" not in readme
    assert "A CPU, 2 threads, 2030-01-02; python 3.13.0, torch 9.9" in readme
    assert "| shape | copy | cython | numba | torch |" in readme
    assert "| 1024x32000 | 1 ms | 1.05 ms (1.05) | 1.25 ms (1.25) | 2 ms (2.00) |" in readme
    assert "| 2x21x16@1 | 1 ms | 1.2 ms (1.20) | 1.3 ms (1.30) | - |" in readme
    assert "| largest error, ulp |  | 2.5 | 2.5 | 2.5 |" in readme
    assert "| cross_entropy | float32 | 1.30 / 1.50 |" in readme
    assert "(report.svg)" in readme
    assert svg.lstrip().startswith("<?xml")


def test_report_prints_where_we_lose(written):
    readme, _, printed = written
    main_case = "cross_entropy_with_grad"
    losses = [
        f"numba: {main_case} 1024x32000 float32: 1.25 x copy (target 1.10)",
        f"numba: {main_case} 32x10 float32: 26 us (target 8 us)",
        f"numba: {main_case} 1024x32000 float64: 1.25 x copy (target 1.20)",
        "numba: cross_entropy 1024x32000 float32: 1.50 x read (target 1.30)",
        f"cython: {main_case} float32: torch is faster at 1000x10 (0.75 of the time), "
        "2000x128 (0.50 of the time)",
        f"numba: {main_case} float32: torch is faster at 1000x10 (0.60 of the time), "
        "2000x128 (0.57 of the time)",
        f"cliff, cython: 1.00 x limit at {main_case} 4000x64 float32, 1.60 at 2000x128",
    ]
    assert printed.splitlines() == losses
    assert all(f"- {loss}" in readme for loss in losses)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"cpu": "Another"}, "cpu differs between the files: A CPU and Another"),
        ({"versions": {"torch": "9.8"}}, "torch differs between the files: 9.9 and 9.8"),
    ],
)
def test_report_is_of_one_machine(change, complaint):
    with pytest.raises(SystemExit, match=complaint):
        report_script.merged([REPORT, {**REPORT, **change}])


def test_report_needs_the_markers(tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmark:end --> <!-- benchmark:begin -->")
    with pytest.raises(SystemExit) as exit_status:
        report_script.main([str(tmp_path / "report.json"), "--readme", str(readme)])
    assert exit_status.value.code == 2
    assert "needs the markers" in capsys.readouterr().err
    assert readme.read_text() == "<!-- benchmark:end --> <!-- benchmark:begin -->"
