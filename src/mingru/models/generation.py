"""Sampling of tokens, and the loop that generates them."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..check.ranges import check_range
from ..check.values import check_int, check_number, check_type, converted, dims, expectation, not_a_tensor, require
from ..ops.shape import MaybeList, MaybeTensor, Outputs, accumulate_dtype

Prompts = Tensor | Sequence[Tensor]
Ints = int | Sequence[int] | None
NUM_RANDOM = 1024


@dataclass(frozen=True)
class Sampling:
    """How a token is sampled from logits. The options apply in this order."""

    name: str
    """Name of the model's class, for errors."""
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        check_number(self.name, "temperature", self.temperature, "a number, at least 0", lambda x: 0 <= x < math.inf)
        if self.top_k is not None:
            check_int(self.name, "top_k", self.top_k, "an int or None")
        if self.top_p is not None:
            check_number(self.name, "top_p", self.top_p, "a number above 0 and at most 1", lambda p: 0 < p <= 1)
        if self.min_p is not None:
            check_number(self.name, "min_p", self.min_p, "a number from 0 to 1", lambda p: 0 <= p <= 1)

    def sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Return a token (B,) for each row of logits (B, V), with uniform random numbers (B,) from 0 to 1."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = self.probabilities(logits)
        # The largest of all earlier sums, because a parallel sum may grow by rounding at a token of probability 0.
        cumulative = probabilities.cumsum(-1).masked_fill(probabilities == 0, 0.0).cummax(-1).values
        target = uniform.to(cumulative).unsqueeze(1) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True).squeeze(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (B, V) of the tokens to sample from, up to a factor for each row."""
        logits = logits.to(accumulate_dtype(logits.dtype))
        # At most 0, because a low temperature could otherwise overflow.
        logits = logits - logits.amax(-1, keepdim=True)
        logits = logits / max(self.temperature, torch.finfo(logits.dtype).tiny)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            values, order = logits.sort(dim=-1, descending=True, stable=True)
            probabilities = values.softmax(-1)
            # A token is left out if the more likely tokens already sum to top_p.
            is_excess = probabilities.cumsum(-1) - probabilities >= self.top_p
            logits = logits.masked_fill(is_excess.gather(-1, order.argsort(-1)), -math.inf)
        probabilities = logits.softmax(-1)
        if self.min_p is not None:
            is_rare = probabilities < self.min_p * probabilities.amax(-1, keepdim=True)
            probabilities = probabilities.masked_fill(is_rare, 0.0)
        return probabilities


def stream(
    lm: Any, prompts: Prompts, max_new_tokens: int, sampling: Sampling, stop: Ints, seed: Ints, state: MaybeList
) -> Iterator[Tensor]:
    """Return an iterator over the new tokens of each step, with -1 for sequences that have ended."""
    ids, lengths = padded(lm.name, prompts, lm.vocab_size, lm.embedding.weight.device)
    check_int(lm.name, "max_new_tokens", max_new_tokens, least=0)
    lm._check_state(state, ids.shape)
    stops = torch.tensor(stop_tokens(lm.name, stop, lm.vocab_size), device=ids.device)
    uniforms = random_numbers(seeds_of(lm.name, seed, len(ids)), ids.device)

    def steps(state: list[Tensor] | None) -> Iterator[Tensor]:
        modules, active = list(lm.modules()), torch.arange(len(ids), device=ids.device)
        logits, state = _last_logits(lm, modules, ids, state, lengths)
        if bool(logits.isnan().any()):
            raise ValueError(f"{lm.name}: the logits after the prompts are NaN; check the parameters and the state")
        for step in range(max_new_tokens):
            tokens = sampling.sample(logits, next(uniforms)[active])
            yield torch.full((len(ids),), -1, device=ids.device).index_copy(0, active, tokens)
            if len(stops) > 0:
                going = ~torch.isin(tokens, stops)
                if not bool(going.all()):
                    index = going.nonzero().squeeze(1)
                    active, tokens = active[index], tokens[index]
                    state = [each.index_select(1, index) for each in state]
                    if len(active) == 0:
                        return
            if step < max_new_tokens - 1:
                logits, state = _last_logits(lm, modules, tokens.unsqueeze(1), state, None)

    return iter(()) if max_new_tokens == 0 or len(ids) == 0 else steps(state)


def random_numbers(seeds: list[int], device: torch.device) -> Iterator[Tensor]:
    """Yield uniform random numbers from 0 to 1, (B,), for each step.

    A sequence has its own seed, because the other sequences must not matter. The numbers come from the CPU, so that a
    seed gives the same numbers on every device.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    while True:
        rows = [torch.rand(NUM_RANDOM, generator=generator, device="cpu") for generator in generators]
        yield from torch.stack(rows, 1).to(device)


@torch.inference_mode()
def _last_logits(lm: Any, modules: list[nn.Module], ids: Tensor, state: MaybeList, lengths: MaybeTensor) -> Outputs:
    """Return the logits (B, V) after the last token of each sequence, and the states."""
    with in_eval_mode(modules):
        x, state = lm.blocks(lm._embed(ids), state, None, lengths)
        x = x[:, -1] if lengths is None else x[torch.arange(len(x), device=x.device), lengths.to(x.device) - 1]
        return lm._logits(x), state


@contextmanager
def in_eval_mode(modules: list[nn.Module]) -> Iterator[None]:
    """Switch to eval mode, and afterwards each module back to its own mode."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def padded(name: str, prompts: Prompts, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return prompts as (B, S), and the lengths if they differ; raise an error if a prompt is invalid."""
    if isinstance(prompts, Tensor):
        named, num_dims, ids = {"prompts": prompts}, 2, prompts
    elif not isinstance(prompts, (list, tuple)):
        raise not_a_tensor(name, "prompts", prompts, "a tensor (B, S) or a list of tensors (S,)")
    else:
        named, num_dims = {f"prompts[{index}]": each for index, each in enumerate(prompts)}, 1
        ids = torch.zeros(0, 1, dtype=torch.int64, device=device)
    for argument, prompt in named.items():
        check_ids(name, argument, prompt, num_dims, device)
        require(name, argument, prompt.shape[-1] > 0, "of at least one token", dims(prompt.shape))
    lengths = [prompt.shape[-1] for prompt in named.values()]
    if num_dims == 1 and named:
        ids = pad_sequence([prompt.long() for prompt in named.values()], batch_first=True)
    check_vocabulary(name, "prompts", ids, vocab_size)
    return ids, torch.tensor(lengths, device="cpu") if len(set(lengths)) > 1 else None


def check_ids(name: str, argument: str, ids: Tensor, num_dims: int, device: torch.device) -> None:
    """Check that ids are integers (S,) or (B, S) on this device."""
    letters = "(S,)" if num_dims == 1 else "(B, S)"
    if not isinstance(ids, Tensor):
        raise not_a_tensor(name, argument, ids, f"an integer tensor {letters}")
    if ids.dim() == num_dims and ids.dtype not in (torch.int64, torch.int32):
        remedy = converted(argument, ids, "long()")
        raise TypeError(expectation(name, argument, "int64 or int32", str(ids.dtype), remedy))
    if ids.dim() != num_dims:
        remedy = f"add a batch dimension with {argument}.unsqueeze(0)" if (ids.dim(), num_dims) == (1, 2) else ""
        remedy = "pass numbers of tokens, which the model embeds" if ids.is_floating_point() else remedy
        raise ValueError(expectation(name, argument, letters, dims(ids.shape), remedy))
    got, remedy = f"a tensor on {ids.device}", converted(argument, ids, f"to({str(device)!r})")
    require(name, argument, ids.device == device, f"on {device} like the weights", got, remedy)


def check_vocabulary(name: str, argument: str, ids: Tensor, vocab_size: int) -> None:
    check_range(name, argument, ids, vocab_size - 1, f"from 0 to {vocab_size - 1} because vocab_size is {vocab_size}")


def joined(prompts: Prompts, new: list[Tensor]) -> Tensor | list[Tensor]:
    """Return the prompts with their new tokens, in the form of the prompts."""
    if isinstance(prompts, Tensor):
        columns = [prompts]
        for tokens in new:
            column = tokens.unsqueeze(1).to(prompts.dtype)
            columns.append(torch.where(column < 0, columns[-1][:, -1:], column))
        return torch.cat(columns, 1)
    if not new:
        return list(prompts)
    table = torch.stack(new, 1)
    return [torch.cat([prompt, row[row >= 0].to(prompt.dtype)]) for prompt, row in zip(prompts, table, strict=True)]


def stop_tokens(name: str, stop: Ints, vocab_size: int) -> list[int]:
    """Return the tokens as a list; raise an error if one is invalid."""
    tokens = [] if stop is None else [stop] if isinstance(stop, int) else stop
    expected = "a token, a list of tokens or None"
    check_type(name, "stop", tokens, (list, tuple, set), expected)
    for token in tokens:
        check_int(name, "stop", token, expected, 0)
        require(name, "stop", token < vocab_size, f"below vocab_size {vocab_size}", str(token))
    return list(tokens)


def seeds_of(name: str, seed: Any, batch: int) -> list[int]:
    """Return a seed for each sequence."""
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    if isinstance(seed, int) and not isinstance(seed, bool):
        seed = [seed + index for index in range(batch)]
    is_valid = isinstance(seed, (list, tuple)) and all(type(each) is int for each in seed)
    require(name, "seed", is_valid, "an int, a list of ints or None", repr(seed), error=TypeError)
    require(name, "seed", len(seed) == batch, f"{batch} seeds, one for each prompt", str(len(seed)))
    return list(seed)
