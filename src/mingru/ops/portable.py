"""The `"torch"` body for graphs: the same mathematics out of place, captured once and run at any length.

TorchScript, `torch.export`, ONNX and `torch.compile` follow these functions, and differentiate them. A captured graph
has no loop over a length that it doesn't know, so the number of operations must not depend on it: the sequence is cut
into C chunks of 16 steps, which are stepped side by side, each from a state of 0, while the products of their decays
are kept; the ends of the chunks are joined by doubling,

    h_c <- h_c + P_c h_{c-d}      P_c <- P_c P_{c-d}      d = 1, 2, 4, ... below C

each chunk's state and decay first standing for itself, then for 2, 4, ... of them; then one multiply-add brings each
chunk what came before it. As in `body_torch`, only positive terms are added, and nothing cancels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import packed
from .activation import activate
from .cell import as_mingru
from .shape import States, accumulate_dtype, along, as_dtype, empty_states

DIFFERENTIABLE = True


def unavailable() -> str | None:
    return None


def refuses(sequence: Tensor, activation: str | None) -> str | None:
    return None


def recurrence(
    cell: str,
    inputs: list[Tensor],
    h: Tensor,
    initial: Tensor,
    reset: Tensor | None,
    activation: str,
    reverse: bool,
    batch_sizes: Tensor | None,
) -> States:
    """What `ops.recurrence` is to modules, for TorchScript: a scripted module runs without this package."""
    gate, candidate = as_mingru(cell, inputs)
    if batch_sizes is None:
        out, last = mingru(gate, candidate, h, initial, reset, activation, reverse)
    else:
        gate, candidate, reset, index = packed.spread_mingru(gate, candidate, reset, batch_sizes, reverse)
        out, last = mingru(gate, candidate, h, initial, reset, activation, False)
        out = packed.gather(out, index)
    return as_dtype(out, inputs[0].dtype), last


def mingru(
    gate: Tensor, candidate: Tensor, h: Tensor, initial: Tensor, reset: Tensor | None, activation: str, reverse: bool
) -> States:
    if gate.numel() == 0:
        return empty_states(gate * candidate, h)
    dtype = accumulate_dtype(gate.dtype)
    k, v = as_dtype(gate, dtype), as_dtype(candidate, dtype)
    a, b = (-k).sigmoid(), k.sigmoid() * activate(v, activation)
    if reset is not None:
        b = torch.where(along(reset, b), torch.addcmul(b, a, as_dtype(initial, dtype)), b)
    out, last = _scan(a, b, as_dtype(h, dtype).squeeze(1), reset, reverse)
    return as_dtype(out, gate.dtype), as_dtype(last.unsqueeze(1), h.dtype)


def linear_scan(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool) -> States:
    if b.numel() == 0:
        return empty_states(a * b, h)
    dtype = accumulate_dtype(b.dtype)
    out, last = _scan(as_dtype(a, dtype), as_dtype(b, dtype), as_dtype(h, dtype).squeeze(1), reset, reverse)
    return as_dtype(out, b.dtype), as_dtype(last.unsqueeze(1), h.dtype)


def _scan(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool, chunk: int = 16) -> States:
    """The states (B, S, *), and the last of them (B, *), from a state h (B, *). At a reset, h_{t-1} is 0."""
    num_steps = b.size(1)
    if _is_short(num_steps, chunk):
        cuts = _no_tensors() if reset is None else _turned(list(reset.unbind(1)), reverse)
        states = _step(_turned(list(a.unbind(1)), reverse), _turned(list(b.unbind(1)), reverse), cuts, h)
        return torch.stack(_turned(states, reverse), 1), states[-1]

    # One or two more than needed: a size that may be 1, or may not, is one that a captured graph must ask about.
    num_chunks = num_steps // chunk + 2
    more = num_chunks * chunk - num_steps
    # A decay of 1 and an input of 0 hand on the state.
    a_t = _side_by_side(_padded(a, more, 1.0), num_chunks, chunk, reverse)
    b_t = _side_by_side(_padded(b, more, 0.0), num_chunks, chunk, reverse)
    cuts = _no_tensors()
    if reset is not None:
        cuts = _side_by_side(_padded(reset, more, 0.0), num_chunks, chunk, reverse)
    local = [b_t[0]] + _step(a_t[1:], b_t[1:], cuts[1:], b_t[0])  # noqa: RUF005 (not in TorchScript)
    decay, crossed = _products(a_t, cuts)
    before, last = _joined(decay[-1], local[-1], None if reset is None else crossed[-1], h, reverse)
    brought = before.unsqueeze(2)
    if reset is not None:
        mask = along(torch.stack(_turned(crossed, reverse), 2), brought)
        brought = torch.where(mask, 0.0, brought)
    out = torch.addcmul(torch.stack(_turned(local, reverse), 2), torch.stack(_turned(decay, reverse), 2), brought)
    return _padded(out.flatten(1, 2), -more, 0.0), last


def _is_short(num_steps: int, chunk: int) -> bool:
    """Whether the steps are few, and as many wherever a captured graph runs."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return num_steps <= chunk
    else:
        return any(_is_known(num_steps == count) for count in range(chunk + 1))


