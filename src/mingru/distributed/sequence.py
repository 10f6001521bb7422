"""Sequence parallel: each rank has a contiguous part of the time steps.

The state after a part is linear in the state before it,

    after = product of a_t * before + last

where `last` is the state after the part from 0. Each rank computes both, and one all-gather gives every rank the state
before its own part, from which it runs the recurrence. The gradients of states follow the adjoint, from the last part
to the first:

    delta_before = conj(product of a_t) * delta_after + own

where `own` is the gradient of the state before the part from the outputs of the part.
"""

import functools
import inspect
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from .. import ops
from ..check.forms import LAYER
from ..check.ranges import check_range
from ..check.values import check_type, require
from ..models.block import Block
from ..models.causal_conv import CausalConv
from ..models.language_model import LanguageModel
from ..modules.conv_level import ConvLevel
from ..modules.convolutional import Convolutional
from ..modules.layer import Layer
from ..modules.level import LinearLevel
from ..modules.per_step import PerStep
from ..modules.stack import Stack
from ..modules.stacked import Recurrent
from ..ops import route
from ..ops.call import Call, Context, Layout, Spec, flattened, from_flat, with_steps
from ..ops.causal_conv import Maybe, past_and_segment, state_after
from ..ops.cells import MIXTURES, parts_of
from ..ops.layout import divided, joined, of_next_step, padded_call, without_padding
from ..ops.linear_map import LINEAR_MAPS, are_recomputed
from ..ops.modes import is_autocast
from ..ops.shape import States, accumulate_dtype, along, as_dtype, conjugate, from_parts, one_like, plus_times, to_parts
from .ranks import Part, derive, eager, outermost

_NAME = "SequenceParallel"


