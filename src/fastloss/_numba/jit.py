"""How the package is compiled: the decorators, and the cache on disk of what Python calls."""

import contextlib
import functools
import hashlib
from pathlib import Path
from types import SimpleNamespace

import numba
from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.extending import overload

if numba.config.DISABLE_JIT:
    raise ImportError("Numba compiles nothing, by NUMBA_DISABLE_JIT", name=__package__)


class _Part(JITCodeLibrary):
    """The code of a helper, which lives inside what calls it, and is assembled there alone.

    Numba would also assemble each helper by itself, and optimise it twice before: it takes as long
    as all the rest.  Once is still better than not at all, loops over lanes show.
    """

    codegen = SimpleNamespace(set_env=lambda *arguments: None)  # what never runs by itself has none

    def _optimize_final_module(self):
        made = self._codegen._module_pass_manager()
        passes, *builder = made if isinstance(made, tuple) else (made,)  # a tuple from 0.62 on
        passes.run(self._final_module, *builder)

    def _finalize_final_module(self):
        self._finalized = True

    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        return 0  # none


class _PartCompiler(Compiler):
    def __init__(self, typing_context, target_context, library, *rest):
        library = _Part(target_context.codegen(), "part")
        super().__init__(typing_context, target_context, library, *rest)


_common = {"error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}
_options = {
    **_common, "forceinline": True, "no_cpython_wrapper": True, "pipeline_class": _PartCompiler,
}  # fmt: skip
inline = njit(**_options)
# What only calls others becomes part of its caller before types are inferred: a function less.
spliced = njit(inline="always", error_model="numpy")
fused = njit(fastmath={"contract"}, **_options)
summing = njit(fastmath={"reassoc"}, **_options)


def typed(choose, **options):
    """A function for jitted code alone: choose, given the types, returns what is compiled."""

    @functools.wraps(choose)
    def stub(*arguments):
        raise NotImplementedError("for jitted code")

    overload(stub, jit_options={**_options, **options})(choose)
    return stub


typed_fused = functools.partial(typed, fastmath={"contract"})


def entry(function=None, *, parallel=False):
    """A function that Python calls: cached on disk, where there is a place for it."""
    if function is None:
        return lambda function: entry(function, parallel=parallel)
    dispatcher = njit(parallel=parallel, **_common)(function)
    with contextlib.suppress(RuntimeError):  # nowhere to write: not in the package, nor elsewhere
        dispatcher._cache = _Cache(function)
    return dispatcher


def _stamp():
    """What changes with an edit in any file that entries may be compiled from."""
    package = Path(__file__).parent
    files = [*sorted(package.glob("*.py")), *package.parent.glob("_contract.py")]
    return tuple((file.name, file.stat().st_mtime, file.stat().st_size) for file in files)


_STAMP = _stamp()


class _Cache(FunctionCache):
    """Numba's on-disk cache, with files for each signature, and without errors of its own.

    Numba has one index for all signatures of a function.  Two processes that compile one each, at
    the same time, would each give the same name to their code, and one would run the other's.

    Numba compiles anew after an edit in the file of the function; here also in another of this
    package.
    """

    def load_overload(self, sig, target_context):
        self._choose_file(sig, target_context.codegen())
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # unpickling a damaged file may raise anything
            with contextlib.suppress(OSError):
                self.flush()
            return None  # compile anew

    def save_overload(self, sig, data):
        self._choose_file(sig, data.codegen)
        with contextlib.suppress(OSError):  # the disk is full, or can no longer be written to
            super().save_overload(sig, data)

    def _choose_file(self, sig, codegen):
        key = hashlib.sha256(repr(self._index_key(sig, codegen)).encode()).hexdigest()
        self._cache_file = IndexDataCacheFile(
            self._cache_path,
            f"{self._impl.filename_base}.{key[:16]}",
            (self._impl.locator.get_source_stamp(), _STAMP),
        )
