"""Choose the backend that runs a recurrence, and its kernel.

To add a backend, write a module in `backends/` that defines a `Backend`, and add it to `BACKENDS`. Add it to
`FASTEST_FIRST` too if "auto" may choose it. The tests in tests/ops run for every entry of `BACKENDS`.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .backend import Backend, Kernel, warn_once
from .backends import in_log_space, native, sequential, torch_in_graphs, torch_in_place, triton
from .call import Call, Spec
from .cells import CELLS, cells_of, parts_of
from .linear_map import FORWARDS, HOOKS, LINEAR_MAPS, NORMS, map_with_norm, weights_of, with_norm
from .modes import EAGER, Mode, are_ordinary, is_compiling, mode_of
from .names_of_torch import has_any_global_hook
from .shape import as_dtype

BackendName = Literal["auto", "native", "triton", "torch", "log", "sequential"]
BACKENDS: dict[Any, Backend] = {
    "native": native.BACKEND,
    "triton": triton.BACKEND,
    "torch": torch_in_place.BACKEND,
    "log": in_log_space.BACKEND,
    "sequential": sequential.BACKEND,
}
# Backends that "auto" tries, in this order. "torch" supports everything.
FASTEST_FIRST = ("native", "triton", "torch")
# The traceable version of "torch", for tensors without values.
_IN_GRAPHS = "torch in graphs"
_CHOSEN = {"triton alone": triton.ALONE, _IN_GRAPHS: torch_in_graphs.BACKEND}
VARIABLE = "MINGRU_BACKEND"
# What `os.environ` looks up; its own `get` would take longer than everything else here.
_environment, _KEY = vars(os.environ)["_data"], os.environ.encodekey(VARIABLE)
# Elements of a weight whose cast takes as long as what the kernel saves with a row.
_CASTS = 256
# The last cell of a mixture, which fewer backends compute than the first.
_RAREST = {cell: cells_of(cell)[-1] for cell in CELLS if len(cells_of(cell)) > 1}
_BY_VARIABLE = f"the environment variable {VARIABLE}"


class Way(NamedTuple):
    """How a recurrence is computed."""

    backend: str
    """Name of the backend, for `backend_of`."""
    mode: Mode


# Made once, because most calls have one of these.
_EAGER = {name: Way(name, EAGER) for name in (*BACKENDS, *_CHOSEN)}
# That of an eager call that the compiled kernels compute.
NATIVE = _EAGER["native"]


class _Chosen(threading.local):
    """The backend that `use_backend` sets in this thread."""

    name: str | None = None


_chosen = _Chosen()
# The backends of all open blocks of all threads, the last one last.
_open: dict[object, str] = {}


def backends() -> dict[BackendName, bool | str]:
    """Return which backends can run here.

    Returns:
        For each name, `True` or the reason why the backend cannot run: `"native"` (C++ on CPUs), `"triton"` (GPUs),
        `"torch"` (tensor operations in chunks), `"log"` (the paper's form, in log space) and `"sequential"` (step by
        step).

    Examples:
        >>> mingru.backends()["torch"]
        True
    """
    return {name: backend.unavailable() or True for name, backend in BACKENDS.items()}


@contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Use this backend for `"auto"` in the current thread until the `with` block ends.

    It takes precedence over the environment variable `MINGRU_BACKEND`, which sets the backend for the whole process.
    Threads that Python did not start, as those in which PyTorch runs the backward pass of a GPU, use the block that was
    entered last. Call `backward` inside the block if it calls layers again, as `torch.utils.checkpoint` does.

    Without `with`, a call has no effect.

    Args:
        name: `"auto"`, or the name of a backend, for which see `mingru.backends`.

    Raises:
        ValueError: No backend has this name.

    Examples:
        >>> rnn = mingru.MinGRU(3, 8)
        >>> with mingru.use_backend("sequential"):
        ...     out, h = rnn(torch.zeros(2, 5, 3))
    """
    _check_name(name, "use_backend: name")
    before, _chosen.name = _chosen.name, name
    block = object()
    _open[block] = name
    try:
        yield
    finally:
        _chosen.name = before
        del _open[block]


