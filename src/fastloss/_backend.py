"""Which backend runs, and on how many threads.

A backend is a module with the functions of ``_reference``.  To add one, add a line to ``_MODULES``.
Modules are imported when first asked for: ``import fastloss`` stays cheap, and a missing backend
hurts only those who name it.
"""

import functools
import importlib
import os
import sys
from types import ModuleType

_MODULES = {
    "cython": "fastloss._cython",
    "numba": "fastloss._numba",
    "numpy": "fastloss._reference",
}
_AUTO = ("cython", "numba")
_INSTALL = {
    "cython": "its compiled extension is not there; with a C compiler at hand, run "
    "`pip install --force-reinstall --no-binary fastloss fastloss`",
    "numba": "run `pip install numba`",
    "numpy": "run `pip install numpy`",
}

# Below this many array elements a call costs less than waking up a second thread.
_PARALLEL_ELEMENTS = 1 << 15

_ready: set[str] = set()  # backends whose import has succeeded
_selected: ModuleType | None = None  # what calls without backend= use; None: not yet decided
_num_threads: int | None = None  # set_num_threads; None: what the environment and the CPU say
_forked = False  # thread pools do not survive a fork: a child computes on its one thread


def _after_fork_in_child() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def resolve(backend: str | None) -> ModuleType:
    """The backend's module: the keyword, else set_backend, else FASTLOSS_BACKEND, else auto."""
    global _selected
    if backend is not None:
        return _load(backend, "backend")
    if _selected is None:
        _selected = _load(os.environ.get("FASTLOSS_BACKEND") or "auto", "FASTLOSS_BACKEND")
    return _selected


def _load(name: str, argument: str) -> ModuleType:
    if name == "auto":
        return _load_auto()
    if not isinstance(name, str) or name not in _MODULES:
        names = ", ".join(repr(known) for known in ("auto", *_MODULES))
        raise ValueError(f"{argument} = {name!r} is not a backend; choose one of {names}")
    if name in _ready and (module := sys.modules.get(_MODULES[name])):
        return module
    try:
        module = importlib.import_module(_MODULES[name])
        _ready.add(name)
        return module
    except ImportError as error:
        raise ImportError(
            f"backend {name!r} is not available: {_INSTALL[name]} ({error})", name=error.name
        ) from error


def _load_auto() -> ModuleType:
    failures = []
    for name in _AUTO:
        try:
            return _load(name, "backend")
        except ImportError as error:
            failures.append(str(error))
    raise ImportError("; ".join(failures))


def _name(module: ModuleType) -> str:
    return next(name for name, path in _MODULES.items() if path == module.__name__)


def set_backend(name: str | None) -> None:
    """Choose the backend of all calls that do not name one themselves.

    Parameters
    ----------
    name : {"auto", "cython", "numba", "numpy"} or None
        ``"auto"`` takes Cython where its extension is built, else Numba.  ``"numpy"`` is the
        slow reference.  None goes back to the environment variable ``FASTLOSS_BACKEND``, or
        ``"auto"`` where that is not set.

    Raises
    ------
    ValueError
        If the name is unknown.
    ImportError
        If the backend cannot be loaded; the message says what to install.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.set_backend("numba")
    >>> fl.get_backend()
    'numba'
    >>> fl.set_backend(None)
    """
    global _selected
    _selected = None if name is None else _load(name, "name")


def get_backend() -> str:
    """The name of the backend that a call without ``backend=`` runs on.

    Raises
    ------
    ValueError, ImportError
        As `set_backend`, where ``FASTLOSS_BACKEND`` asks for what is not there.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.get_backend() in fl.available_backends()
    True
    """
    return _name(resolve(None))


def available_backends() -> list[str]:
    """The names of the backends that work here, fastest first.

    Each one is imported to find out.

    Examples
    --------
    >>> import fastloss as fl
    >>> "numpy" in fl.available_backends()
    True
    """
    return [name for name in _MODULES if _failure(name) is None]


def _failure(name: str) -> str | None:
    """Why the backend cannot be used, or None."""
    try:
        _load(name, "backend")
    except ImportError as error:
        return str(error)
    return None


