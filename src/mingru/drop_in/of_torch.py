"""`torch.nn.GRU`, `LSTM` and their cells, which compute by the kernels of this library where these take less time."""

import sys
from abc import ABCMeta
from collections.abc import Callable
from contextvars import ContextVar
from inspect import Signature, signature
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from ..ops.names_of_torch import PREPARE_SCRIPTABLE
from . import operators

# What `patch` builds in this context in place of these classes, innermost last.
PATCHES: ContextVar[tuple[Any, ...]] = ContextVar("patches", default=())


class OfTorch(ABCMeta):
    """Metaclass of four classes that programs and torch's tools take for torch's own.

    They ask for a class by `isinstance`, but also by `type(rnn) == nn.GRU`, by keys of tables, as quantization does,
    and by the module of an instance, as torch.fx does. Subclasses of the four are classes like others.
    """

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, object], **options: object) -> "OfTorch":
        # Otherwise it were that of ABCMeta for a class that torch makes, for parametrizations or FSDP.
        namespace = {"__module__": sys._getframe(1).f_globals["__name__"], **namespace}
        return super().__new__(mcs, name, bases, namespace, **options)

    @property
    def of_torch(cls) -> Any:
        """Torch's class of one of the four, otherwise None."""
        return vars(cls).get("_of_torch")

    __module__ = property(lambda cls: __name__ if cls.of_torch else vars(cls)["__module__"])

    @property
    def __signature__(cls) -> Signature:
        """That of the constructor, because the one of `__call__` says nothing."""
        return signature(MethodType(cls.__init__, cls))  # type: ignore[misc]

    def __eq__(cls, other: object) -> bool:
        return other is cls or (other is not None and other is cls.of_torch)

    def __hash__(cls) -> int:
        return hash(cls.of_torch) if cls.of_torch else super().__hash__()

    def __instancecheck__(cls, instance: object) -> bool:
        # Not before a layer of ours has values: transformers would initialize it as one of torch, and fail at a norm.
        return cls.__subclasscheck__(type(instance)) and not getattr(instance, "_is_empty", False)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return super().__subclasscheck__(subclass) or (cls.of_torch is not None and issubclass(subclass, cls.of_torch))

    def __call__(cls, *args: object, **kwargs: object) -> Any:
        for patch in reversed(PATCHES.get()):
            if patch.builds(cls):
                return patch.build(cls, *args, **kwargs)
        return super().__call__(*args, **kwargs)


def _computed(forward: Callable[..., object]) -> FunctionType:
    """Return torch's `forward`, with its checks and errors, in which the module of torch's operators is ours."""
    names = {**forward.__globals__, "_VF": operators}
    # Otherwise `torch.compile`, told to compile recurrent layers, looks for the names in torch's module.
    del names["__name__"]
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
    own.__doc__ = "Return what torch's layer returns."
    return own


# Not `nn.GRU`, which is one of these in a block of `patch`.
class GRU(nn.modules.GRU, metaclass=OfTorch):
    """Apply a `torch.nn.GRU`, and compute it by the kernels of this library on the CPU where these take less time.

    It is torch's class: its constructor, `forward`, weights, `state_dict`, initialization, errors and repr, and
    `isinstance(rnn, torch.nn.GRU)` is true. In float32 it computes by the kernels from 10 time steps on, in training
    from 6 on, and in float64 from 20 on; with 128 features or more, from twice as many, and a single sequence of 256
    or more without gradients, from four times as many. Otherwise, and on other devices, in other dtypes, in graphs,
    under autocast and transforms, it computes what torch does. `lengths=` and `reset=` are arguments of `mingru.GRU`.

    Programs and torch's tools take the class for torch's: it equals `torch.nn.GRU`, and
    `isinstance(torch.nn.GRU(3, 4), mingru.drop_in.GRU)` is true.

    Args:
        args: Arguments of `torch.nn.GRU`.
        kwargs: Keyword arguments of `torch.nn.GRU`.

    Examples:
        >>> rnn = mingru.drop_in.GRU(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10), torch.zeros(2, 3, 20))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
        >>> rnn
        GRU(10, 20, num_layers=2)
    """

    __module__, _of_torch = nn.modules.GRU.__module__, nn.modules.GRU
    forward = _computed(nn.modules.GRU.forward)


class LSTM(nn.modules.LSTM, metaclass=OfTorch):
    """Apply a `torch.nn.LSTM`, and compute it by the kernels of this library on the CPU where these take less time.

    It is torch's class, as `mingru.drop_in.GRU` is. Packed sequences of different lengths, and float64, are computed by
    the kernels from 10 time steps on, unless many sequences of many features are float64; other sequences in float32
    from 40 on, with AVX-512, unless oneDNN is faster.

    Args:
        args: Arguments of `torch.nn.LSTM`.
        kwargs: Keyword arguments of `torch.nn.LSTM`.

    Examples:
        >>> output, (h_n, c_n) = mingru.drop_in.LSTM(10, 20, num_layers=2)(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))
    """

    __module__, _of_torch = nn.modules.LSTM.__module__, nn.modules.LSTM
    forward = _computed(nn.modules.LSTM.forward)


class GRUCell(nn.modules.GRUCell, metaclass=OfTorch):
    """Compute a `torch.nn.GRUCell`, on the CPU by the kernel of a GRU where this takes less time.

    It is torch's class, as `mingru.drop_in.GRU` is. The kernel computes it without gradients, from 64 sequences and a
    B H (H + I) of 2 million on.

    Args:
        input_size: Number of input features, I.
        hidden_size: Number of state features, H.
        bias: If False, there are no biases.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Examples:
        >>> mingru.drop_in.GRUCell(10, 20)(torch.randn(3, 10), torch.zeros(3, 20)).shape
        torch.Size([3, 20])
    """

    __module__, _of_torch = nn.modules.GRUCell.__module__, nn.modules.GRUCell
    forward = _computed(nn.modules.GRUCell.forward)


class LSTMCell(nn.modules.LSTMCell, metaclass=OfTorch):
    """Compute a `torch.nn.LSTMCell`, by torch: there is no kernel for one step of an LSTM that takes less time.

    It is torch's class, as `mingru.drop_in.GRU` is, so that one import serves programs that use several of them.

    Args:
        input_size: Number of input features, I.
        hidden_size: Number of state features, H.
        bias: If False, there are no biases.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Examples:
        >>> h, c = mingru.drop_in.LSTMCell(10, 20)(torch.randn(3, 10))
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    __module__, _of_torch = nn.modules.LSTMCell.__module__, nn.modules.LSTMCell


def _with_class_of_torch(layer: Any) -> Any:
    """Return the layer with torch's class, whose `forward` TorchScript compiles."""
    layer.__class__ = layer._of_torch
    return layer


OWN: dict[type[nn.Module], OfTorch] = {each.of_torch: each for each in (GRU, LSTM, GRUCell, LSTMCell)}
for _kind in OWN.values():
    setattr(_kind, PREPARE_SCRIPTABLE, _with_class_of_torch)
