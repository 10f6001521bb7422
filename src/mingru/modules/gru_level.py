"""One layer of a GRU."""

from torch import nn

from ..check.values import check_flag, check_int, require
from ..ops.call import Context
from ..ops.linear_map import RecurrentMap
from .plan import plannable
from .recurrent_level import RecurrentLevel, RecurrentOptions


class GRUOptions(RecurrentOptions):
    """The options of GRU."""

    def check(self) -> None:
        if self.block_size is not None:
            check_int(self.name, "block_size", self.block_size)
        check_flag(self.name, "residual", self.residual)
        expected, got = f"left out because cell is {self.cell!r}", self.candidate
        require(self.name, "candidate", got in (None, "tanh"), expected, repr(got), "pass cell='mingru' to use it")
        self.candidate = "tanh"
        super().check()
        size = self.block_size or self.hidden_dims
        fits = self.hidden_dims <= size or self.hidden_dims % size == 0
        expected, got = f"divisible by block_size = {size}", str(self.hidden_dims)
        divisors = (each for each in range(1, size) if self.hidden_dims % each == 0)
        require(self.name, "hidden_dims", fits, expected, got, f"pass block_size={max(divisors, default=1)}")


@plannable
class GRULevel(RecurrentLevel):
    """A layer whose recurrence has recurrent weights."""

    def _add_recurrent(self, options: GRUOptions) -> None:
        hidden_dims = options.hidden_dims
        arguments = hidden_dims, min(options.block_size or hidden_dims, hidden_dims), options.bias
        self.recurrent = RecurrentMap(*arguments, **options.factory)
        self.recurrent_reverse = RecurrentMap(*arguments, **options.factory) if options.bidirectional else None

    def initialize_maps(self) -> None:
        """Initialize the maps of x as `torch.nn.GRU` does, whose two biases of r and z are here their sum."""
        bound = self.hidden_dims**-0.5
        for linear in self.maps():
            for parameter in linear.parameters():
                nn.init.uniform_(parameter, -bound, bound)
            if linear.bias is not None:
                both = linear.bias.detach()[: 2 * self.hidden_dims]
                both += both.new_empty(len(both)).uniform_(-bound, bound)
        super().initialize_maps()

    def _with_recurrent(self, context: Context, reverse: bool) -> Context:
        # By calls, because hooks may compute the weights.
        weight, bias = self.recurrent()
        if self.recurrent_reverse is not None:
            if reverse:
                weight, bias = self.recurrent_reverse()
        return Context(*context[:4], weight, bias)