def set_num_threads(num_threads: int | None) -> None:
    """Set how many threads a call may use that does not say ``num_threads=``.

    Parameters
    ----------
    num_threads : int or None
        At least 1; more than there are CPUs is allowed.  None goes back to the default: the
        environment variable ``FASTLOSS_NUM_THREADS``, else ``OMP_NUM_THREADS``, else the number
        of CPUs that affinity and the control group leave to this process.

    Raises
    ------
    ValueError
        If it is less than 1.
    TypeError
        If it is not an integer.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.set_num_threads(1)
    >>> fl.get_num_threads()
    1
    >>> fl.set_num_threads(None)
    """
    global _num_threads
    _num_threads = None if num_threads is None else _checked_threads(num_threads, "num_threads")


def get_num_threads() -> int:
    """The most threads that a call without ``num_threads=`` uses; small work runs on one.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.get_num_threads() >= 1
    True
    """
    if _forked:
        return 1
    return _num_threads or _default_threads()


def threads_for(num_threads: int | None, elements: int) -> int:
    """How many threads a call on so many array elements runs on."""
    if num_threads is not None:
        num_threads = _checked_threads(num_threads, "num_threads")
    if elements < _PARALLEL_ELEMENTS or _forked:
        return 1
    return num_threads or get_num_threads()


def _checked_threads(num_threads: object, argument: str) -> int:
    if isinstance(num_threads, bool) or not hasattr(num_threads, "__index__"):
        raise TypeError(f"{argument} = {num_threads!r} is not an integer")
    count = num_threads.__index__()
    if not 1 <= count <= 1 << 16:
        raise ValueError(f"{argument} = {count} is out of range; it must be from 1 to 65536")
    return int(count)


def _default_threads() -> int:
    return _threads_of_environment() or _usable_cpus()


@functools.cache
def _threads_of_environment() -> int | None:
    for variable in ("FASTLOSS_NUM_THREADS", "OMP_NUM_THREADS"):
        # OMP_NUM_THREADS may be a list, one number per nesting level.
        value = os.environ.get(variable, "").split(",")[0].strip()
        if value:
            try:
                return _checked_threads(int(value), variable)
            except ValueError:
                raise ValueError(
                    f"the environment variable {variable} = {value!r} is not a number of threads"
                ) from None
    return None


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):  # asked anew each time: affinity may change in mid-run
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    return min(cpus, _control_group_cpus() or cpus)


@functools.cache
def _control_group_cpus() -> int | None:
    """The CPU quota of a container, rounded up to whole CPUs."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        return None  # no control group, or no quota ("max")


def warmup(backend: str | None = None) -> None:
    """Compile ahead what the Numba backend otherwise compiles in its first calls.

    The other backends have nothing to compile.  Results go to an on-disk cache, so the next
    process starts fast even without it.

    Parameters
    ----------
    backend : str, optional
        As in every function: None is the one that `get_backend` names.

    Raises
    ------
    ValueError, ImportError
        As `set_backend`.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.warmup("cython")
    """
    module = resolve(backend)
    if hasattr(module, "warmup"):
        module.warmup()


def show_config() -> None:
    """Print what runs here: CPU, instruction set, OpenMP, Numba, threads and versions.

    Examples
    --------
    >>> import fastloss as fl
    >>> fl.show_config()  # doctest: +ELLIPSIS
    fastloss ...
    """
    for key, value in config().items():
        print(f"{key:<24} {value}")


def config() -> dict[str, str]:
    """What show_config prints."""
    import importlib.metadata  # slow to import, as is platform, and rarely needed
    import platform

    import fastloss

    result = {
        "fastloss": fastloss.__version__,
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "CPU": _cpu_name(),
        "CPUs usable": str(_usable_cpus()),
        "threads": str(get_num_threads()),
        "backend": get_backend(),
    }
    for name in _MODULES:
        failure = _failure(name)
        result[f"backend {name}"] = "available" if failure is None else failure
        if failure is None:
            describe = getattr(_load(name, "backend"), "describe", dict)
            result.update(describe())
    return result


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine()