def _selected(backend: str) -> tuple[str, str]:
    """Return the backend that the caller selected, or "auto", and by which means."""
    if backend != "auto":
        return backend, "backend"
    name = _chosen.name
    if name is None and _open and isinstance(threading.current_thread(), threading._DummyThread):
        name = list(_open.values())[-1]
    if name not in (None, "auto"):
        return name, "use_backend"
    return (_KEY in _environment and os.environ[VARIABLE]) or "auto", _BY_VARIABLE


def is_native(x: Tensor) -> bool:
    """Return whether an eager call for x is computed by the compiled kernels."""
    name, _ = _selected("auto")
    is_chosen = (FASTEST_FIRST[0] if name == "auto" else name) == "native"
    return is_chosen and x.is_cpu and not BACKENDS["native"].unavailable()


def is_for_native(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether an eager call computes these tensors, some of which may be None, in the compiled kernels."""
    return x.is_cpu and mode_of(x).is_eager and are_ordinary(x, *others) and is_native(x)


def choose(spec: Spec, sequence: Tensor, backend: str = "auto") -> Way:
    """Return how this spec runs on this tensor: the entrance of every recurrence."""
    mode, (name, selected_by) = mode_of(sequence), _selected(backend)
    if name != "auto":
        _check_name(name, f"{spec.cell}: {selected_by}")
    # An exported graph may run where the kernels of this package are not installed.
    if mode.is_traced or (name == "auto" and mode.is_exported):
        return way_of("torch", mode)
    if name == "auto":
        for name in FASTEST_FIRST:
            if _why_not(name, sequence, spec) is None:
                break
        if name == "torch" and not mode.is_compiled:
            _warn_if_kernels_are_missing(sequence, spec)
        return (_EAGER.get(name) if mode.is_eager else None) or way_of(name, mode)
    why = _why_not(name, sequence, spec)
    if why is not None:
        selected_by = f"{spec.cell}: {selected_by}"
        raise ValueError(f"{selected_by} selects {name!r}, which cannot run this because {why}; use 'auto'")
    # If the caller selected it, a kernel that fails is an error.
    return way_of("triton alone" if name == "triton" else name, mode)


def way_of(backend: str, mode: Mode) -> Way:
    """Return how a backend that was chosen runs in this mode, which in a backward pass may be another."""
    return Way(_IN_GRAPHS if backend == "torch" and mode.is_symbolic else backend, mode)


def backend_of(name: str) -> Backend:
    """Return the backend that was chosen."""
    return BACKENDS.get(name) or _CHOSEN[name]


def kernel_of(way: Way, call: Call) -> Kernel | None:
    """Return the fused kernel that can compute the recurrence from its pre-activations, or None."""
    spec, inputs, context, layout = call
    kernel = None if way.mode.needs_operations else backend_of(way.backend).kernel
    # The fields after the states are options, such as elapsed times, that a caller may have differentiated or wrapped.
    if kernel is None or not kernel.computes(spec) or not are_ordinary(*inputs, *context[2:]):
        return None
    # The parts of a number must be next to each other.
    if parts_of(spec.cell) > 1 and inputs[0].dim() > (3 if layout.batch_sizes is None else 2):
        return None
    return None if layout.lengths is not None and kernel.packed and not kernel.lengths else kernel


def fused_with(linear: Any, way: Way, call: Call, norm: nn.Module | None = None, gated: bool = False) -> Call | None:
    """Return the call of a fused kernel that computes the recurrence of linear(norm(x)), or None.

    Without a linear map, x has the pre-activations of a GRU, side by side.
    """
    spec, (x,), context, layout = call
    kernel = None if way.mode.needs_operations else backend_of(way.backend).linear_kernel
    has_more = norm is not None or gated
    if kernel is None or not kernel.computes(spec) or (has_more and not kernel.whole):
        return None
    if gated:
        spec = spec._replace(output_gate=True)
    # The kernel's sizes depend on the values of lengths, which a captured graph does not know.
    if layout.lengths is not None and (not kernel.lengths or way.mode.is_symbolic):
        return None
    weight: Any = None
    bias: Any = None
    if linear is not None:
        if type(linear) not in LINEAR_MAPS or is_hooked(linear):
            return None
        weight, bias = weights_of(linear)
        if weight is None:
            return None
    if not are_ordinary(x, weight, bias, *context[2:]) or not x.is_floating_point() or x.numel() == 0:
        return None
    if linear is None:
        return Call(spec, [x, weight, bias], context, layout)
    # The product with the weight of a norm would broadcast.
    if weight.shape[1:] != x.shape[-1:] or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    if way.mode.is_autocast:
        # For few rows, as in a step, `linear` is faster, because autocast casts its weights once for all calls.
        is_small = spec.cell != "gru" and x.shape[:-1].numel() * _CASTS < weight.numel()
        tensors = None if norm is not None or (is_small and not way.mode.is_compiled) else _autocast(x, weight, bias)
        return None if tensors is None else Call(spec, [*tensors], context, layout)
    if x.dtype != weight.dtype or (bias is not None and x.dtype != bias.dtype):
        return None
    call = Call(spec, [x, weight, bias], context, layout)
    return call if norm is None else _with_norm(call, norm)


def _with_norm(call: Call, norm: Any) -> Call | None:
    """Return the call of a kernel that normalizes x, or None if this module does something else."""
    kind, (x, weight, bias) = NORMS.get(type(norm)), call.tensors
    if kind is None or is_hooked(norm):
        return None
    of_norm, shape = weights_of(norm), x.shape[-1:]
    own = [each for each in of_norm if each is not None]
    if not are_ordinary(*own) or any(each.dtype != x.dtype or each.shape != shape for each in own):
        return None
    if norm.normalized_shape != shape or (norm.eps is None and kind == "layer"):
        return None
    spec = with_norm(call.spec, kind, norm.eps, x.dtype)
    return Call(spec, [x, *map_with_norm(weight, bias, *of_norm)], call.context, call.layout)


def _autocast(*tensors: Tensor | None) -> Any:
    """Return the tensors in the dtype in which `nn.Linear` computes under autocast; None if it does not cast them."""
    given = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.dtype == torch.float64 for tensor in given):
        return None
    dtype = torch.get_autocast_dtype(given[0].device.type)
    return tuple(None if tensor is None else as_dtype(tensor, dtype) for tensor in tensors)


def is_hooked(module: nn.Module) -> bool:
    """Return whether calling the module does more than its class did when this package was imported."""
    cls, own = type(module), module.__dict__
    is_patched = cls.forward is not FORWARDS.get(cls, cls.forward) and not is_compiling()
    return is_patched or "forward" in own or any(map(own.get, HOOKS)) or bool(has_any_global_hook())


def _warn_if_kernels_are_missing(sequence: Tensor, spec: Spec) -> None:
    """Warn once for each reason why the kernels for this device cannot run this."""
    kind = sequence.device.type
    if kind == "cpu":
        devices, why = "the CPU", BACKENDS["native"].unavailable()
        if why is None and spec.cell not in native.CELL_NUMBERS:
            why = f"the compiled kernels lack the cell {spec.cell!r}"
    elif kind in triton.DEVICES:
        devices, why = "GPUs", _why_not("triton", sequence, spec)
    else:
        devices, why = kind.upper(), "there are kernels only for the CPU, CUDA, ROCm and XPU"
    if why is not None and kind != "meta":
        warn_once(f"using the slower backend 'torch' on {devices}, because {why}")


def _why_not(name: str, sequence: Tensor, spec: Spec) -> str | None:
    backend = BACKENDS[name]
    if spec.cell in _RAREST:
        spec = Spec(_RAREST[spec.cell], *spec[1:])
    # In this order, because a backend may have to be loaded to tell whether it is available.
    return backend.unsupported(sequence, spec) or backend.unavailable()


def _check_name(name: object, selected_by: str) -> None:
    if name not in ("auto", *BACKENDS):
        names = ", ".join(repr(known) for known in ("auto", *BACKENDS))
        raise ValueError(f"{selected_by} must be one of {names}, got {name!r}")
