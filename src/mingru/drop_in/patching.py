"""Build a program's recurrent layers from this library, while a block runs.

In the block, each patched name of torch.nn is bound to a `StandIn`. If it is called while a patch is active in the
calling thread, it constructs one of our layers. Otherwise it constructs a layer of torch: in other threads, and after
the block by a name that was imported in the block.
"""

import sys
import threading
import types
import warnings
from abc import ABCMeta
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

from torch import nn

from ..check.values import check_flag
from ..ops.names_of_torch import ASKED_BY_COMPILED
from .interface import converted
from .twins import SUBCLASS, TWINS, Wanted, described, wanted_twins

_HINT = "a loop that sets biases to 0 undoes forget_bias and memory: call reset_parameters() of these layers after it"


class PatchReport(NamedTuple):
    """Printable report of `patch`."""

    built: list[tuple[str, str]]
    """Layer, and the place in the program that constructed it, for each layer that was built in the block."""
    left: list[tuple[str, str]]
    """Class, and the reason, for each subclass of torch's layers, which stays what it is."""

    def __str__(self) -> str:
        lines = [f"{place}: {layer}" for layer, place in self.built]
        lines += [f"{name} not replaced: {why}" for name, why in self.left]
        lines += [_HINT] * any("cell='gru'" not in layer for layer, _ in self.built)
        return "\n".join(lines) or "nothing built"


@dataclass(eq=False)
class _Patch:
    """A block that is running: what it replaces, where, and its report."""

    wanted: Wanted
    everywhere: bool
    report: PatchReport

    def leave(self, cls: type, stacklevel: int) -> None:
        """Report a class that is not replaced, and warn."""
        name = f"{cls.__module__}.{cls.__qualname__}"
        self.report.left.append((name, SUBCLASS))
        text = f"patch: {name} is not replaced, because {SUBCLASS}; derive it from a class of mingru.drop_in instead"
        warnings.warn(text, stacklevel=stacklevel)


# Innermost last. A thread, and a task of asyncio, sees the blocks that it has entered.
_PATCHES: ContextVar[tuple[_Patch, ...]] = ContextVar("patches", default=())
# The blocks of all threads.
_RUNNING: list[_Patch] = []
_LOCK = threading.Lock()


class StandIn(ABCMeta):
    """Metaclass of the classes that torch.nn has in a block. They are classes, because programs ask isinstance."""

    of_torch: type[nn.Module]

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        if not any(isinstance(base, StandIn) for base in bases):
            return super().__new__(mcs, name, bases, namespace, **options)
        # A class statement of the program: it subclasses torch's class, as if it had been loaded before the block.
        of_torch = tuple(base.of_torch if isinstance(base, StandIn) else base for base in bases)
        cls = types.new_class(name, of_torch, options, lambda made: made.update(namespace))
        for base in bases:
            patch = base.patch() if isinstance(base, StandIn) else None
            if patch is not None:
                patch.leave(cls, 3)
        return cls

    def patch(cls) -> _Patch | None:
        """Return the innermost active patch of this class."""
        # A copy of the context, such as a task's, may outlive its block.
        running = [each for each in _PATCHES.get() if each in _RUNNING and cls.of_torch in each.wanted]
        return running[-1] if running else None

    def classes(cls, asked_by: str) -> tuple[type, ...]:
        """Return the classes that this one is for a module."""
        # Both must not take our layers for those of torch: torch.compile rejects those, transformers initializes them.
        is_program = asked_by.partition(".")[0] not in ("torch", "transformers") or asked_by in ASKED_BY_COMPILED
        is_ours = cls.patch() is not None and is_program
        return (cls.of_torch, TWINS[cls.of_torch]) if is_ours else (cls.of_torch,)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.classes(sys._getframe(1).f_globals.get("__name__", "")))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.classes(sys._getframe(1).f_globals.get("__name__", "")))

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        patch, twin = cls.patch(), TWINS[cls.of_torch]
        if patch is None:
            return cls.of_torch(*args, **kwargs)
        try:
            bound = signature(twin).bind(*args, **kwargs)
        except TypeError:
            return twin(*args, **kwargs)  # whose error says more
        layer = twin(**converted(bound.arguments) | patch.wanted[cls.of_torch])
        frame = sys._getframe(1)
        place = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        patch.report.built.append((described(layer), place))
        return layer


_STAND_INS: dict[type[nn.Module], StandIn] = {
    of_torch: StandIn(of_torch.__name__, (twin,), {"of_torch": of_torch, "__module__": "torch.nn"})
    for of_torch, twin in TWINS.items()
}


