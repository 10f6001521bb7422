"""Layers in the form that other libraries expect. Each module needs its library, and is imported by its name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..check import values
from ..models.block import LAYERS

# Of a minGRU or minLSTM in a policy, by default: a state of both signs, which begins at 0, and beside it the input.
# Their difference is a change over time.
OPTIONS: dict[str, object] = {"candidate": "tanh", "residual": True}


class WithStatesOfTorch(nn.Module):
    """Apply layers of this library whose states have the shape of torch's, (L, B, H).

    Options are those of `mingru.GRU`, or of the layer that `cell` names, and `name` begins the messages of errors.
    """

    def __init__(
        self, name: str, input_size: int, hidden_size: int, num_layers: int = 1, cell: str = "gru", **options: object
    ) -> None:
        super().__init__()
        values.check_choice(name, "cell", cell, LAYERS)
        options = options if cell == "gru" else {**OPTIONS, **options}
        self.layer = LAYERS[cell](input_size, hidden_size, num_layers, **options)
        starts_at_0 = not self.layer.learn_initial_state and not self.layer.initial(1).any()
        expected = "such that states begin at 0, as in the library, without learn_initial_state and positive candidates"
        values.require(name, "options", starts_at_0, expected, repr(options))
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.bidirectional = self.layer.batch_first, self.layer.bidirectional

    def forward(self, x: Tensor, hx: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, h = self.layer(x, None if hx is None else hx.unsqueeze(2), reset)
        return out, h.squeeze(2)


class WithPairs(WithStatesOfTorch):
    """Take and return the state twice, as the pair of an LSTM."""

    proj_size = 0

    def forward(self, x: Tensor, hx: Any = None, reset: Tensor | None = None) -> Any:
        out, h = super().forward(x, None if hx is None else hx[0], reset)
        return out, (h, h)


@contextmanager
def require(package: str, tested: str, name: str) -> Iterator[None]:
    """Add to an ImportError in the block: what `pip` installs, and the version with which module `name` was tested."""
    try:
        yield
    except ImportError as error:
        text = f'{name} was tested with {tested}: {error}. Run pip install "{package}"'
        raise type(error)(text, name=error.name) from error
