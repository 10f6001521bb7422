"""Build a program's recurrent layers from this library, while a block runs.

In the block, each patched name of torch.nn is bound to the class of `mingru.drop_in` of this name, a subclass of
torch's. If it is called while a patch with `cell` is active in the calling thread, it constructs a layer of another
cell.
"""

import sys
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, NamedTuple

from torch import nn

from ..check.calls import arguments_checked
from .accelerating import SUBCLASS, described
from .of_torch import OWN, TORCHS, as_torchs
from .replacing import LIKE, Wanted, converted, wanted


class PatchReport(NamedTuple):
    """Printable report of `patch`."""

    built: list[tuple[str, str]]
    """Layer, and the place in the program that constructed it, for each layer that was built in the block."""
    left: list[tuple[str, str]]
    """Class, and the reason, for each subclass of torch's layers, which stays what it is."""

    def __str__(self) -> str:
        lines = [f"{place}: {layer}" for layer, place in self.built]
        return "\n".join(lines + [f"{name} not replaced: {why}" for name, why in self.left]) or "nothing built"


@dataclass(eq=False)
class _Patch:
    """A block that is running: what it replaces, where, and its report."""

    wanted: Wanted
    everywhere: bool
    report: PatchReport

    def reported(self, layer: nn.Module) -> nn.Module:
        """Return a layer, and report it with the place that called the constructor, which calls this."""
        frame = sys._getframe(2)
        place = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        self.report.built.append((described(layer), place))
        return layer


# The blocks of this context, innermost last. A copy of it, such as a task's, may outlive them.
_PATCHES: ContextVar[tuple[_Patch, ...]] = ContextVar("patches", default=())
# The blocks of all threads, and the names that they have bound: namespace, name and class of torch.
_RUNNING: list[_Patch] = []
_BOUND: list[tuple[dict[str, object], str, type[nn.Module]]] = []
_LOCK = threading.Lock()


@contextmanager
@arguments_checked(function="patch")
def patch(
    gru: bool = True,
    lstm: bool = True,
    *,
    cells: bool = True,
    everywhere: bool = False,
    num_layers: int | None = None,
    **options: Any,
) -> Iterator[PatchReport]:
    """Let a program build the layers of this library wherever it builds `torch.nn.GRU`, `torch.nn.LSTM` or their cells.

    For programs that construct their own layers, such as other libraries. In the block, `torch.nn.GRU` is
    `mingru.drop_in.GRU`, and likewise the other classes: they are torch's, and compute the same in less time. What a
    program saves, loads, prints and initializes is torch's, in the block and outside. With `cell`, it builds layers of
    another cell instead, `mingru.drop_in.GRULike` and its like, and so does `mingru.drop_in.GRU` itself. Some libraries
    construct layers in `fit` or `train`: then the block must contain these calls.

    Args:
        gru: If True, replace `torch.nn.GRU` and `torch.nn.GRUCell`.
        lstm: If True, replace `torch.nn.LSTM` and `torch.nn.LSTMCell`.
        cells: If False, leave `torch.nn.GRUCell` and `torch.nn.LSTMCell`, which take less time to train than those of
            another cell.
        everywhere: If True, also replace names that loaded modules have bound by `from torch.nn import GRU`.
        num_layers: Number of layers of each layer that is built, in place of the program's, for a program that neither
            passes states nor reads `h_n`. It requires `cell`. Default: the program's.
        options: `cell`, which is "gru", "mingru" or "minlstm", and other keyword options of
            `mingru.drop_in.GRULike`, such as `norm="rms"`, which require `cell`. A cell gets those that it has.

    Returns:
        A context manager. It returns a report, which can be printed: `report.built` has (layer, place in the program)
        for each layer that was built. With `cell`, `report.left` has, when the block ends, (class, reason) for each
        subclass of torch's layers, which is not replaced.

    Raises:
        TypeError: An argument has the wrong type, no class has an option of this name, or there are options without
            `cell`.
        ValueError: `gru` and `lstm` are both False.

    Warns:
        UserWarning: The block built no layer, or with `cell`, the program has a class that inherits from one of torch's
            classes.

    Without `with`, a call has no effect.

    However the block is left, torch's names are restored; a name that a module has bound by an import in the block
    stays `mingru.drop_in.GRU`, which computes what torch's class does. Blocks may be nested; the innermost one that
    replaces a class decides. `cell` applies to the thread that entered the block; other threads build layers that
    compute what torch's do, and new processes build layers of torch.

    `isinstance(rnn, torch.nn.GRU)` is false of the layers that a block with `cell` has built, and in any block of those
    that torch's own class has built. The weights of another cell have other names and shapes than torch's. A program
    that builds the model again and then loads weights must do this in a block with the same options,
    or call `mingru.drop_in.replace` on the new model before it loads them. Otherwise `load_state_dict` raises an error,
    also with `strict=False`: "size mismatch for rnn.bias_hh_l0: copying a param with shape torch.Size([]) from
    checkpoint". If it is strict, it also names `rnn.load_in_mingru_drop_in_patch`. Whole models, saved by `torch.save`
    or pickle, load with and without a block.

    Examples:
        >>> def program():
        ...     return torch.nn.Sequential(torch.nn.LSTM(3, 4))
        >>> with mingru.drop_in.patch() as report:
        ...     model = program()
        >>> type(model[0]) is mingru.drop_in.LSTM and isinstance(model[0], torch.nn.LSTM)
        True
        >>> with mingru.drop_in.patch(cell="minlstm", norm="rms") as report:
        ...     model = program()
        >>> [layer for layer, place in report.built]
        ["mingru.drop_in.LSTMLike(3, 4, norm='rms', cell='minlstm')"]
    """
    running = _Patch(wanted("patch", gru, lstm, cells, num_layers, options), everywhere, PatchReport([], []))
    _PATCHES.set((*_PATCHES.get(), running))
    try:
        with _LOCK:
            _RUNNING.append(running)
            _bind({id(of_torch): of_torch for of_torch in OWN if of_torch in running.wanted}, everywhere)
        yield running.report
    finally:
        _PATCHES.set(tuple(each for each in _PATCHES.get() if each is not running))
        with _LOCK:
            _RUNNING.remove(running)
            _restore()
    for subclass in (each for kind in running.wanted if options and kind in OWN for each in _subclasses(kind)):
        name = f"{subclass.__module__}.{subclass.__qualname__}"
        running.report.left.append((name, SUBCLASS))
        text = f"patch: {name} is not replaced, because {SUBCLASS}; derive it from a class of mingru.drop_in instead"
        warnings.warn(text, stacklevel=3)
    if not running.report.built:
        remedy = "put the call that builds it, such as a constructor, fit or train, there, or pass everywhere=True"
        warnings.warn(f"patch: no layer was built in the block; {remedy}", stacklevel=3)


