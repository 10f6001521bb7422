"""Operations on states."""

from collections.abc import Callable, Iterable

from torch import Tensor

from ..check.values import require


def map_state(function: Callable[[Tensor], Tensor], state: Iterable[Tensor]) -> list[Tensor]:
    """Return a state with a function applied to each of its tensors.

    Dimension 1 of each tensor is the batch.

    Args:
        function: Takes and returns a tensor.
        state: State of a `mingru.models.LanguageModel`, `mingru.models.Block` or `mingru.Stack`.

    Returns:
        A list of the tensors that the function returned, in the same order.

    Raises:
        TypeError: `function` is no function, or `state` is no list, such as the state of a layer, which is a tensor.

    Examples:
        >>> lm = mingru.models.LanguageModel(vocab_size=100, dims=64, num_layers=2)
        >>> logits, state = lm(torch.randint(100, (8, 50)))
        >>> state = mingru.models.map_state(torch.Tensor.detach, state)
        >>> first_two = mingru.models.map_state(lambda tensor: tensor[:, :2], state)
        >>> on_the_cpu = mingru.models.map_state(lambda tensor: tensor.to("cpu"), state)
    """
    got, is_callable = type(function).__name__, callable(function)
    require("map_state", "function", is_callable, "a function of a tensor", got, "the function comes first", TypeError)
    remedy = "call the function on the state of one layer directly" if isinstance(state, Tensor) else ""
    is_list = isinstance(state, Iterable) and not isinstance(state, Tensor)
    require("map_state", "state", is_list, "a list of tensors", type(state).__name__, remedy, TypeError)
    return [function(tensor) for tensor in state]
