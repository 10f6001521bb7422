"""minLSTM."""

from typing import Any

import torch

from ..check import arguments_checked, expectation
from .recurrent import Recurrent


class MinLSTM(Recurrent):
    """Stacked minimal long short-term memory, parallel over time.

    Each layer and direction computes, from its input x_t,

        f_t = sigma(W_f x_t + b_f)      i_t = sigma(W_i x_t + b_i)
        h_t = f_t / (f_t + i_t) h_{t-1} + i_t / (f_t + i_t) g(W_h x_t + b_h)

    where f is the gate that forgets, i the one that admits the candidate, h the state, and g keeps the candidate
    positive (`mingru.functional.g`). The gates share 1 between them, so that the state does not grow with length.

    Called with x, h, reset and lengths as `mingru.MinGRU` is; returns and raises the same.

    Args:
        input_dims: as of `mingru.MinGRU`.
        hidden_dims: as of `mingru.MinGRU`.
        num_layers: as of `mingru.MinGRU`.
        bias: as of `mingru.MinGRU`.
        batch_first: as of `mingru.MinGRU`.
        dropout: as of `mingru.MinGRU`.
        bidirectional: as of `mingru.MinGRU`.
        residual: as of `mingru.MinGRU`.
        norm: as of `mingru.MinGRU`.
        candidate: as of `mingru.MinGRU`.
        learn_initial_state: as of `mingru.MinGRU`.
        recompute: as of `mingru.MinGRU`.
        device: as of `mingru.MinGRU`.
        dtype: as of `mingru.MinGRU`.
        forget_bias: added to the bias of the forget gate where parameters are drawn; 1, say, has the layer remember
            longer at first. Needs `bias`.

    Parameters: as `MinGRU` has them, but for `layers.{l}.linear.weight` (3H, I): rows of the forget gate first, then of
    the input gate, then of the candidate; and `.bias` (3H).

    Numerics: as of `MinGRU`. Gates that are both shut still share 1, down to pre-activations that float32 can hold.

    Differs from `torch.nn.LSTM` in that the state is one tensor, h, without a cell state beside it, that no weights go
    from state to state, that there is no output gate, in the shape and the default of the state, and in `batch_first`.

    Example:
        >>> rnn = mingru.MinLSTM(input_dims=3, hidden_dims=64, num_layers=2, forget_bias=1.0)
        >>> out, h = rnn(torch.randn(10, 128, 3))
        >>> out.shape, h.shape
        (torch.Size([10, 128, 64]), torch.Size([2, 10, 1, 64]))

    Source: Feng et al. 2024, "Were RNNs All We Needed?", section 3.2 and appendix B.
    """

    cell = "minlstm"

    @arguments_checked()
    def __init__(
        self,
        input_dims: int,
        hidden_dims: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        forget_bias: float = 0.0,
        residual: bool = False,
        norm: str | None = None,
        candidate: str = "positive",
        learn_initial_state: bool = False,
        recompute: bool | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            input_dims,
            hidden_dims,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            residual=residual,
            norm=norm,
            candidate=candidate,
            learn_initial_state=learn_initial_state,
            recompute=recompute,
            device=device,
            dtype=dtype,
        )
        if isinstance(forget_bias, bool) or not isinstance(forget_bias, (int, float)):
            raise TypeError(expectation(self.name, "forget_bias", "a number", repr(forget_bias)))
        if forget_bias and not self.bias:
            raise ValueError(expectation(self.name, "forget_bias", "0 where bias is False", repr(forget_bias)))
        self.forget_bias = float(forget_bias)
        self._add_forget_bias()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._add_forget_bias()

    def _add_forget_bias(self) -> None:
        if self.forget_bias == 0:
            return
        for name, bias in self.named_parameters():
            if name.endswith((".linear.bias", ".linear_reverse.bias")):
                with torch.no_grad():
                    bias[: self.hidden_dims] += self.forget_bias