def _is_known(condition: bool) -> bool:
    """Whether it holds for all lengths that a captured graph may meet; anywhere else, whether it holds."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return condition
    else:
        return _is_known_of_symbols(condition)


def _is_known_of_symbols(condition: bool) -> bool:
    # Here, as it brings up all of sympy; and on its own, as TorchScript reads no such line, even where it doesn't run.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _reaches(distance: int, count: int) -> bool:
    """Whether joining has gone as far as there are chunks."""
    known = _is_known(distance >= count)
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return known
    else:
        # What is compiled may ask, at the price of another graph for longer sequences: over 4096 steps, over a million.
        asks = distance in (1 << 8, 1 << 16) and not torch.compiler.is_exporting()
        return known or (asks and distance >= count)


def _no_tensors() -> list[Tensor]:
    empty: list[Tensor] = []
    return empty


def _turned(steps: list[Tensor], reverse: bool) -> list[Tensor]:
    """In the order of the scan; or back in the order of time."""
    in_order: list[Tensor] = []
    for index in range(len(steps)):
        in_order.append(steps[len(steps) - 1 - index if reverse else index])
    return in_order


def _padded(x: Tensor, more: int, value: float) -> Tensor:
    """So many more steps at the end of dimension 1, or fewer if it is negative."""
    # The last dimensions come first here. Slices would have to know which of two lengths is the smaller.
    return F.pad(x, [0, 0] * (x.dim() - 2) + [0, more], value=value)


def _side_by_side(x: Tensor, num_chunks: int, chunk: int, reverse: bool) -> list[Tensor]:
    """Of (B, C * chunk, *) the first steps of all chunks, (B, C, *), their second ones, and so on by the scan."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        # The gradient of one view is one copy.
        return _turned(list(torch.unflatten(x, 1, [num_chunks, chunk]).unbind(2)), reverse)
    else:
        # A captured graph can't tell that the view is one, whatever C is.
        return _turned([x[:, step::chunk] for step in range(chunk)], reverse)


def _step(a: list[Tensor], b: list[Tensor], cuts: list[Tensor], h: Tensor) -> list[Tensor]:
    """The states, one after the other; without `cuts`, there is no reset."""
    states: list[Tensor] = []
    for index in range(len(b)):
        if len(cuts) > 0:
            # Masked rather than multiplied by 0, so that not even NaN crosses a reset.
            h = h.masked_fill(along(cuts[index], h), 0.0)
        h = torch.addcmul(b[index], a[index], h)
        states.append(h)
    return states


def _products(a: list[Tensor], cuts: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The products of all decays up to each step, and whether there was a reset up to there."""
    products = [a[0]]
    crossed = _no_tensors()
    if len(cuts) > 0:
        products = [a[0].masked_fill(along(cuts[0], a[0]), 0.0)]
        crossed = [cuts[0]]
    for index in range(1, len(a)):
        product = products[-1] * a[index]
        if len(cuts) > 0:
            product = product.masked_fill(along(cuts[index], product), 0.0)
            crossed.append(crossed[-1] | cuts[index])
        products.append(product)
    return products, crossed


def _joined(
    decay: Tensor, state: Tensor, cut: Tensor | None, h: Tensor, reverse: bool, most_chunks: int = 1 << 24
) -> States:
    """The state before each chunk (B, C, *) and the last one (B, *), from those at the ends of the chunks.

    decay and state are (B, C, *), each for its chunk alone, and `cut` (B, C) tells where it has a reset.
    A graph that sets no bound to its length is good for `most_chunks`: 268 million steps.
    """
    first = h.unsqueeze(1)
    state = torch.cat([state, first] if reverse else [first, state], 1)
    decay = torch.cat([decay, torch.ones_like(first)] if reverse else [torch.ones_like(first), decay], 1)
    if cut is not None:
        no = torch.zeros_like(cut[:, :1])
        cut = torch.cat([cut, no] if reverse else [no, cut], 1)
    count = state.size(1)
    places = torch.arange(count, device=state.device)
    distance = 1
    while distance < most_chunks and not _reaches(distance, count):
        sources = places + distance if reverse else places - distance
        # Where nothing lies so far back, all has come in; its decay no longer counts.
        stop = (sources != sources.clamp(0, count - 1)).unsqueeze(0)
        sources = sources.clamp(0, count - 1)
        if cut is not None:
            stop = stop | cut
        state = torch.addcmul(state, decay, state.index_select(1, sources).masked_fill(along(stop, state), 0.0))
        decay = decay * decay.index_select(1, sources)
        if cut is not None:
            decay = decay.masked_fill(along(cut, decay), 0.0)
            cut = cut | cut.index_select(1, sources)
        distance *= 2
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        if torch.compiler.is_exporting():
            # Nothing else would tell that a sequence is longer than the graph was made for.
            state = state.masked_fill(places[-1] >= distance, torch.nan)
    if reverse:
        return state[:, 1:], state[:, 0]
    else:
        return state[:, :-1], state[:, -1]