class SequenceParallel(ParallelStyle):
    """Divide the time steps of sequences among the ranks of a mesh, each of which has a contiguous part.

    It is a `ParallelStyle` for `torch.distributed.tensor.parallel.parallelize_module`:

        parallelize_module(model, mesh, SequenceParallel())
        parallelize_module(model, mesh, {"encoder.rnn": SequenceParallel()})

    The style applies to every layer of this library in the module: `MinGRU`, `MinLSTM`, the convolutional layers,
    `Stack`, `models.Block` and `models.LanguageModel`, in one direction or both. Everything else in the module must act
    on each step on its own, as `torch.nn.Linear` and `torch.nn.LayerNorm` do.

    The state after the steps of a rank is linear in the state before them,

        after = P before + last         P = a_T ... a_2 a_1

    where a_t are the decays of its T steps, and `last` is the state after them from a state of 0. Each rank computes P
    and `last`, all ranks gather both, and each then runs its steps from the true state. A call so communicates 2 B H
    numbers for each rank, layer and direction, however long the sequence is, and as many in the backward pass. States
    travel in float32 (float64 if x is float64). A convolution in a block gathers its last inputs. With `reset` or
    `dt`, the reverse direction gathers one step of them.

    Inputs:
        - **x**, **reset**, **dt**: Part of the steps of this rank; rank 0 of the mesh has the first ones. Parts may
          have different lengths, 0 included.
        - **h**: State before the whole sequence, equal on all ranks. Its gradients are on the first rank (for the
          reverse direction, on the last), and 0 elsewhere.
        - **lengths**: Lengths of the whole sequences, equal on all ranks.

    Outputs:
        - **out**: Output of the part.
        - **h**: State after the whole sequence, equal on all ranks, so that a call with it continues on all of them.

    The loss is the sum of the losses of all ranks, so the gradients of the weights are on each rank those of its own
    part. Wrap the model in `DistributedDataParallel` or `fully_shard` over all ranks, as for data parallel; these take
    the mean of the gradients, which is that of the whole sequence if the loss is a mean over the steps and all parts
    are equally long. All ranks must call `backward`, also those on which the loss does not depend on the output.

    Raises:
        TypeError: `device_mesh` is no mesh. In a call, an argument has the wrong type.
        ValueError: The mesh has several dimensions, or the module has no layer, or one that is not supported, such as
            a cell, a layer of `drop_in` or a layer of your own. In a call, an argument has the wrong shape on some
            rank, or the ranks have other batch sizes, dtypes, arguments or lengths. All ranks then raise it, before
            they communicate anything else.

    Numerics:
        In float64, outputs and gradients agree with those of one process to 1e-12, in float32 to 2e-6 and 1e-5. There
        are no second derivatives. Under `torch.compile`, the recurrence is not in the graph.

    Differences from one process: the forward pass runs the recurrence twice more, for P and `last`. The backward pass
    runs it again, and its backward pass twice. With at most 64 input features, or with `recompute=True`, layers do not
    store pre-activations, which the backward pass computes again. Packed sequences must be padded, and on CPUs,
    `lengths` are slower.

    Examples:
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from mingru.distributed import SequenceParallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # one process; see the guide
        >>> mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        >>> rnn = parallelize_module(mingru.MinGRU(3, 64), mesh, SequenceParallel())
        >>> part = torch.randn(10, 128, 3).chunk(mesh.size(), 1)[mesh.get_local_rank()]
        >>> out, h = rnn(part)
        >>> out.shape, h.shape
        (torch.Size([10, 128, 64]), torch.Size([1, 10, 1, 64]))
        >>> dist.destroy_process_group()
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layers = outermost(_NAME, module, device_mesh)
        inner = [each for layer in layers for each in layer.modules()]
        for each in inner:
            _check_supported(each)
        for each in inner:
            for base, part in _PARTS.items():
                if isinstance(each, base):
                    derive(each, part, device_mesh)
        for layer in layers:
            layer.register_forward_pre_hook(functools.partial(_of_part, device_mesh), with_kwargs=True)
        return module


def _check_supported(module: nn.Module) -> None:
    if not isinstance(module, Layer):
        return
    expected = "MinGRU, MinLSTM, convolutional layers, Stack, models.Block or models.LanguageModel"
    remedy = "nobody knows how the state of another layer continues over parts"
    is_layer = isinstance(module, (Recurrent, Convolutional)) and module.role == "sequence"
    # Its state is no linear function of the state before.
    is_layer = is_layer and getattr(module, "cell", None) != "gru"
    is_known = is_layer or isinstance(module, (Stack, PerStep, Block, LanguageModel))
    got = module.name + (" that is already parallel" if hasattr(module, "mesh") else "")
    require(_NAME, "module", is_known and not hasattr(module, "mesh"), expected, got, remedy)


@eager
def _of_part(mesh: DeviceMesh, module: Layer, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Any, Any]:
    """Check a call on all ranks, and replace the lengths by those of the part of this rank."""
    own: tuple[int, dict[str, object], Exception | None]
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        own = *_checked(module, bound.arguments), None
    except (TypeError, ValueError) as error:
        own = 0, {}, error
    of_all = [own] * mesh.size()
    dist.all_gather_object(of_all, own, mesh.get_group())
    steps, facts, errors = zip(*of_all, strict=True)
    for rank, raised in enumerate(errors):
        if raised is not None:
            raise own[-1] or type(raised)(f"rank {rank} of {_NAME}: {raised}")
    for name in facts[0]:
        values = [each[name] for each in facts]
        expected, got = f"equal on all ranks of {_NAME}", ", ".join(map(str, values))
        require(module.name, name, values == values[:1] * len(values), expected, got)
    given = bound.arguments
    lengths = given.get("lengths")
    if lengths is not None:
        check_range(module.name, "lengths", lengths, sum(steps), f"from 0 to S = {sum(steps)}")
        given["lengths"] = (lengths.long() - sum(steps[: mesh.get_local_rank()])).clamp(0, own[0])
        name, x = next(iter(given.items()))
        given[name] = without_padding(x, given["lengths"], not module.batch_first)
    return bound.args, bound.kwargs


def _checked(module: Layer, given: dict[str, Any]) -> tuple[int, dict[str, object]]:
    """Check all arguments but the lengths, which are those of the whole sequence.

    Return the number of steps, and what must be equal on all ranks.
    """
    name, x = next(iter(given.items()))
    check_type(module.name, name, x, Tensor, f"a tensor, of which each rank of {_NAME} has a part")
    h = given.get("h", given.get("state"))
    states = [h] if isinstance(module, Recurrent) and h is not None else h
    first: Any = module
    while first is not None:
        first._check_all(x, states, given.get("reset"), None, given.get("dt"))
        # A stack leaves it to its first layer to check x.
        first = first.layers[0] if isinstance(first, Stack) else None
        states = states[: first.num_states] if states is not None and first is not None else None
    lengths = given.get("lengths")
    batch, steps = x.shape[:2] if module.batch_first else (x.shape[1], x.shape[0])
    if lengths is not None:
        LAYER.batch_first[0]["lengths"].check(module, lengths, lengths, (batch, steps))
    arguments = tuple(name for name, value in given.items() if value is not None)
    of_lengths = None if lengths is None else lengths.tolist()
    return steps, {"batch": batch, "dtype": x.dtype, "arguments": arguments, "lengths": of_lengths}


class _Layers(Recurrent):
    """Layers of which each computes the recurrence of a part."""

    mesh: DeviceMesh

    def all_states(self, *args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = _of_part(self.mesh, self, args, kwargs)
        return super().all_states(*args, **kwargs)

    def _takes_lengths(self, *args: object) -> bool:
        return True  # Packed parts of sequences would have other batches on each rank.


class _Model(LanguageModel):
    def stream(self, *args: object, **kwargs: object) -> NoReturn:
        problem = f"generate and stream need a model without {_NAME}, because prompts have no parts"
        raise ValueError(f"{self.name}: {problem}")


class _Layer(Part):
    """A layer that computes the recurrence of a part."""

    def _run_cell(self, spec: Spec, inputs: list[Tensor], context: Context, layout: Layout) -> States:
        calls = divided(Call(spec, inputs, context, layout))
        return joined([self._over_ranks(each) for each in calls], layout)

    @eager
    def _over_ranks(self, call: Call, num_inputs: int = 0) -> States:
        """Return the recurrence over all ranks. With `num_inputs`, the tensors are x, and weight and bias of a map."""
        spec, tensors, context, layout = call
        # The accumulation dtype, in which states travel.
        given = flattened(context._replace(h=as_dtype(context.h, accumulate_dtype(context.h.dtype))), layout)
        out, last = _Recurrence.apply(self.mesh, spec, layout.time_first, num_inputs, *given, *tensors)  # type: ignore[no-untyped-call]
        return out, as_dtype(last, context.h.dtype)

    @eager
    def _in_reverse(self, context: Context, layout: Layout) -> Context:
        steps = (None if x is None else _of_next_step(self.mesh, x, layout) for x in (context.reset, context.dt))
        return with_steps(context, *steps)


class _LinearLayer(_Layer, LinearLevel):
    """A layer that stores x in place of its pre-activations if backward computes them again."""

    def _mapped(self, spec: Spec, y: Tensor, context: Context, layout: Layout) -> States:
        linear = self.maps()[spec.reverse]
        is_plain = type(linear) in LINEAR_MAPS and not route.is_hooked(linear) and not is_autocast(y)
        is_plain = is_plain and spec.cell not in MIXTURES and not self.has_output_gate
        if is_plain and are_recomputed(spec.cell, y, self.recompute):
            return self._over_ranks(Call(spec, [y, linear.weight, linear.bias], context, layout), self.num_parts)
        return super()._mapped(spec, y, context, layout)


def _of_next_step(mesh: DeviceMesh, x: Tensor, layout: Layout) -> Tensor:
    """Return the value of the next step, also if another rank has it.

    After the last step of the whole sequence comes False for resets, and for elapsed times that of its first step.
    """
    time, rank = 0 if layout.time_first else 1, mesh.get_local_rank()
    dtype = x.dtype if x.is_floating_point() else torch.float32
    first = x.select(time, 0).to(dtype) if x.shape[time] > 0 else x.new_zeros(x.shape[1 - time], dtype=dtype)
    exists = torch.full_like(first, x.shape[time] > 0) if layout.lengths is None else (layout.lengths > 0).to(dtype)
    exist, firsts = _gather(mesh, torch.stack([exists, first])).unbind(1)
    following = torch.zeros_like(first)
    for other in [*range(rank + 1, mesh.size()), *range(rank + 1 if x.is_floating_point() else 0)][::-1]:
        following = torch.where(exist[other] > 0, firsts[other], following)
    return of_next_step(x, following.to(x.dtype).unsqueeze(time).expand_as(x), layout)


def _gather(mesh: DeviceMesh, x: Tensor) -> Tensor:
    """Return x of all ranks, (ranks, *x.shape). The gradient of x is the sum of the gradients on all ranks."""
    return DTensor.from_local(x.unsqueeze(0), mesh, [Shard(0)]).full_tensor(grad_placements=[Partial()])


def _numbers(mesh: DeviceMesh, parts: int, *states: Tensor) -> tuple[Tensor, ...]:
    """Return states of all ranks, as numbers."""
    return _gather(mesh, torch.stack([to_parts(each, parts) for each in states])).unbind(1)


def _carry(along: range, products: Tensor, values: Tensor, state: Tensor, parts: int) -> Tensor:
    """Return product * state + value of one rank after the other. No state passes a reset, not even NaN."""
    for rank in along:
        passed = plus_times(values[rank], products[rank], state, parts)
        state = torch.where(products[rank] == 0, values[rank], passed)
    return state


class _Recurrence(torch.autograd.Function):
    """Return the outputs of a part, and the state after all parts.

    The backward pass runs the recurrence again, and the linear map if there is one. The graph of the forward pass is
    not kept, because under activation checkpointing, ranks without steps would then run fewer collectives than others.
    """

    @staticmethod
    def forward(ctx: Any, mesh: DeviceMesh, spec: Spec, time_first: bool, num_inputs: int, *given: Maybe) -> States:
        call = _from_inputs(from_flat(spec, given, time_first), num_inputs)
        parts, ranks, h = parts_of(spec.cell), range(mesh.size())[:: -1 if spec.reverse else 1], call.context.h
        _, last = _run(call, torch.zeros_like(h))
        products, lasts = _numbers(mesh, parts, _product(call), last)
        # In the order in which the state passes the ranks.
        index = ranks.index(mesh.get_local_rank())
        before = _carry(ranks[:index], products, lasts, to_parts(h, parts), parts)
        after = _carry(ranks[index:], products, lasts, before, parts)
        before = from_parts(before, parts)
        ctx.own, ctx.is_first, ctx.later = (mesh, spec, time_first, num_inputs), index == 0, ranks[index + 1 :]
        # Parameters too, so that torch refuses those that were changed since.
        ctx.save_for_backward(products, before, *given[1:])
        return _run(call, before)[0], from_parts(after, parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_last: Tensor) -> tuple[Maybe, ...]:
        (products, *saved), (mesh, spec, time_first, num_inputs) = ctx.saved_tensors, ctx.own
        needs = [True, *ctx.needs_input_grad[5:]]
        given: Any = [x if x is None else x.detach().requires_grad_(own) for x, own in zip(saved, needs, strict=True)]
        with torch.enable_grad():
            out, last = _run(_from_inputs(from_flat(spec, given, time_first), num_inputs), given[0])
            # Otherwise `out` of a part without steps may need no gradient.
            out = out + given[0].sum() if out.numel() == 0 else out
        (of_out,) = torch.autograd.grad(out, given[0], grad_out, retain_graph=True)
        # The gradient of the state after this part, from those of the states before the later parts and after all.
        parts = parts_of(spec.cell)
        deltas, of_last = _numbers(mesh, parts, of_out, grad_last)
        delta = _carry(ctx.later[::-1], conjugate(products, parts), deltas, of_last.sum(0), parts)
        wanted = [x for x, own in zip(given, needs, strict=True) if x is not None and own]
        grads = iter(torch.autograd.grad((out, last), wanted, (grad_out, from_parts(delta, parts)), allow_unused=True))
        of_before, *others = [next(grads) if own else None for own in needs]
        # On the first rank, the gradient of the state before the whole sequence.
        return *[None] * 4, of_before if ctx.is_first else torch.zeros_like(given[0]), *others


def _from_inputs(call: Call, num_inputs: int) -> Call:
    """Return the call of the pre-activations, if the tensors are x, and weight and bias of a linear map."""
    return call._replace(tensors=[*F.linear(*call.tensors).chunk(num_inputs, -1)]) if num_inputs else call


def _run(call: Call, h: Tensor) -> States:
    return ops.recurrence(*call._replace(context=call.context._replace(h=h)))


def _product(call: Call) -> Tensor:
    """Return the product of the decays of all steps; 0 if there is a reset."""
    (spec, inputs, context, layout), parts = call, parts_of(call.spec.cell)
    reset, one = padded_call(call).context.reset, from_parts(one_like(to_parts(context.h, parts), parts), parts)
    # With candidates of 0, the state from 1 is the product.
    inputs = [*inputs[:-1], torch.zeros_like(inputs[-1])]
    _, product = ops.recurrence(spec._replace(activation="linear"), inputs, Context(one, one, None, context.dt), layout)
    # Not 0, which means a reset: infinity and NaN do not decay.
    product = product.masked_fill(product == 0, torch.finfo(product.dtype).tiny)
    return product if reset is None else product.masked_fill(along(reset.any(1), product), 0.0)


class _CausalConv(CausalConv):
    """A convolution whose first inputs are the last ones of the ranks before."""

    mesh: DeviceMesh

    @eager
    def forward(
        self, x: Tensor, state: Tensor, reset: Maybe = None, lengths: Maybe = None, adds_x: bool = False
    ) -> States:
        # The state after this part from 0, and which of the states before it has, as numbers from 1 on.
        num_past = self.kernel_size - 1
        tail = state_after(*past_and_segment(x, torch.zeros_like(state), reset, num_past), lengths, num_past)
        numbers = torch.arange(1.0, self.kernel_size, device=x.device).view(1, 1, -1, 1).expand_as(state[..., :1])
        blank = torch.zeros_like(x[..., :1], dtype=numbers.dtype)
        old = state_after(*past_and_segment(blank, numbers, reset, num_past), lengths, num_past)
        states = [state.to(x.dtype)]
        for own, index in zip(_gather(self.mesh, tail), _gather(self.mesh, old).long(), strict=True):
            kept = states[-1].gather(2, (index - 1).clamp_min(0).expand_as(own))
            states.append(torch.where(index > 0, kept, own))
        # Of all states, so that all ranks gather gradients.
        before = torch.stack(states)[self.mesh.get_local_rank()]
        return super().forward(x, before, reset, lengths, adds_x)[0], states[-1]


# Replaced methods of each class, if it has any. All ranks call them in the same order.
_PARTS = {
    LinearLevel: _LinearLayer,
    ConvLevel: _Layer,
    Recurrent: _Layers,
    LanguageModel: _Model,
    CausalConv: _CausalConv,
}
