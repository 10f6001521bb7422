"""Sampling of tokens, and the loop that generates them."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..check import check_int, dims, expectation


class Sampling(NamedTuple):
    """How a token is sampled from logits."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None

    @classmethod
    def checked(cls, name: str, temperature: Any, top_k: Any, top_p: Any, min_p: Any) -> "Sampling":
        """Return the options; raise an error if one is invalid."""
        _check_number(name, "temperature", temperature, 0 <= _number(temperature) < math.inf, "a number, at least 0")
        if top_k is not None:
            check_int(name, "top_k", top_k, "an int or None")
        if top_p is not None:
            _check_number(name, "top_p", top_p, 0 < _number(top_p) <= 1, "above 0 and at most 1")
        if min_p is not None:
            _check_number(name, "min_p", min_p, 0 <= _number(min_p) <= 1, "from 0 to 1")
        return cls(temperature, top_k, top_p, min_p)

    def sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Return a token (B,) for each row of logits (B, V), with uniform random numbers (B,) from 0 to 1."""
        logits = logits.float()
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
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
        cumulative = probabilities.cumsum(-1)
        # Rounding must not choose a token of probability 0 at either end.
        target = uniform.to(cumulative) * cumulative[:, -1]
        index = torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)
        last = cumulative.shape[-1] - 1 - probabilities.flip(-1).gt(0).float().argmax(-1)
        return torch.minimum(index, last)


def stream(
    lm: Any,
    ids: Tensor,
    lengths: Tensor | None,
    state: list[Tensor] | None,
    max_new_tokens: int,
    sampling: Sampling,
    stops: list[int],
    seeds: list[int],
) -> Iterator[Tensor]:
    """Yield the new tokens of each step, with -1 for sequences that have ended."""
    if max_new_tokens == 0 or len(ids) == 0:
        return
    # From the CPU, so that a seed gives the same numbers on every device; for each sequence, so that the others do not
    # matter.
    uniforms = torch.stack(
        [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds], 1
    ).to(ids.device)
    stop_tokens = torch.tensor(stops, device=ids.device)
    active = torch.arange(len(ids), device=ids.device)
    logits, state = _last_logits(lm, ids, state, lengths)
    for step in range(max_new_tokens):
        tokens = sampling.sample(logits, uniforms[step, active])
        new = torch.full((len(ids),), -1, dtype=torch.int64, device=ids.device)
        new[active] = tokens
        yield new
        if stops:
            going = ~torch.isin(tokens, stop_tokens)
            if not bool(going.all()):
                index = going.nonzero().squeeze(1)
                active, tokens = active[index], tokens[index]
                state = [each.index_select(1, index) for each in state]
                if len(active) == 0:
                    return
        if step < max_new_tokens - 1:
            logits, state = _last_logits(lm, tokens.unsqueeze(1), state, None)


@torch.inference_mode()
def _last_logits(
    lm: Any, ids: Tensor, state: list[Tensor] | None, lengths: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the logits (B, V) after the last token of each sequence, and the states."""
    with _in_eval_mode(lm):
        x, state = lm._features(ids, state, lengths, None)
        x = x[:, -1] if lengths is None else x[torch.arange(len(x), device=x.device), lengths.to(x.device) - 1]
        return lm._logits(x), state


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode, and afterwards each module back to its own mode."""
    training = [module for module in model.modules() if module.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def padded(name: str, prompts: Any) -> tuple[Tensor, Tensor | None]:
    """Return prompts as (B, S), and the lengths if they differ."""
    if isinstance(prompts, Tensor):
        if prompts.dim() == 2 and prompts.shape[1] == 0:
            raise ValueError(expectation(name, "prompts", "of at least one token", dims(prompts.shape)))
        return prompts, None
    if not isinstance(prompts, (list, tuple)):
        expected = "a tensor (B, S) or a list of tensors (S,)"
        raise TypeError(expectation(name, "prompts", expected, type(prompts).__name__))
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Tensor):
            raise TypeError(expectation(name, f"prompts[{index}]", "a tensor (S,)", type(prompt).__name__))
        if prompt.dim() != 1 or len(prompt) == 0:
            expected = "a tensor (S,) of at least one token"
            raise ValueError(expectation(name, f"prompts[{index}]", expected, dims(prompt.shape)))
    if not prompts:
        return torch.zeros(0, 1, dtype=torch.int64), None
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = pad_sequence(list(prompts), batch_first=True)
    return ids, None if bool((lengths == lengths[0]).all()) else lengths


def joined(prompts: Tensor | Sequence[Tensor], new: list[Tensor]) -> Tensor | list[Tensor]:
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


def stop_tokens(name: str, stop: Any, vocab_size: int) -> list[int]:
    """Return the tokens as a list; raise an error if one is invalid."""
    tokens = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    for token in tokens:
        check_int(name, "stop", token, "a token, a list of tokens or None", 0)
        if token >= vocab_size:
            raise ValueError(expectation(name, "stop", f"below vocab_size {vocab_size}", str(token)))
    return tokens


def seeds_of(name: str, seed: Any, batch: int) -> list[int]:
    """Return a seed for each sequence."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if isinstance(seed, int) and not isinstance(seed, bool):
        return [seed + index for index in range(batch)]
    if not isinstance(seed, (list, tuple)) or not all(type(each) is int for each in seed):
        raise TypeError(expectation(name, "seed", "an int, a list of ints or None", repr(seed)))
    if len(seed) != batch:
        raise ValueError(expectation(name, "seed", f"{batch} seeds, one for each prompt", str(len(seed))))
    return list(seed)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _check_number(name: str, argument: str, value: Any, is_valid: bool, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(expectation(name, argument, expected, repr(value)))
    if not is_valid:
        raise ValueError(expectation(name, argument, expected, repr(value)))
