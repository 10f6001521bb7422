"""The C++ kernels at the edges of their blocks, in every layout and type: what `csrc/sanitize` runs too.

Tensors end where their memory ends, so that AddressSanitizer sees a step too far.
"""

import itertools

import pytest
import torch

import mingru
from mingru import ops
from mingru.ops.shape import accumulate_dtype

WHY_NOT = mingru.backends()["native"]
pytestmark = pytest.mark.skipif(WHY_NOT is not True, reason=str(WHY_NOT))

LANES = [1, 2, 15, 16, 17, 63, 64, 65, 127, 511, 512, 513, 1030]
STEPS = [1, 2, 63, 64, 65, 130]
OPTIONS = list(itertools.product(["positive", "linear", "tanh", None], [False, True], [False, True]))


def every_other(x):
    return torch.stack([x, x], -1).flatten(-2)[..., 1::2]


LAYOUTS = {
    "dense": lambda *pair: pair,
    "time first": lambda *pair: [x.transpose(0, 1).contiguous().transpose(0, 1) for x in pair],
    "halves": lambda *pair: torch.cat(pair, -1).chunk(2, -1),
    "every other lane": lambda *pair: [every_other(x) for x in pair],
    "every other step": lambda *pair: [every_other(x.mT).mT for x in pair],
    "an odd place in memory": lambda *pair: [torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x) for x in pair],
    "one sequence for all": lambda *pair: [x[:1].expand_as(x) for x in pair],
    "one lane for all": lambda *pair: [x[..., :1].expand_as(x) for x in pair],
    "one step for all": lambda *pair: [x[:, :1].expand_as(x) for x in pair],
}


def graded(body, sequences, states, reset, activation, reverse, weights):
    """Outputs, and gradients of sequences and states, which are taken as they lie in memory."""
    leaves = [tensor.detach().requires_grad_() for tensor in (*sequences, *states)]
    first, second, h, initial = leaves
    if activation is None:
        out, last = ops.linear_scan(first, second, h, reset, reverse, backend=body)
    else:
        spec, start = ops.Spec("mingru", activation, reverse), ops.Start(h, initial, reset)
        out, last = ops.recurrence(spec, [first, second], start, backend=body)
    grads = torch.autograd.grad([out, last], leaves, [weight.to(out.dtype) for weight in weights], allow_unused=True)
    return {"out": out, "last": last, **dict(zip(["first", "second", "h", "initial"], grads, strict=True))}


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("number", "layout"), list(enumerate(LAYOUTS)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_edges(dtype, number, layout):
    """A third of the sizes for each type and layout, each time another one."""
    number += DTYPES.index(dtype)
    options = itertools.islice(itertools.cycle(OPTIONS), number, None)
    # Some roundings on the way, along up to 130 steps, and a rounding of what is stored or was.
    allowed = 64 * torch.finfo(accumulate_dtype(dtype)).eps + 2 * torch.finfo(dtype).eps
    for (lane, lanes), (step, steps) in itertools.product(enumerate(LANES), enumerate(STEPS)):
        if (lane + step + number) % 3 != 0:
            continue
        batch = 1 + (lanes + steps) % 3
        activation, reverse, with_reset = case = next(options)
        # As decays of `linear_scan` values above 1 would grow without bound.
        scale = 0.5 if activation is None else 2.0
        pair = [(scale * torch.randn(batch, steps, lanes)).to(dtype).clamp(-3 * scale, 3 * scale) for _ in range(2)]
        if activation is None:
            pair[0] = pair[0].clamp(-1, 1)
        pair = LAYOUTS[layout](*pair)
        states = torch.rand(2, batch, 1, lanes).to(dtype).unbind()
        reset = torch.rand(batch, steps) < 0.1 if with_reset else None
        weights = torch.randn(batch, steps, lanes).to(dtype), torch.randn(batch, 1, lanes).to(dtype)
        got = graded("native", pair, states, reset, activation, reverse, weights)
        wide = [[tensor.double() for tensor in tensors] for tensors in (pair, states)]
        # Another body in float64, held against the reference in `test_recurrence`.
        truth = graded("torch", *wide, reset, activation, reverse, weights)
        for name, expected in truth.items():
            if expected is None or got[name] is None:
                assert all(grad is None or not grad.any() for grad in (expected, got[name])), (name, case)
                continue
            # All that is added up is of the order of 1 or more, whatever is left of it: 1 - tanh(v)^2, say.
            error = (got[name].double() - expected).abs().max() / expected.abs().max().clamp_min(1.0)
            assert error <= allowed, (name, batch, steps, lanes, *case)
