"""`torch.nn.GRU`, `LSTM` and their cells, which compute by the kernels of this library where these take less time."""

from collections.abc import Callable
from types import FunctionType

from torch import nn

from ..ops.names_of_torch import PREPARE_SCRIPTABLE
from . import operators


def _computed(forward: Callable[..., object]) -> FunctionType:
    """Return torch's `forward`, with its checks and errors, in which the module of torch's operators is ours."""
    names = {**forward.__globals__, "_VF": operators}
    # Otherwise `torch.compile`, told to compile recurrent layers, looks for the names in torch's module.
    del names["__name__"]
    own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__)
    own.__doc__ = "Return what torch's layer returns."
    return own


# Not `nn.GRU`, which is one of these in a block of `patch`.
class GRU(nn.modules.GRU):
    """Apply a `torch.nn.GRU`, and compute it by the kernels of this library on the CPU where these take less time.

    It is torch's class: its constructor, `forward`, weights, `state_dict`, initialization, errors and repr, and
    `isinstance(rnn, torch.nn.GRU)` is true. In float32 it computes by the kernels from 10 time steps on, in training
    from 6 on, and in float64 from 20 on; with 128 features or more, from twice as many, and a single sequence of 256
    or more without gradients, from four times as many. On processors that multiply bfloat16, also in it and under
    autocast to it. Otherwise, and on other devices, in other dtypes, in graphs and under transforms, it computes what
    torch does. `lengths=` and `reset=` are arguments of `mingru.GRU`.

    Where a tool asks for the type itself, such as `type(rnn) == torch.nn.GRU`, call
    `mingru.drop_in.accelerate(rnn, undo=True)` before it.

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

    forward = _computed(nn.modules.GRU.forward)


class LSTM(nn.modules.LSTM):
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

    forward = _computed(nn.modules.LSTM.forward)


class GRUCell(nn.modules.GRUCell):
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

    forward = _computed(nn.modules.GRUCell.forward)


class LSTMCell(nn.modules.LSTMCell):
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


# Torch's classes and ours.
OWN: dict[type, type[nn.Module]] = {each.__mro__[1]: each for each in (GRU, LSTM, GRUCell, LSTMCell)}
TORCHS = {own: of_torch for of_torch, own in OWN.items()}


def as_torchs(layer: nn.Module) -> None:
    """Let torch.fx, which asks for the module of a layer, take one of ours for torch's, which it does not trace."""
    vars(layer)["__module__"] = nn.modules.GRU.__module__


def _with_class_of_torch(layer: nn.Module) -> nn.Module:
    """Return the layer with torch's class, whose `forward` TorchScript compiles."""
    layer.__class__ = next(TORCHS[each] for each in type(layer).__mro__ if each in TORCHS)
    return layer


for _own in TORCHS:
    setattr(_own, PREPARE_SCRIPTABLE, _with_class_of_torch)