def _subclasses(of_torch: type[nn.Module]) -> Iterator[type[nn.Module]]:
    """Yield the loaded classes that inherit from a class of torch, except those of torch and of this package."""
    for subclass in type.__subclasses__(of_torch):
        if subclass.__module__.partition(".")[0] not in ("torch", __name__.partition(".")[0]):
            yield subclass
        yield from _subclasses(subclass)


def _bind(by_id: dict[int, type[nn.Module]], everywhere: bool) -> None:
    """Bind every name for a class of torch to ours, in torch.nn or in all modules of programs too."""
    own, modules = ("torch", __name__.partition(".")[0]), list(sys.modules.items())
    of_programs = [each for name, each in modules if everywhere and name.partition(".")[0] not in own]
    for module in [nn, *(each for each in of_programs if isinstance(each, types.ModuleType))]:
        for name, value in list(vars(module).items()):
            if id(value) in by_id:
                # Not by setattr, which a class of modules may refuse.
                vars(module)[name] = OWN[by_id[id(value)]]
                _BOUND.append((vars(module), name, by_id[id(value)]))


def _restore() -> None:
    """Bind names to torch's classes again, except those that a running block replaces."""
    for bound in list(_BOUND):
        names, name, of_torch = bound
        if any(of_torch in each.wanted and each.everywhere >= (names is not vars(nn)) for each in _RUNNING):
            continue
        _BOUND.remove(bound)
        if names.get(name) is OWN[of_torch]:
            names[name] = of_torch


def _patch_of(kind: type) -> _Patch | None:
    """Return the running block that builds layers in place of those of a class itself, or None."""
    return next((each for each in reversed(_PATCHES.get()) if each in _RUNNING and kind in each.wanted), None)


def _let_patches_build(own: Any) -> None:
    """Let the constructor of one of our classes return what a block builds, and report it."""

    @wraps(own.__init__)
    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # Copies, and layers from files, are made without arguments.
        patch = _patch_of(cls) if args or kwargs else None
        if patch is None or not patch.wanted[cls]:
            return super(own, cls).__new__(cls)
        given = dict(zip(signature(LIKE[cls]).parameters, args, strict=False)) | kwargs
        return patch.reported(LIKE[cls](**converted(given) | patch.wanted[cls]))

    @wraps(own.__init__)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        super(own, self).__init__(*args, **kwargs)
        if type(self) is own:
            as_torchs(self)
        if patch := _patch_of(type(self)):
            patch.reported(self)

    own.__new__, own.__init__ = staticmethod(new), init


for _own in TORCHS:
    _let_patches_build(_own)