@contextmanager
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

    For programs that construct their own layers, such as other libraries. In the block, `torch.nn.GRU` stands for
    `mingru.drop_in.GRU`, and likewise the other classes. This includes `getattr(torch.nn, name)` and
    `isinstance(m, torch.nn.GRU)`, but not `type(m) is torch.nn.GRU`. Some libraries construct layers in `fit` or
    `train`: then the block must contain these calls.

    Args:
        gru: If True, replace `torch.nn.GRU` and `torch.nn.GRUCell`.
        lstm: If True, replace `torch.nn.LSTM` and `torch.nn.LSTMCell`.
        cells: If False, leave `torch.nn.GRUCell` and `torch.nn.LSTMCell`, which take less time to train.
        everywhere: If True, also replace names that loaded modules have bound by `from torch.nn import GRU`.
        num_layers: Number of layers of each layer that is built, in place of the program's, for a program that neither
            passes states nor reads `h_n`. Default: the program's.
        options: Keyword options of the classes of `mingru.drop_in`, such as `norm="rms"` or `cell="minlstm"`, a minGRU
            for a GRU and a minLSTM for an LSTM. A class gets those that it has. Default: `cell="gru"` with one
            block, which is `torch.nn.GRU` itself, also for an LSTM.

    Returns:
        A context manager. It returns a report, which can be printed: `report.built` has (layer, place in the program)
        for each layer that was built, `report.left` has (class, reason) for each subclass of torch's layers, which is
        not replaced.

    Raises:
        TypeError: An argument has the wrong type, or no class has an option of this name.
        ValueError: `gru` and `lstm` are both False.

    Warns:
        UserWarning: The block built no layer, or the program has a class that inherits from one of torch's classes.

    Without `with`, a call has no effect.

    However the block is left, torch's names are restored, also in modules that were loaded in the block. Blocks may be
    nested; the innermost one that replaces a class decides. A block applies to the thread that entered it; other
    threads, and processes with an interpreter of their own, build layers of torch.

    A state_dict of `torch.nn.GRU` loads into the default. To use one with other options, load it outside of the block,
    and call `replace`, which initializes these layers. A model that was built in a block is saved with its weights,
    which have other names and shapes than torch's. A program that builds the model again and then loads weights must
    do this in a block with the same options, or call `mingru.drop_in.replace` on the new model before it loads them.
    Otherwise `load_state_dict` raises an error, also with `strict=False`: "size mismatch for rnn.bias_hh_l0: copying a
    param with shape torch.Size([]) from checkpoint". If it is strict, it also names
    `rnn.load_in_mingru_drop_in_patch`. Whole models, saved by `torch.save` or pickle, load with and without a block.

    Examples:
        >>> def program():
        ...     return torch.nn.Sequential(torch.nn.LSTM(3, 4))
        >>> with mingru.drop_in.patch(cell="minlstm", norm="rms") as report:
        ...     model = program()
        >>> model
        Sequential(
          (0): LSTM(3, 4, norm='rms')
        )
        >>> [layer for layer, place in report.built]
        ["mingru.drop_in.LSTM(3, 4, norm='rms')"]
    """
    check_flag("patch", "everywhere", everywhere)
    running = _Patch(wanted_twins("patch", gru, lstm, cells, num_layers, **options), everywhere, PatchReport([], []))
    stand_ins = {of_torch: _STAND_INS[of_torch] for of_torch in running.wanted}
    for of_torch in running.wanted:
        for subclass in _subclasses(of_torch):
            running.leave(subclass, 4)
    _PATCHES.set((*_PATCHES.get(), running))
    changed: list[types.ModuleType] = []
    try:
        with _LOCK:
            _RUNNING.append(running)
            _bind(stand_ins, [nn])
            changed = _bind(stand_ins, _modules_of_programs() if everywhere else [])
        yield running.report
    finally:
        _PATCHES.set(tuple(each for each in _PATCHES.get() if each is not running))
        with _LOCK:
            _RUNNING.remove(running)
            # Also names that the block has bound by an import. Those of a block around it stay.
            _restore([nn, *_modules_of_programs()], _RUNNING)
            _restore(changed, [each for each in _RUNNING if each.everywhere])
    if not running.report.built:
        call = "the call that constructs the layers into the block, such as the model's constructor, fit or train"
        remedy = f"put {call}, or pass everywhere=True"
        warnings.warn(f"patch: no layer was built in the block; {remedy}", stacklevel=3)


def _subclasses(of_torch: type[nn.Module]) -> Iterator[type[nn.Module]]:
    """Yield the loaded classes that inherit from a class of torch, except torch's own and that of `accelerate`."""
    for subclass in of_torch.__subclasses__():
        if subclass.__module__.partition(".")[0] not in ("torch", __name__.partition(".")[0]):
            yield subclass
        yield from _subclasses(subclass)


def _modules_of_programs() -> list[types.ModuleType]:
    loaded = list(sys.modules.items())
    own = ("torch", __name__.partition(".")[0])
    return [each for name, each in loaded if isinstance(each, types.ModuleType) and name.partition(".")[0] not in own]


def _bind(classes: dict[Any, Any], modules: list[types.ModuleType]) -> list[types.ModuleType]:
    """Bind every name for a key of `classes` to its value. Return the modules that have such names."""
    by_id, changed = {id(old): new for old, new in classes.items()}, []
    for module in modules:
        for name, value in list(vars(module).items()):
            if id(value) in by_id:
                # Not by setattr, which a class of modules may refuse.
                vars(module)[name] = by_id[id(value)]
                changed.append(module)
    return changed


def _restore(modules: list[types.ModuleType], running: Collection[_Patch]) -> None:
    """Bind names to torch's classes again, except those that a running block replaces."""
    stay = {of_torch for each in running for of_torch in each.wanted}
    _bind({stand_in: of_torch for of_torch, stand_in in _STAND_INS.items() if of_torch not in stay}, modules)
