"""The Cython backend: picks the build of ``_kernels`` for this CPU and forwards to it.

``FASTLOSS_ISA`` forces one of the builds, so that each can be tested on a machine that could run
a better one.
"""

import importlib
import os
from types import ModuleType

_BUILDS = {  # best first: module, and the x86-64 level that the CPU must reach
    "x86-64-v4": ("fastloss._kernels_v4", 4),
    "x86-64-v3": ("fastloss._kernels_v3", 3),
    "baseline": ("fastloss._kernels_baseline", 0),
}


def available_isas() -> list[str]:
    """The instruction sets that were built and that this CPU runs, best first."""
    return [isa for isa in _BUILDS if _why_not(isa) is None]


def load(isa: str) -> ModuleType:
    """The kernels that were built for an instruction set: a backend, as this module is."""
    if isa not in _BUILDS:
        names = ", ".join(repr(name) for name in _BUILDS)
        raise ValueError(f"FASTLOSS_ISA = {isa!r} is not an instruction set; choose one of {names}")
    if reason := _why_not(isa):
        raise ValueError(f"FASTLOSS_ISA = {isa!r} cannot be used: {reason}")
    return importlib.import_module(_BUILDS[isa][0])


def _why_not(isa: str) -> str | None:
    """Why a build cannot be used here, or None."""
    path, level = _BUILDS[isa]
    baseline = importlib.import_module(_BUILDS["baseline"][0])
    if level and not baseline.cpu_runs(level):
        return "this CPU lacks instructions that it needs"
    try:
        importlib.import_module(path)
    except ImportError as error:
        return f"it was not built ({error})"
    return None


_isa = os.environ.get("FASTLOSS_ISA") or available_isas()[0]
_kernels = load(_isa)

softmax = _kernels.softmax
log_softmax = _kernels.log_softmax
logsumexp = _kernels.logsumexp
softmax_backward = _kernels.softmax_backward
log_softmax_backward = _kernels.log_softmax_backward
check_target = _kernels.check_target
cross_entropy = _kernels.cross_entropy
nll_loss = _kernels.nll_loss
entropy = _kernels.entropy
binary_cross_entropy_with_logits = _kernels.binary_cross_entropy_with_logits
sigmoid_focal_loss = _kernels.sigmoid_focal_loss
most_threads = _kernels.most_threads
warmup = _kernels.warmup
openmp_max_threads = _kernels.openmp_max_threads


def describe() -> dict[str, str]:
    """What show_config says of this backend."""
    isas = f"{_isa} (usable here: {', '.join(available_isas())})"
    return {"cython instruction set": isas, **_kernels.describe()}
