"""Run common idioms with nn.GRU and nn.GRUCell and with mingru.drop_in, and print a table of the differences.

    python benchmarks/idioms.py [--write]

Each idiom is a function of the class. It returns the result that a user would see, or None if it only has to run. Two
classes agree on an idiom if both return equal values or both raise the same type of error. Nothing is timed.
"""

import argparse
import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, parametrizations, prune, vector_to_parameters
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import mingru
from mingru import drop_in

PAGE = Path(__file__).parents[1] / "docs" / "coming_from_gru.md"
MARKS = ("<!-- printed by benchmarks/idioms.py -->\n", "<!-- end of what benchmarks/idioms.py prints -->\n")

S, B, IN, H = 5, 2, 3, 4
DROP_IN = {nn.GRU: drop_in.GRU, nn.GRUCell: drop_in.GRUCell}
IDIOMS: list[tuple[type[nn.Module], Callable[[Any], Any]]] = []


class Row(NamedTuple):
    """An idiom and its outcome with each class: a value, "runs", or the type of an error."""

    idiom: str
    torch: str
    drop_in: str


def idiom(of: type[nn.Module]) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Return a decorator that adds a function to IDIOMS; the function's docstring is its title in the table."""

    def add(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        IDIOMS.append((of, function))
        return function

    return add


of_layer, of_cell = idiom(nn.GRU), idiom(nn.GRUCell)


class Tagger(nn.Module):
    """A small model that contains a layer."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        return self.head(self.rnn(x, h)[0])


def x_of(*shape: int) -> Tensor:
    return torch.randn(*(shape or (S, B, IN)))


# In-place operations


@of_layer
def detach_the_state(gru: Any) -> None:
    """`h_n.detach_()` between chunks of truncated backpropagation"""
    rnn, h = gru(IN, H), torch.zeros(1, B, H)
    for _ in range(3):
        output, h = rnn(x_of(), h)
        output.sum().backward()
        h.detach_()


@of_layer
def detach_the_state_before_backward(gru: Any) -> None:
    """`h_n.detach_()` before `backward`"""
    output, h = gru(IN, H, 2)(x_of())
    h.detach_()
    output.sum().backward()


@of_layer
def detach_the_state_of_two_directions(gru: Any) -> None:
    """`h_n.detach_()` of two bidirectional layers"""
    output, h = gru(IN, H, 2, bidirectional=True)(x_of())
    output.sum().backward()
    h.detach_()


@of_layer
def detach_without_gradients(gru: Any) -> None:
    """`h_n.detach_()` under `no_grad`"""
    with torch.no_grad():
        gru(IN, H)(x_of())[1].detach_()


@of_layer
def detach_the_output(gru: Any) -> bool:
    """`output.detach_()`"""
    return gru(IN, H)(x_of())[0].detach_().requires_grad


@of_layer
def relu_in_place(gru: Any) -> None:
    """`output.relu_()` before `backward`"""
    gru(IN, H)(x_of())[0].relu_().sum().backward()


@of_layer
def relu_in_place_of_two_directions(gru: Any) -> None:
    """`output.relu_()` of a bidirectional layer before `backward`"""
    gru(IN, H, bidirectional=True)(x_of())[0].relu_().sum().backward()


@of_layer
def relu_in_place_batch_first(gru: Any) -> None:
    """`output.relu_()` with `batch_first` before `backward`"""
    gru(IN, H, batch_first=True)(x_of())[0].relu_().sum().backward()


@of_layer
def relu_in_place_without_gradients(gru: Any) -> None:
    """`output.relu_()` under `no_grad`"""
    with torch.no_grad():
        gru(IN, H)(x_of())[0].relu_()


@of_layer
def relu_in_place_in_inference_mode(gru: Any) -> None:
    """`output.relu_()`, `h_n.zero_()` in inference mode"""
    with torch.inference_mode():
        output, h = gru(IN, H)(x_of())
        output.relu_()
        h.zero_()


@of_layer
def relu_in_place_of_packed_data(gru: Any) -> None:
    """`packed.data.relu_()` before `backward`"""
    packed, _ = gru(IN, H)(pack_sequence([x_of(5, IN), x_of(3, IN)]))
    packed.data.relu_().sum().backward()


@of_layer
def dropout_in_place(gru: Any) -> None:
    """`F.dropout(output, inplace=True)` before `backward`"""
    F.dropout(gru(IN, H)(x_of())[0], 0.5, inplace=True).sum().backward()


@of_layer
def residual_in_place(gru: Any) -> None:
    """`output += x` before `backward`"""
    x = x_of()
    output, _ = gru(IN, IN)(x)
    output += x
    output.sum().backward()


@of_layer
def mask_in_place(gru: Any) -> None:
    """`output.masked_fill_(padding, 0)` before `backward`"""
    output, _ = gru(IN, H)(x_of())
    output.masked_fill_(torch.rand(S, B, 1) < 0.5, 0).sum().backward()


@of_layer
def zero_the_state(gru: Any) -> None:
    """`h_n.zero_()` after `h_n = h_n.detach()`"""
    output, h = gru(IN, H)(x_of())
    output.sum().backward()
    h = h.detach()
    h.zero_()


@of_layer
def zero_the_detached_state_before_backward(gru: Any) -> None:
    """`h_n.detach().zero_()` before `backward`"""
    output, h = gru(IN, H)(x_of())
    h.detach().zero_()
    output.sum().backward()


@of_layer
def zero_finished_episodes(gru: Any) -> None:
    """`h_n[:, done] = 0` under `no_grad`"""
    with torch.no_grad():
        _, h = gru(IN, H)(x_of())
        h[:, torch.tensor([True, False])] = 0


@of_layer
def zero_finished_episodes_in_training(gru: Any) -> None:
    """`h_n[:, done] = 0` between steps, before `backward`"""
    rnn, h, loss = gru(IN, H), None, torch.zeros(())
    for _ in range(3):
        output, h = rnn(x_of(1, B, IN), h)
        loss = loss + output.sum()
        h[:, torch.tensor([True, False])] = 0
    loss.backward()


@of_layer
def scale_finished_episodes_in_training(gru: Any) -> None:
    """`h_n *= mask` between steps, before `backward`"""
    rnn, h, loss = gru(IN, H), None, torch.zeros(())
    for _ in range(3):
        output, h = rnn(x_of(1, B, IN), h)
        loss = loss + output.sum()
        h *= torch.tensor([[0.0], [1.0]])
    loss.backward()


@of_layer
def fill_the_first_state_before_backward(gru: Any) -> None:
    """`h_0.zero_()` between the call and `backward`"""
    h = torch.randn(1, B, H)
    output, _ = gru(IN, H)(x_of(), h)
    h.zero_()
    output.sum().backward()


@of_layer
def fill_the_input_before_backward(gru: Any) -> None:
    """`input.zero_()` between the call and `backward`"""
    x = x_of()
    output, _ = gru(IN, H)(x)
    x.zero_()
    output.sum().backward()


@of_layer
def output_and_state_apart(gru: Any) -> bool:
    """`output.zero_()` under `no_grad` does not change `h_n`"""
    with torch.no_grad():
        output, h = gru(IN, H)(x_of())
        before = h.clone()
        output.zero_()
        return torch.equal(h, before)


@of_layer
def state_and_output_apart(gru: Any) -> bool:
    """`h_n.zero_()` under `no_grad` does not change `output`"""
    with torch.no_grad():
        output, h = gru(IN, H)(x_of())
        before = output.clone()
        h.zero_()
        return torch.equal(output, before)


@of_cell
def detach_the_state_of_a_cell(cell: Any) -> None:
    """cell: `h.detach_()` between steps"""
    step, h = cell(IN, H), None
    for _ in range(3):
        h = step(x_of(B, IN), h)
        h.sum().backward()
        h.detach_()


@of_cell
def relu_of_a_cell(cell: Any) -> None:
    """cell: `h.relu_()` before `backward`"""
    cell(IN, H)(x_of(B, IN)).relu_().sum().backward()


@of_cell
def zero_finished_episodes_of_a_cell(cell: Any) -> None:
    """cell: `h[done] = 0` between steps, before `backward`"""
    step, h, loss = cell(IN, H), torch.zeros(B, H), torch.zeros(())
    for _ in range(3):
        h = step(x_of(B, IN), h)
        loss = loss + h.sum()
        h[torch.tensor([True, False])] = 0
    loss.backward()


@of_cell
def zero_finished_episodes_of_a_cell_without_gradients(cell: Any) -> None:
    """cell: `h[done] = 0` under `no_grad`"""
    with torch.no_grad():
        cell(IN, H)(x_of(B, IN))[0] = 0


@of_cell
def write_the_outputs_of_a_cell(cell: Any) -> None:
    """cell: `outputs[t] = h` for each step"""
    step, h, outputs = cell(IN, H), None, torch.zeros(S, B, H)
    for t, x in enumerate(x_of()):
        h = step(x, h)
        outputs[t] = h
    outputs.sum().backward()


# Memory layout


def in_memory(tensor: Tensor) -> str:
    return ("contiguous" if tensor.is_contiguous() else "not contiguous") + (", a view" if tensor._is_view() else "")


@of_layer
def output_in_memory(gru: Any) -> str:
    """`output.is_contiguous()`, `output._base`"""
    return in_memory(gru(IN, H)(x_of())[0])


@of_layer
def output_in_memory_without_gradients(gru: Any) -> str:
    """`output.is_contiguous()`, `output._base` under `no_grad`"""
    with torch.no_grad():
        return in_memory(gru(IN, H)(x_of())[0])


@of_layer
def output_in_memory_of_two_directions(gru: Any) -> str:
    """`output.is_contiguous()`, `output._base` of two bidirectional layers"""
    return in_memory(gru(IN, H, 2, bidirectional=True)(x_of())[0])


@of_layer
def output_in_memory_batch_first(gru: Any) -> bool:
    """`output.is_contiguous()` with `batch_first`"""
    return gru(IN, H, batch_first=True)(x_of())[0].is_contiguous()


@of_layer
def output_in_memory_without_a_batch(gru: Any) -> bool:
    """`output.is_contiguous()` of unbatched input"""
    return gru(IN, H)(x_of(S, IN))[0].is_contiguous()


@of_layer
def state_in_memory(gru: Any) -> str:
    """`h_n.is_contiguous()`, `h_n._base`"""
    return in_memory(gru(IN, H)(x_of())[1])


@of_layer
def state_in_memory_of_two_directions(gru: Any) -> str:
    """`h_n.is_contiguous()`, `h_n._base` of two bidirectional layers"""
    return in_memory(gru(IN, H, 2, bidirectional=True)(x_of())[1])


@of_layer
def view_of_the_output(gru: Any) -> None:
    """`output.view(-1, H)`"""
    gru(IN, H)(x_of())[0].view(-1, H)


@of_layer
def view_of_the_output_batch_first(gru: Any) -> None:
    """`output.view(-1, H)` with `batch_first`"""
    gru(IN, H, batch_first=True)(x_of())[0].view(-1, H)


@of_layer
def view_of_the_output_of_a_transposed_input(gru: Any) -> None:
    """`output.view(-1, H)` after `rnn(x.transpose(0, 1))`"""
    gru(IN, H)(x_of(B, S, IN).transpose(0, 1))[0].view(-1, H)


@of_layer
def view_of_the_output_of_a_strided_input(gru: Any) -> None:
    """`output.view(-1, H)` after `rnn(x[::2])`"""
    gru(IN, H)(x_of(2 * S, B, IN)[::2])[0].view(-1, H)


@of_layer
def view_of_the_transposed_output(gru: Any) -> None:
    """`output.transpose(0, 1).contiguous().view(B, -1)`"""
    gru(IN, H)(x_of())[0].transpose(0, 1).contiguous().view(B, -1)


@of_layer
def view_of_two_directions(gru: Any) -> None:
    """`output.view(S, B, 2, H)` of a bidirectional layer"""
    gru(IN, H, bidirectional=True)(x_of())[0].view(S, B, 2, H)


@of_layer
def view_of_two_directions_batch_first(gru: Any) -> None:
    """`output.view(B, S, 2, H)` of a bidirectional layer with `batch_first`"""
    gru(IN, H, bidirectional=True, batch_first=True)(x_of(B, S, IN))[0].view(B, S, 2, H)


@of_layer
def view_of_the_state(gru: Any) -> None:
    """`h_n.view(L, D, B, H)`"""
    gru(IN, H, 2, bidirectional=True)(x_of())[1].view(2, 2, B, H)


@of_layer
def view_of_the_state_batch_first(gru: Any) -> None:
    """`h_n.view(B, -1)` of one layer with `batch_first`"""
    gru(IN, H, batch_first=True)(x_of(B, S, IN))[1].view(B, -1)


@of_layer
def view_of_the_last_state(gru: Any) -> None:
    """`h_n[-1].view(-1)`"""
    gru(IN, H, 2)(x_of())[1][-1].view(-1)


@of_layer
def view_of_the_last_step(gru: Any) -> None:
    """`output[-1].view(-1)`"""
    gru(IN, H)(x_of())[0][-1].view(-1)


@of_layer
def view_of_packed_data(gru: Any) -> None:
    """`packed.data.view(-1)`"""
    gru(IN, H)(pack_sequence([x_of(5, IN), x_of(3, IN)]))[0].data.view(-1)


@of_layer
def numpy_of_the_output(gru: Any) -> int:
    """`output.detach().numpy()`"""
    return gru(IN, H)(x_of())[0].detach().numpy().size


@of_cell
def cell_in_memory(cell: Any) -> str:
    """cell: `h.is_contiguous()`, `h._base`"""
    return in_memory(cell(IN, H)(x_of(B, IN)))


@of_cell
def view_of_a_cell(cell: Any) -> None:
    """cell: `h.view(-1)`"""
    cell(IN, H)(x_of(B, IN)).view(-1)


# Calls


@of_layer
def keywords(gru: Any) -> bool:
    """`rnn(input=x, hx=h)`"""
    rnn, x, h = gru(IN, H), x_of(), torch.randn(1, B, H)
    return torch.equal(rnn(input=x, hx=h)[0], rnn(x, h)[0])


@of_layer
def no_state_is_zero(gru: Any) -> bool:
    """`rnn(x)` equals `rnn(x, zeros)`"""
    rnn, x = gru(IN, H, 2), x_of()
    return torch.equal(rnn(x)[0], rnn(x, torch.zeros(2, B, H))[0])


@of_layer
def state_from_a_parameter(gru: Any) -> torch.Size:
    """`next(rnn.parameters()).new_zeros(L, B, H)` as state"""
    rnn = gru(IN, H, 2)
    return rnn(x_of(), next(rnn.parameters()).new_zeros(rnn.num_layers, B, rnn.hidden_size))[1].shape


@of_layer
def state_as_a_tuple(gru: Any) -> None:
    """`rnn(x, (h, c))`"""
    gru(IN, H)(x_of(), (torch.zeros(1, B, H), torch.zeros(1, B, H)))


@of_layer
def packed(gru: Any) -> torch.Size:
    """`pack_padded_sequence`, `rnn`, `pad_packed_sequence`"""
    inputs = pack_padded_sequence(x_of(), torch.tensor([3, 5]), enforce_sorted=False)
    return pad_packed_sequence(gru(IN, H)(inputs)[0], total_length=7)[0].shape


@of_layer
def without_a_batch(gru: Any) -> list[torch.Size]:
    """`rnn(x)` of unbatched input"""
    return [each.shape for each in gru(IN, H, 2)(x_of(S, IN))]


@of_layer
def switch_batch_first(gru: Any) -> torch.Size:
    """`rnn.batch_first = True` after construction"""
    rnn = gru(IN, H)
    rnn.batch_first = True
    return rnn(x_of())[1].shape


@of_layer
def switch_dropout(gru: Any) -> bool:
    """`rnn.dropout = 1.0` after construction"""
    rnn, x = gru(IN, H, 2), x_of()
    rnn.dropout = 1.0
    return torch.equal(rnn(x)[0], rnn.eval()(x)[0])


@of_layer
def hook(gru: Any) -> list[Any]:
    """`register_forward_hook`, `register_forward_pre_hook`"""
    rnn, seen = gru(IN, H), []
    rnn.register_forward_pre_hook(lambda module, args: seen.append(len(args)))
    rnn.register_forward_hook(lambda module, args, outputs: seen.append([each.shape for each in outputs]))
    rnn(x_of())
    return seen


@of_layer
def subclass(gru: Any) -> torch.Size:
    """a subclass that overrides `forward`"""

    class Last(gru):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)[0][-1]

    return Last(IN, H)(x_of()).shape


@of_layer
def second_derivative(gru: Any) -> bool:
    """a second derivative"""
    rnn, x = gru(IN, H), x_of().requires_grad_()
    (first,) = torch.autograd.grad(rnn(x)[0].square().sum(), x, create_graph=True)
    first.square().sum().backward()
    return bool(x.grad.any())


@of_layer
def functional_call(gru: Any) -> torch.Size:
    """`torch.func.functional_call`"""
    rnn = gru(IN, H)
    return torch.func.functional_call(rnn, dict(rnn.named_parameters()), (x_of(),))[0].shape


@of_layer
def vmap_over_models(gru: Any) -> torch.Size:
    """`torch.func.vmap` over stacked models"""
    rnns, x = [gru(IN, H), gru(IN, H)], x_of()
    weights, buffers = torch.func.stack_module_state(rnns)
    return torch.func.vmap(lambda each: torch.func.functional_call(rnns[0], (each, buffers), (x,))[0])(weights).shape


@of_cell
def cell_keywords(cell: Any) -> torch.Size:
    """cell: `cell(input=x, hx=h)`"""
    return cell(IN, H)(input=x_of(B, IN), hx=torch.zeros(B, H)).shape


# Attributes


@of_layer
def attributes(gru: Any) -> list[Any]:
    """`rnn.input_size`, `rnn.hidden_size`, `rnn.num_layers` and the other options"""
    rnn = gru(IN, H, 2, bidirectional=True)
    names = "input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size mode training"
    return [getattr(rnn, name) for name in names.split()]


@of_layer
def text(gru: Any) -> list[str]:
    """`repr(rnn)`, `rnn.extra_repr()`"""
    rnn = gru(IN, H, 2, dropout=0.5)
    return [repr(rnn), rnn.extra_repr(), type(rnn).__name__]


@of_layer
def instance(gru: Any) -> bool:
    """`isinstance(rnn, nn.GRU)`"""
    return isinstance(gru(IN, H), nn.GRU)


@of_layer
def instance_of_the_base(gru: Any) -> bool:
    """`isinstance(rnn, nn.RNNBase)`"""
    return isinstance(gru(IN, H), nn.RNNBase)


@of_layer
def flatten(gru: Any) -> Any:
    """`rnn.flatten_parameters()`"""
    return gru(IN, H).flatten_parameters()


@of_layer
def helpers(gru: Any) -> None:
    """`rnn.check_forward_args(x, h, None)`, `rnn.permute_hidden(h, order)`"""
    rnn, h = gru(IN, H), torch.zeros(1, B, H)
    rnn.check_forward_args(x_of(), h, None)
    rnn.permute_hidden(h, torch.tensor([1, 0]))


@of_layer
def all_weights(gru: Any) -> int:
    """`len(rnn.all_weights)` of two bidirectional layers"""
    return len(gru(IN, H, 2, bidirectional=True).all_weights)


@of_layer
def initialize_all_weights(gru: Any) -> bool:
    """`for weights in rnn.all_weights: for w in weights: w.data.uniform_(-0.1, 0.1)`"""
    rnn = gru(IN, H, 2)
    for weights in rnn.all_weights:
        for weight in weights:
            weight.data.uniform_(-0.1, 0.1)
    return all(bool((weight.abs() <= 0.1).all()) for weight in rnn.parameters())


@of_layer
def unpack_all_weights(gru: Any) -> None:
    """`for w_ih, w_hh, b_ih, b_hh in rnn.all_weights`"""
    for w_ih, w_hh, b_ih, b_hh in gru(IN, H).all_weights:
        nn.init.xavier_uniform_(w_ih)
        nn.init.orthogonal_(w_hh)
        nn.init.zeros_(b_ih)
        nn.init.zeros_(b_hh)


@of_layer
def flat_names(gru: Any) -> None:
    """`for name in rnn._flat_weights_names: getattr(rnn, name)`"""
    rnn = gru(IN, H)
    for name in rnn._flat_weights_names:
        getattr(rnn, name)


@of_layer
def flat_weights(gru: Any) -> None:
    """`rnn._flat_weights`"""
    for weight in gru(IN, H)._flat_weights:
        weight.data.zero_()


@of_layer
def by_name(gru: Any) -> None:
    """`nn.init.orthogonal_(rnn.weight_hh_l0)`"""
    nn.init.orthogonal_(gru(IN, H).weight_hh_l0)


@of_layer
def find_by_name(gru: Any) -> bool:
    """`if "weight_ih" in name` in a loop over `named_parameters` finds a weight"""
    return any("weight_ih" in name for name, _ in gru(IN, H).named_parameters())


@of_layer
def weights_and_biases(gru: Any) -> list[bool]:
    """`if "weight" in name: ... elif "bias" in name: ...` in a loop over `named_parameters`"""
    rnn = gru(IN, H, 2, bidirectional=True)
    for name, weight in rnn.named_parameters():
        if "weight" in name:
            nn.init.orthogonal_(weight)
        elif "bias" in name:
            nn.init.zeros_(weight)
    return [bool(weight.any()) == (weight.dim() > 1) for weight in rnn.parameters()][:2]


@of_layer
def by_dimensions(gru: Any) -> None:
    """`if p.dim() >= 2: nn.init.orthogonal_(p)` in a loop over `parameters`"""
    for weight in gru(IN, H).parameters():
        if weight.dim() >= 2:
            nn.init.orthogonal_(weight)
        else:
            nn.init.normal_(weight)


@of_layer
def initialize_again(gru: Any) -> bool:
    """`rnn.reset_parameters()`"""
    rnn = gru(IN, H)
    before = parameters_to_vector(rnn.parameters())
    rnn.reset_parameters()
    return torch.equal(parameters_to_vector(rnn.parameters()), before)


def initialize_linear_maps(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        module.bias.data.zero_()


def untouched_by(gru: Any, initialize: Callable[[nn.Module], Any], **options: Any) -> bool:
    model = Tagger(gru(IN, H, **options))
    before = parameters_to_vector(model.rnn.parameters())
    initialize(model)
    assert not model.head.bias.any()
    return torch.equal(parameters_to_vector(model.rnn.parameters()), before)


@of_layer
def apply(gru: Any) -> bool:
    """`model.apply(init)`, with an `init` for `nn.Linear`, does not change the weights"""
    return untouched_by(gru, lambda model: model.apply(initialize_linear_maps))


@of_layer
def apply_without_bias(gru: Any) -> bool:
    """`model.apply(init)`, with `bias=False` and an `init` for `nn.Linear` that zeroes `m.bias.data`"""
    return untouched_by(gru, lambda model: model.apply(initialize_linear_maps), bias=False)


@of_layer
def apply_to_a_layer(gru: Any) -> int:
    """`rnn.apply(f)` calls `f` once"""
    seen: list[nn.Module] = []
    gru(IN, H, 2).apply(seen.append)
    return len(seen)


@of_layer
def loop_over_modules(gru: Any) -> bool:
    """`for m in model.modules()`, with an `init` for `nn.Linear`, does not change the weights"""
    return untouched_by(gru, lambda model: [initialize_linear_maps(module) for module in model.modules()])


@of_layer
def loop_over_modules_without_bias(gru: Any) -> bool:
    """`for m in model.modules()`, with `bias=False` and an `init` for `nn.Linear` that zeroes `m.bias.data`"""
    return untouched_by(gru, lambda model: [initialize_linear_maps(module) for module in model.modules()], bias=False)


@of_layer
def children(gru: Any) -> bool:
    """`list(rnn.children())` is empty"""
    return not list(gru(IN, H).children())


@of_cell
def cell_attributes(cell: Any) -> list[Any]:
    """cell: `cell.input_size`, `cell.hidden_size`, `cell.bias`, `repr(cell)`"""
    step = cell(IN, H, bias=False)
    return [step.input_size, step.hidden_size, step.bias, repr(step)]


@of_cell
def cell_instance(cell: Any) -> bool:
    """cell: `isinstance(cell, nn.GRUCell)`"""
    return isinstance(cell(IN, H), nn.GRUCell)


@of_cell
def cell_by_name(cell: Any) -> None:
    """cell: `nn.init.orthogonal_(cell.weight_hh)`"""
    nn.init.orthogonal_(cell(IN, H).weight_hh)


@of_cell
def cell_apply(cell: Any) -> int:
    """cell: `cell.apply(f)` calls `f` once"""
    seen: list[nn.Module] = []
    cell(IN, H).apply(seen.append)
    return len(seen)


# Weights


@of_layer
def vectors(gru: Any) -> bool:
    """`parameters_to_vector`, `vector_to_parameters`"""
    rnn = gru(IN, H)
    vector_to_parameters(torch.zeros_like(parameters_to_vector(rnn.parameters())), rnn.parameters())
    return any(bool(weight.any()) for weight in rnn.parameters())


@of_layer
def clip(gru: Any) -> bool:
    """`clip_grad_norm_(rnn.parameters(), 1e-3)`"""
    rnn = gru(IN, H)
    rnn(x_of())[0].sum().backward()
    clip_grad_norm_(rnn.parameters(), 1e-3)
    return bool(parameters_to_vector(weight.grad for weight in rnn.parameters()).norm() <= 1.001e-3)


@of_layer
def freeze(gru: Any) -> list[bool]:
    """`rnn.requires_grad_(False)`"""
    return [each.requires_grad for each in gru(IN, H).requires_grad_(False)(x_of())]


@of_layer
def freeze_but_the_input(gru: Any) -> bool:
    """`rnn.requires_grad_(False)`, then `backward` to the input"""
    x = x_of().requires_grad_()
    gru(IN, H).requires_grad_(False)(x)[0].sum().backward()
    return bool(x.grad.any())


@of_layer
def step_of_an_optimizer(gru: Any) -> bool:
    """one step of `torch.optim.Adam` changes all weights"""
    rnn = gru(IN, H, 2)
    before = [weight.clone() for weight in rnn.parameters()]
    rnn(x_of())[0].sum().backward()
    torch.optim.Adam(rnn.parameters()).step()
    return not any(torch.equal(one, other) for one, other in zip(rnn.parameters(), before, strict=True))


@of_layer
def averaged(gru: Any) -> torch.Size:
    """`torch.optim.swa_utils.AveragedModel(rnn)`"""
    rnn = gru(IN, H)
    average = torch.optim.swa_utils.AveragedModel(rnn)
    average.update_parameters(rnn)
    return average(x_of())[0].shape


@of_layer
def prune_by_name(gru: Any) -> None:
    """`prune.l1_unstructured(rnn, "weight_ih_l0", 0.5)`"""
    prune.l1_unstructured(gru(IN, H), "weight_ih_l0", 0.5)


@of_layer
def prune_all_parameters(gru: Any) -> float:
    """`prune.global_unstructured` over the parameters of all modules"""
    rnn = gru(IN, H)
    prune.global_unstructured(
        [(module, name) for module in rnn.modules() for name, _ in list(module.named_parameters(recurse=False))],
        prune.L1Unstructured,
        amount=0.5,
    )
    zeros = [mask == 0 for name, mask in rnn.named_buffers() if name.endswith("_mask")]
    rnn(x_of())
    return torch.cat([each.flatten() for each in zeros]).float().mean().item()


@of_layer
def weight_norm(gru: Any) -> None:
    """`weight_norm(rnn, "weight_hh_l0")`"""
    parametrizations.weight_norm(gru(IN, H), "weight_hh_l0")(x_of())


@of_layer
def other_dtypes(gru: Any) -> list[torch.dtype]:
    """`rnn.double()`, `rnn.bfloat16()`, `rnn.to(torch.float64)`"""
    rnn = gru(IN, H)
    outputs = [
        rnn.double()(x_of().double())[0],
        rnn.bfloat16()(x_of().bfloat16())[0],
        rnn.to(torch.float64)(x_of().double())[0],
    ]
    return [each.dtype for each in outputs]


@of_layer
def from_meta(gru: Any) -> torch.Size:
    """`GRU(..., device="meta").to_empty(device="cpu")`, `reset_parameters`"""
    rnn = gru(IN, H, device="meta").to_empty(device="cpu")
    rnn.reset_parameters()
    return rnn(x_of())[0].shape


@of_layer
def share_memory(gru: Any) -> bool:
    """`rnn.share_memory()`"""
    return all(weight.is_shared() for weight in gru(IN, H).share_memory().parameters())


# Copies and files


def same_outputs(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    return torch.equal(one(x)[0], other(x)[0])


@of_layer
def deepcopy(gru: Any) -> bool:
    """`copy.deepcopy(rnn)`"""
    rnn = gru(IN, H)
    return same_outputs(rnn, copy.deepcopy(rnn), x_of())


@of_layer
def pickled(gru: Any) -> bool:
    """`pickle.dumps(rnn)`"""
    rnn = gru(IN, H)
    return same_outputs(rnn, pickle.loads(pickle.dumps(rnn)), x_of())


def through_a_file(value: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


@of_layer
def save_whole(gru: Any) -> bool:
    """`torch.save(rnn)`, `torch.load(weights_only=False)`"""
    rnn = gru(IN, H)
    return same_outputs(rnn, through_a_file(rnn, weights_only=False), x_of())


@of_layer
def save_whole_and_load_safely(gru: Any) -> None:
    """`torch.save(rnn)`, `torch.load(weights_only=True)`"""
    through_a_file(gru(IN, H), weights_only=True)


@of_layer
def save_whole_and_allow_the_class(gru: Any) -> None:
    """`torch.save(rnn)`, `torch.load(weights_only=True)` within `torch.serialization.safe_globals([GRU])`"""
    with torch.serialization.safe_globals([gru]):
        through_a_file(gru(IN, H), weights_only=True)


@of_layer
def save_whole_and_allow_all_classes(gru: Any) -> None:
    """`torch.save(rnn)`, `torch.load(weights_only=True)` within `safe_globals([nn.GRU, *mingru.safe_globals()])`"""
    with torch.serialization.safe_globals([nn.GRU, *mingru.safe_globals()]):
        through_a_file(gru(IN, H), weights_only=True)


@of_layer
def state_dict(gru: Any) -> bool:
    """`torch.save(rnn.state_dict())`, `load_state_dict`"""
    rnn, other = gru(IN, H, 2, bidirectional=True), gru(IN, H, 2, bidirectional=True)
    other.load_state_dict(through_a_file(rnn.state_dict(), weights_only=True))
    return same_outputs(rnn, other, x_of())


@of_layer
def trained_weights(gru: Any) -> None:
    """`load_state_dict` of a trained `nn.GRU`"""
    gru(IN, H).load_state_dict(nn.GRU(IN, H).state_dict())


# TorchScript, torch.compile and export


@of_layer
def script(gru: Any) -> torch.Size:
    """`torch.jit.script(model)`"""
    return torch.jit.script(Tagger(gru(IN, H)))(x_of()).shape


@of_layer
def script_alone(gru: Any) -> torch.Size:
    """`torch.jit.script(rnn)(x)`"""
    return torch.jit.script(gru(IN, H))(x_of())[0].shape


@of_cell
def script_a_cell(cell: Any) -> torch.Size:
    """cell: `torch.jit.script(cell)(x, h)`"""
    return torch.jit.script(cell(IN, H))(x_of(B, IN), torch.zeros(B, H)).shape


@of_layer
def trace(gru: Any) -> torch.Size:
    """`torch.jit.trace(model, x)`"""
    return torch.jit.trace(Tagger(gru(IN, H)), x_of())(x_of()).shape


@of_layer
def compile_whole(gru: Any) -> torch.Size:
    """`torch.compile(model, fullgraph=True)`"""
    torch.compiler.reset()
    return torch.compile(Tagger(gru(IN, H)), fullgraph=True, backend="eager")(x_of()).shape


@of_layer
def compile_in_parts(gru: Any) -> torch.Size:
    """`torch.compile(model)`"""
    torch.compiler.reset()
    return torch.compile(Tagger(gru(IN, H)), backend="eager")(x_of()).shape


@of_layer
def export(gru: Any) -> torch.Size:
    """`torch.export.export(model, (x,))`"""
    return torch.export.export(Tagger(gru(IN, H)), (x_of(),)).module()(x_of()).shape


@of_layer
def symbolic_trace(gru: Any) -> torch.Size:
    """`torch.fx.symbolic_trace(model)`"""
    return torch.fx.symbolic_trace(Tagger(gru(IN, H)), {"h": None})(x_of()).shape


@of_layer
def quantize(gru: Any) -> torch.Size:
    """`torch.ao.quantization.quantize_dynamic(model, {nn.GRU, nn.Linear})`"""
    model = Tagger(gru(IN, H))
    return torch.ao.quantization.quantize_dynamic(model, {nn.GRU, nn.Linear})(x_of()).shape


def outcome(function: Callable[[Any], Any], kind: type[nn.Module]) -> str:
    """Return what a user would see: a value, "runs", or the type of an error."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = function(kind)
    except Exception as error:
        return type(error).__name__
    return "runs" if value is None else str(value)


def rows() -> list[Row]:
    """Run every idiom with both classes."""
    return [
        Row(inspect.getdoc(function) or "", outcome(function, kind), outcome(function, DROP_IN[kind]))
        for kind, function in IDIOMS
    ]


def table(found: list[Row]) -> str:
    """Return Markdown: the number of idioms that agree, and a table of the others."""
    differing = [row for row in found if row.torch != row.drop_in]
    lines = [
        f"Of {len(found)} idioms, {len(found) - len(differing)} give the same result with both classes. The others:",
        "",
        "| idiom | `torch.nn` | `mingru.drop_in` |",
        "| --- | --- | --- |",
        *(f"| {row.idiom} | {row.torch} | {row.drop_in} |" for row in differing),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"also write the table to docs/{PAGE.name}")
    args = parser.parse_args(argv)
    printed = table(rows())
    print(printed, end="")
    if args.write:
        before, first, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        _, last, after = rest.partition(MARKS[1])
        PAGE.write_text(f"{before}{first}\n{printed}\n{last}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
