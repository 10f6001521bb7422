"""Speed without a clock: in which kinds of call our kernels compute the recurrences, of each class.

A profile names the operators of a call. A recurrence is computed by our kernels if they are among them, and if more
time steps need no more operators. Where this is not so, class and kind of call are in `OUTSIDE`, with the reason.
"""

from functools import partial
from typing import Any

import pytest
import torch
from cases import CASES, HIDDEN, INPUT, WRAPS, Case, case, needs_kernels, on_meta, tensors
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.utils.checkpoint import checkpoint

import mingru

pytestmark = needs_kernels


def noted(module: Any, x: Any) -> Any:
    module.hidden = module(x)
    return module(x)


def with_lengths(module: nn.Module, x: Any) -> Any:
    batch_dim = 0 if getattr(module, "batch_first", True) else 1
    return module(x, lengths=torch.tensor([x.shape[1 - batch_dim], 3]))


in_a_graph = partial(torch.compile, fullgraph=True, backend="aot_eager")
EAGER = {
    "plain": lambda module, x: module(x),
    "hook of the module": lambda module, x: module.register_forward_hook(lambda *_: None) and module(x),
    "note": noted,
    "device context": on_meta,
    "autocast": torch.autocast("cpu", torch.bfloat16)(lambda module, x: module(x)),
    "lengths": with_lengths,
    "no gradients": torch.no_grad()(lambda module, x: module(x)),
    "functional_call": lambda module, x: functional_call(module, {k: 2 * p for k, p in module.named_parameters()}, x),
    "checkpoint": lambda module, x: checkpoint(module, x, use_reentrant=False),
    "bfloat16": lambda module, x: module.bfloat16()(x.bfloat16()),
    "vmap": lambda module, x: vmap(module)(torch.stack([x, x])),
    "jvp": lambda module, x: jvp(lambda x: tensors(module(x))[0], (x,), (x,)),
    "subclass": lambda module, x: module(x.as_subclass(type("Other", (torch.Tensor,), {}))),
} | {way: lambda module, x, wrap=wrap: wrap(module) or module(x) for way, wrap in WRAPS.items()}
COMPILED = {
    "compiled": lambda module, x: in_a_graph(module)(x),
    "compiled with lengths": lambda module, x: with_lengths(in_a_graph(module), x),
}
# Their paths are those of others.
FEW = "2d", "3d", "1dGRUCell", "signed", "rotation"
ROWS = [
    *(each for each in CASES[:-1] if not any(part in each.name for part in FEW)),
    case("GRU of one block", mingru.GRU, INPUT, HIDDEN, bidirectional=True, norm="rms"),
    case("Block of GRU", mingru.models.Block, INPUT, cell="gru", conv=2),
]
OF_GRU = ("mingru.GRU", "GRU of one block", "Block of GRU")
TRANSFORMED = "transforms need differentiable operations, and a GRU has one for each step"
OUTSIDE = {
    **{(name, way): TRANSFORMED for name in OF_GRU for way in ("vmap", "jvp")},
    **{(name, "subclass"): "a tensor subclass sees the operations of each step" for name in OF_GRU},
}


def operators(way: Any, case: Case, is_compiled: bool) -> list[list[str]]:
    """Return the names of all operators of a call and its backward pass, with 6 and 12 steps."""
    calls = [(case.make(), case.args(2, steps)["x"].requires_grad_()) for steps in (6, 12)]
    for module, x in calls if is_compiled else []:
        way(module, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for module, x in calls:
            with torch.profiler.record_function("call"):
                out = tensors(way(module, x))[0]
            if out.requires_grad:
                out.float().sum().backward()
    found: list[list[str]] = []
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        if event.name == "call":
            found.append([])
        elif "::" in event.name:
            found[-1].append(event.name)
    return found


def pairs(ways: Any, cases: list[Case]) -> Any:
    found = [(case, way) for case in cases for way in ways if "lengths" not in way or "lengths" in case.takes]
    return pytest.mark.parametrize(("case", "way"), found, ids=lambda each: getattr(each, "name", each))


def check(case: Case, ways: Any, way: str) -> None:
    few, many = operators(ways[way], case, ways is COMPILED)
    is_inside = len(few) == len(many) and any(name.startswith("mingru::") for name in few)
    assert is_inside == ((case.name, way) not in OUTSIDE)


@pairs(EAGER, ROWS)
def test_our_kernels_compute_it(case, way):
    check(case, EAGER, way)


@pytest.mark.usefixtures("_fresh_compiler")
@pairs(COMPILED, [each for each in ROWS if each.name in ("MinGRU", "mingru.GRU")])
def test_our_kernels_compute_it_in_a_graph(case, way):
    check(case, COMPILED, way)
