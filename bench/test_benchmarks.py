"""Every operation on every backend, shape and dtype, beside a parallel copy of the same bytes.

    pytest bench/ --backend numba -k "softmax and float32 and 1024x32000"

See bench/README.md.
"""

import functools

import pytest

from fastloss import _backend
from fastloss._tools import measure
from fastloss._tools.report import format_time

# Of the row's largest entry, or of the loss: what no correct kernel reaches.
MOST_ULP = 64


@pytest.fixture
def effort(request):
    return measure.QUICK if request.config.getoption("--quick") else measure.Effort(3, 0.02)


def measure_limit(operation, data, threads, effort):
    """Seconds that the operation's copies and reads take, and how they were done."""
    with measure.Limits(data.logits, data.out, threads) as limits:
        calls = {name: measure.Local(call, 0) for name, call in limits.calls().items()}
        times, _ = measure.interleave(calls, effort)
    best = measure.best_limits(times)
    return operation.limit(best["copy"]["best"], best["read"]["best"])


def test_operation(
    benchmark, data, shape, dtype, operation, backend, num_threads, effort, summarize
):
    """Times one call; the result of that very call must be right."""
    case = measure.Case(operation, data.shape, data.axis, dtype)
    facts = measure.OPERATIONS[operation]
    call = functools.partial(facts.run, data, backend=backend, num_threads=num_threads)
    threads = _backend.threads_for(num_threads, data.logits.size)

    before = measure_limit(facts, data, threads, effort)
    rounds = 5 * len(measure.visit(call, effort.seconds))
    loss, array = benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
    rows = measure.sample_rows(case)
    got = loss, None if array is None else measure.pick(array, data.axis, rows)
    errors = measure.errors_in_ulp(got, measure.exact(case, data, rows), data.dtype)
    assert any(error is not None for error in errors.values())
    assert all(error is None or error < MOST_ULP for error in errors.values()), errors

    if benchmark.stats is None:  # --benchmark-disable
        return
    best = benchmark.stats.stats.min
    limit = min(before, measure_limit(facts, data, threads, effort))
    passes = {"copy": facts.copies, "read": facts.reads}
    limit_name = " + ".join(kind for kind, count in passes.items() if count)
    gb_per_s = facts.bytes_moved(data.logits.nbytes) / best / 1e9
    benchmark.extra_info.update(
        {
            "GB/s": gb_per_s,
            "ratio": best / limit,
            "limit": limit_name,
            "limit_seconds": limit,
            "threads": threads,
            **errors,
        }
    )
    limit_text = f"{format_time(limit)} ({limit_name})"
    name = f"{operation} {backend} {shape} {dtype}"
    summarize((f"{best / limit:.2f}", f"{gb_per_s:.1f}", format_time(best), limit_text, name))
