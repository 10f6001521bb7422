"""An option in the code of one level, and nowhere else: every other way to compute a layer follows, or refuses it."""

import copy

import pytest
import torch
from cases import DOUBLE, TIGHT, grid, one_process, refuses
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing import assert_close

import mingru
from mingru import streaming
from mingru.distributed import SequenceParallel, TensorParallel
from mingru.modules.level import LinearLevel
from mingru.modules.plan import plannable
from mingru.ops.call import Context, Layout
from mingru.ops.shape import MaybeList, States


class Changed:
    """Return to another state after resets, which any kernel can, or use masks, as a zoneout without chance."""

    def _direction(self, y: torch.Tensor, context: Context, layout: Layout, reverse: bool, found: MaybeList) -> States:
        context = self._with_recurrent(Context(context.h, self.after, *context[2:]), reverse)
        if not torch.jit.is_scripting():
            if not self.has_masks:
                return self._mapped(self.spec(reverse), y, context, layout)
        inputs = self._inputs(y, reverse)
        if self.has_masks:
            # In training, the state stays where a candidate is positive; otherwise, all states last longer.
            more = 1e4 * (inputs[-1] > 0) if self.training else torch.full_like(inputs[-1], 0.5)
            inputs[-2] = inputs[-2] + (more if len(inputs) == 3 else -more)
        return self._run_cell(self.spec(reverse), inputs, context, layout)


ChangedLevel = plannable(type("LinearLevel", (Changed, LinearLevel), {}))


def changed(rnn, has_masks):
    for level in rnn.layers:
        level.__class__, level.has_masks = ChangedLevel, has_masks
        level.register_buffer("after", torch.full([1, 1, 4], 0.75, dtype=rnn.layers[0].linear.weight.dtype))
    return rnn


def by_cell(rnn, x, h, reset):
    cell, outs, h = getattr(mingru, f"{type(rnn).__name__}Cell")(3, 4).train(rnn.training), [], h[0, :, 0]
    cell.layers = rnn.layers
    for t in range(x.shape[1]):
        h = cell(x[:, t], h, reset[:, t])
        outs.append(h)
    return torch.stack(outs, 1)


def by_modules(rnn, *given):
    """What `forward` of the level says: a hook keeps a plan from replacing it."""
    rnn = copy.deepcopy(rnn)
    rnn.register_forward_hook(lambda *args: None)
    return rnn(*given)[0]


def in_sessions(rnn, x, h, reset):
    sessions = streaming.Sessions(rnn, 2)
    slots = [sessions.restore(each.flatten()) for each in h.unbind(1)]
    return torch.cat([sessions.step(x[:, t : t + 3], slots, reset=reset[:, t : t + 3]) for t in (0, 3, 6)], 1)


def parallel(rnn, style, *given):
    with one_process() as mesh:
        return parallelize_module(rnn, mesh, style)(*given)[0]


WAYS = {
    "whole": lambda rnn, *given: rnn(*given)[0],
    "cell": by_cell,
    "lengths": lambda rnn, *given: rnn(*given, torch.full((2,), 7))[0],
    "stack": lambda rnn, x, h, reset: mingru.Stack([rnn])(x, [h], reset)[0],
    "sessions": in_sessions,
    "scripted": lambda rnn, *given: torch.jit.script(rnn)(*given)[0],
    "exported": lambda rnn, *given: torch.export.export(rnn, given).module()(*given)[0],
    "sequence": lambda rnn, *given: parallel(rnn, SequenceParallel(), *given),
    "tensor": lambda rnn, *given: parallel(rnn, TensorParallel(), *given),
}


@pytest.mark.filterwarnings("ignore:.*the model is in training mode", "ignore:.*torch.jit.script.* is deprecated")
@grid(way=WAYS, kind=[mingru.MinGRU, mingru.GRU], has_masks=[False, True], training=[False, True])
def test_every_way_follows(way, kind, has_masks, training):
    x, h, reset = torch.randn(2, 7, 3, **DOUBLE), torch.randn(1, 2, 1, 4, **DOUBLE), torch.rand(2, 7) < 0.3
    for has_gradients in (False, True):
        rnn = kind(3, 4, **DOUBLE).train(training)
        before, rnn = rnn(x, h, reset)[0], changed(rnn, has_masks)
        if kind is mingru.GRU and way in ("sequence", "tensor"):
            refuses(ValueError, "module (must|cannot) be", WAYS[way], rnn)
            continue
        with torch.set_grad_enabled(has_gradients):
            x = x.detach().requires_grad_(has_gradients)
            expected, out = by_modules(rnn, x, h, reset), WAYS[way](rnn, x, h, reset)
        assert_close(out, expected, **TIGHT)
        assert not torch.allclose(out, before)
        if out.requires_grad:
            found, wanted = (torch.autograd.grad(each.square().sum(), x) for each in (out, expected))
            assert_close(found, wanted, **TIGHT)


@grid(has_masks=[False, True], training=[False, True])
def test_torch_has_no_such_gru(has_masks, training):
    class Own(mingru.GRU):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            changed(self, has_masks)

    wrong = "layers must be as constructed, except for recurrent, got .* computations inside; remove them"
    refuses(ValueError, f"Own.to_torch: {wrong}", Own(3, 4).train(training).to_torch)
    refuses(ValueError, f"Own.from_torch: {wrong}", Own.from_torch, torch.nn.GRU(3, 4).train(training))
