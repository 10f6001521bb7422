"""Right and wrong calls, for type checkers: mypy fails if a wrong one has no error, because its comment is then unused.

`make check` runs mypy. Nothing here is executed.
"""

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import assert_type

import mingru
from mingru import drop_in


def right(x: Tensor, packed: PackedSequence, ids: Tensor) -> None:
    rnn = mingru.MinGRU(3, 4, norm="rms", gate=["signed", "sigmoid"])
    assert_type(rnn(x, None, reset=x, lengths=x, dt=x), tuple[Tensor, Tensor])
    assert_type(mingru.MinLSTM(3, 4, candidate="tanh")(packed, reset=packed), tuple[PackedSequence, Tensor])
    assert_type(mingru.MinGRUCell(3, 4, gate="rotation")(x, x), Tensor)
    assert_type(mingru.MinLSTMCell(3, 4)(nn.Parameter(x), dt=x), Tensor)
    assert_type(mingru.MinConv2dGRU(3, 4, 3, norm="group")(x, [x]), tuple[Tensor, list[Tensor]])
    assert_type(mingru.MinConv1dGRUCell(3, 4, 3)(x), Tensor)
    stack = mingru.Stack([mingru.MinGRU(3, 4)])
    assert_type(stack(packed, (x,)), tuple[PackedSequence, list[Tensor]])
    assert_type(mingru.models.Block(3, cell="minlstm", norm="layer")(x), tuple[Tensor, list[Tensor]])
    lm = mingru.models.LanguageModel(3, 4, 1, cell="mingru", conv=4, mlp=2.0, gate=["signed"], memory=(2, 60))
    assert_type(lm(ids, lengths=x), tuple[Tensor, list[Tensor]])
    for name in mingru.backends():
        with mingru.use_backend(name):
            assert_type(mingru.functional.mingru(x, x, kind="mixed", backend=name), Tensor)


def wrong(x: Tensor, packed: PackedSequence) -> None:
    mingru.MinGRU(3, 4, norm="batch")  # type: ignore[arg-type]
    mingru.MinGRU(3, 4, gate="sigmod")  # type: ignore[arg-type]
    mingru.MinLSTM(3, 4, residual="hihgway")  # type: ignore[arg-type]
    mingru.MinGRUCell(3, 4, candidate="relu")  # type: ignore[arg-type]
    mingru.MinConv2dGRU(3, 4, 3, norm="layer")  # type: ignore[arg-type]
    drop_in.LSTMLike(3, 4, cell="lstm")  # type: ignore[arg-type]
    drop_in.GRULike(3, 4, nrom="rms", cell="mingru")  # type: ignore[call-arg]
    mingru.MinGRU(3, 4)(x, resets=x)  # type: ignore[call-arg]
    mingru.MinGRU(3, 4)([x])  # type: ignore[type-var]
    mingru.MinGRU(3, 4)(packed, reset=x)  # type: ignore[type-var]
    mingru.Stack([mingru.MinGRU(3, 4)])(x, x)  # type: ignore[arg-type]
    mingru.models.LanguageModel(3, 4, 1, hidden=3)  # type: ignore[call-arg]
    mingru.models.LanguageModel(3, 4, 1, norm="batch")  # type: ignore[arg-type]
    mingru.models.Block(3, hidden=3)  # type: ignore[call-arg]
    mingru.models.LanguageModel(3, 4, 1)(x, dt=x)  # type: ignore[call-arg]
    mingru.use_backend("cuda")  # type: ignore[arg-type]
    mingru.functional.mingru(x, x, kind="stream")  # type: ignore[arg-type]
    mingru.functional.minlstm(x, x, x, activation="relu")  # type: ignore[arg-type]
    mingru.export.onnx(nn.GELU(), x, "gelu.onnx", kind="stream")  # type: ignore[arg-type]
    mingru.functional.elapsed_times(x)  # type: ignore[call-arg]
    mingru.minGRU  # type: ignore[attr-defined]  # noqa: B018
    _, _, _ = mingru.MinLSTM(3, 4)(x)  # type: ignore[misc]
    mingru.MinGRUCell(3, 4)(x).detached()  # type: ignore[attr-defined]
