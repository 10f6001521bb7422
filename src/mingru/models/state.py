"""Operations on states."""

from collections.abc import Callable, Iterable

from torch import Tensor


def map_state(function: Callable[[Tensor], Tensor], state: Iterable[Tensor]) -> list[Tensor]:
    """Return a state with a function applied to each of its tensors.

    Dimension 1 of each tensor is the batch.

    Args:
        function: Takes and returns a tensor.
        state: State of a [mingru.models.LanguageModel][], [mingru.models.Block][] or [mingru.Stack][].

    Returns:
        A list of the tensors that the function returned, in the same order.

    Examples:
        >>> lm = mingru.models.LanguageModel(vocab_size=100, dims=64, num_layers=2)
        >>> logits, state = lm(torch.randint(100, (8, 50)))
        >>> state = mingru.models.map_state(torch.Tensor.detach, state)
        >>> first_two = mingru.models.map_state(lambda tensor: tensor[:, :2], state)
        >>> on_the_cpu = mingru.models.map_state(lambda tensor: tensor.to("cpu"), state)
    """
    return [function(tensor) for tensor in state]
