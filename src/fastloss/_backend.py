"""Which backend runs.

A backend is a module as ``_contract`` describes it.  To add one, add a line to ``_MODULES``.
Modules are imported when first asked for: ``import fastloss`` stays cheap, and a missing backend
hurts only those who name it.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING

from fastloss._contract import Kernels
from fastloss._threads import get_num_threads, threads_for, usable_cpus

_MODULES = {
    "cython": "fastloss._cython",
    "numba": "fastloss._numba",
    "numpy": "fastloss._reference",
}
_AUTO = ("cython", "numba")
_INSTALL = {
    "cython": "its compiled extension cannot be loaded; with a C compiler at hand, run "
    "`pip install --force-reinstall --no-binary fastloss fastloss`",
    "numba": "run `pip install numba`",
    "numpy": "run `pip install numpy`",
}

if TYPE_CHECKING:  # which backends are what the contract asks for
    from fastloss import _cython, _reference

    _CHECKED: tuple[Kernels, ...] = (_cython, _reference)

_ready: set[str] = set()  # backends whose import has succeeded
_selected: Kernels | None = None  # what calls without backend= use; None: not yet decided


def resolve(backend: str | None) -> Kernels:
    """The backend's module: the keyword, else set_backend, else FASTLOSS_BACKEND, else auto."""
    global _selected
    if backend is not None:
        return _load(backend, "backend")
    if _selected is None:
        _selected = _load(os.environ.get("FASTLOSS_BACKEND") or "auto", "FASTLOSS_BACKEND")
    return _selected


def _load(name: str, argument: str) -> Kernels:
    if isinstance(name, str) and name == "auto":
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
        reason = f"{_INSTALL[name]} ({error})"
        if error.name == _MODULES[name]:  # it is all there, but refuses
            reason = str(error)
        raise ImportError(
            f"backend {name!r} is not available: {reason}", name=error.name
        ) from error


def _load_auto() -> Kernels:
    failures = []
    for name in _AUTO:
        try:
            return _load(name, "backend")
        except ImportError as error:
            failures.append(str(error))
    raise ImportError("; ".join(failures))


def _name(module: Kernels) -> str:
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
    resolve(backend).warmup()


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
    import platform  # slow to import, and rarely needed

    import numpy as np

    import fastloss

    result = {
        "fastloss": fastloss.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "CPU": _cpu_name(),
        "CPUs usable": str(usable_cpus()),
        "threads": _describe_threads(),
        "backend": get_backend(),
    }
    for name in _MODULES:
        failure = _failure(name)
        result[f"backend {name}"] = "available" if failure is None else failure
        if failure is None:
            result.update(_load(name, "backend").describe())
    return result


def _describe_threads() -> str:
    """How many threads a large call uses, which may be fewer than were asked for."""
    wanted = get_num_threads()
    used = threads_for(None, kernels=resolve(None))
    return str(used) if used == wanted else f"{used} ({wanted} asked for)"


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
