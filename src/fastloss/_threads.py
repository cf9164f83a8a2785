"""On how many threads a call runs: what was asked for, and what the system grants."""

import functools
import math
import operator
import os
import threading
from collections.abc import Callable, Iterator

from fastloss._contract import Kernels

# Below this many array elements a call costs less than waking up a second thread,
PARALLEL_ELEMENTS = 1 << 15
# and on a backend whose threads take longer to wake, below these.
_PARALLEL_ELEMENTS_ON = {"fastloss._numba": 1 << 16}
MOST_THREADS = 1 << 16  # nobody means more than that
_MEMBERSHIP, _GROUPS = "/proc/self/cgroup", "/sys/fs/cgroup"

_num_threads: int | None = None  # set_num_threads; None: what the environment and the CPU say
_teams = threading.local()  # by backend: how many threads are kept for the thread that calls it

# Thread pools do not survive a fork: a child computes on its one thread.  The hook sees the forks
# of Python, the process id those of C libraries.
_process = os.getpid()
_forked = False


def _after_fork_in_child() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def set_num_threads(num_threads: int | None) -> None:
    """Set how many threads a call may use that does not say ``num_threads=``.

    Parameters
    ----------
    num_threads : int or None
        At least 1; more than there are CPUs is allowed.  None goes back to the default: the
        environment variable ``FASTLOSS_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the number
        of CPUs that affinity and control groups leave to this process; but for the first, no more
        than OpenMP would use by itself.

    Raises
    ------
    ValueError
        If it is less than 1.
    TypeError
        If it is not an integer.

    Notes
    -----
    What OpenMP would use by itself is what ``threadpoolctl.threadpool_limits`` and
    ``omp_set_num_threads`` set, for the thread that calls them.

    A forked child computes on one thread, whatever was set, and so does a process that the
    system refuses more: thread pools do not survive the one, and OpenMP would exit at the other.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.set_num_threads(1)
    >>> fl.get_num_threads()
    1
    >>> fl.set_num_threads(None)
    """
    global _num_threads
    _num_threads = None if num_threads is None else _checked(num_threads, "num_threads")


def get_num_threads() -> int:
    """The most threads that a call without ``num_threads=`` uses; small work runs on one.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.get_num_threads() >= 1
    True
    """
    return 1 if _is_forked() else _wanted()


def threads_for(
    num_threads: int | None,
    elements: float = math.inf,
    kernels: Kernels | None = None,
) -> int:
    """How many threads a call of a backend on so many array elements, or on many, runs on."""
    if num_threads is not None:
        num_threads = _checked(num_threads, "num_threads")
    if elements < PARALLEL_ELEMENTS or _is_forked():
        return 1
    threads = num_threads or _wanted()
    if kernels is None:
        return threads
    if elements < _PARALLEL_ELEMENTS_ON.get(kernels.__name__, 0):
        return 1
    threads = min(threads, kernels.most_threads())
    # A call on one thread asks for no team, and sends none away.
    return threads if threads == 1 or _may_have(threads, kernels.__name__) else 1


def _is_forked() -> bool:
    return _forked or os.getpid() != _process


def _may_have(threads: int, backend: str) -> bool:
    """Whether this thread may have a team of so many: where it may not, OpenMP ends the process."""
    granted = threads <= getattr(_teams, backend, 1) or can_start(threads - 1)
    if granted:
        setattr(_teams, backend, threads)  # of a larger team OpenMP sends the others away
    return granted


def can_start(count: int) -> bool:
    """Whether the system would start so many threads."""
    gate = threading.Event()
    started = []
    try:
        for _ in range(2 * count):  # these may not be quite gone when the others come
            thread = threading.Thread(target=gate.wait, daemon=True)
            thread.start()
            started.append(thread)
        return True
    except (RuntimeError, MemoryError):
        return False
    finally:
        gate.set()
        for thread in started:
            thread.join()


def _checked(num_threads: object, argument: str) -> int:
    try:
        if isinstance(num_threads, bool):
            raise TypeError
        count = operator.index(num_threads)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{argument} = {num_threads!r} is not an integer") from None
    if not 1 <= count <= MOST_THREADS:
        raise ValueError(
            f"{argument} = {count} is out of range; it must be from 1 to {MOST_THREADS}"
        )
    return count


def _wanted() -> int:
    wanted = _num_threads or _of_environment("FASTLOSS_NUM_THREADS")
    if wanted:
        return wanted
    return min(_of_environment("OMP_NUM_THREADS") or usable_cpus(), _openmp_max_threads()())


@functools.cache
def _of_environment(variable: str) -> int | None:
    # OMP_NUM_THREADS may be a list, one number per nesting level.
    value = os.environ.get(variable, "").split(",")[0].strip()
    if not value:
        return None
    try:
        return _checked(int(value), variable)
    except ValueError:
        raise ValueError(
            f"the environment variable {variable} = {value!r} is not a number of threads"
        ) from None


@functools.cache
def _openmp_max_threads() -> Callable[[], int]:
    try:
        from fastloss import _cython
    except (ImportError, ValueError):  # whoever asks for that backend hears why
        return lambda: MOST_THREADS
    return _cython.openmp_max_threads  # type: ignore[no-any-return]


def usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):  # asked anew each time: affinity may change in mid-run
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    return min(cpus, _control_group_cpus() or cpus)


@functools.cache
def _control_group_cpus() -> int | None:
    """The smallest CPU quota of the control groups around this process, in whole CPUs."""
    return min(filter(None, map(_quota, _control_groups())), default=None)


def _control_groups() -> Iterator[str]:
    """The directories of this process' groups and of those around them, of either version."""
    try:
        with open(_MEMBERSHIP) as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        directory = os.path.join(_GROUPS, controllers)
        yield directory
        # In a container the path may be the host's: then only the root is there.
        for name in filter(None, group.split("/")):
            directory = os.path.join(directory, name)
            yield directory


def _quota(directory: str) -> int | None:
    """The quota that a group sets, rounded up to whole CPUs; None where there is none."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            words = []
            for name in names:
                with open(os.path.join(directory, name)) as file:
                    words += file.read().split()
            quota, period = map(int, words)
            return max(1, -(-quota // period)) if quota > 0 else None
        except (OSError, ValueError):
            pass  # not this version, or no quota ("max")
    return None
