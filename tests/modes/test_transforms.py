"""Transforms of torch.func, and the ways of autograd, over the kernels; the truth is the back end "sequential".

That one is plain operations under torch's own autograd, and is called in loops, one sample or one model at a time.
"""

import functools
from typing import Any

import pytest
import torch
from cases import DOUBLE, HIDDEN, INPUT, Case, assert_equal, graded, loss_of, refuses, tensors
from mode import given, mode
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import mingru

BATCH, STEPS = 2, 5
# By plain autograd, twice.
curvature = torch.autograd.functional.hessian


@pytest.fixture(autouse=True)
def _kernels_run():
    """The kernels, or an error that says why they cannot."""
    with mingru.use_backend("native" if mingru.backends()["native"] is True else "auto"):
        yield


def plainly(function, *args: Any) -> Any:
    with mingru.use_backend("sequential"):
        return function(*args)


given = functools.partial(given, batch=BATCH, steps=STEPS, **DOUBLE)


def with_lengths(case: Case, steps: int = STEPS) -> tuple[Any, ...]:
    """The same, with lengths if the module takes them."""
    return *given(case, steps=steps), *([torch.tensor([1, steps])] if "lengths" in case.takes else [])


def batch_dims(case: Case) -> tuple[Any, ...]:
    """Where each of these has its batch."""
    return case.batch_dim, case.of_states(case.state_dims), case.batch_dim


def alone(case: Case, call):
    """The call for one sample, whose tensors have no batch."""
    if case.time_dim is None or case.name in ("drop_in.GRULike", "drop_in.LSTMLike"):
        return call
    return lambda *args: call(*pytree.tree_map(torch.unsqueeze, args, batch_dims(case)))


def samples(case: Case, args: tuple[Any, ...], batch: int = BATCH) -> list[Any]:
    dims = batch_dims(case)
    return [pytree.tree_map(lambda tensor, dim: tensor.select(dim, i), args, dims) for i in range(batch)]  # noqa: B023


def stacked(results: list[Any]) -> Any:
    return pytree.tree_map(lambda *parts: torch.stack(parts), *results)


def leaves(args: Any) -> list[Tensor]:
    return [each for each in tensors(args) if each.is_floating_point()]


def with_gradients(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return pytree.tree_map(lambda each: each.requires_grad_(each.is_floating_point()), args)


def gradients(module: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    """Of all parameters, x and the states."""
    return [each for name, each in graded(module, module, args).items() if name.startswith("gradient")]


def of_weights(module: nn.Module):
    """The module as a function of its parameters too."""
    return lambda weights, *args: functional_call(module, weights, args)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in module.named_parameters()}


@mode("torch.func.grad")
def test_func_grad_is_backward(case):
    module, (x, h, *rest) = case.make(**DOUBLE), with_lengths(case)
    call = of_weights(module)
    found = grad(lambda weights, x, h: loss_of(call(weights, x, h, *rest)), (0, 1, 2))(weights_of(module), x, h)
    assert_equal(found, plainly(gradients, module, (x, h, *rest)))


@mode("batched gradients (is_grads_batched)")
def test_batched_gradients_are_those_one_by_one(case):
    module, args = case.make(**DOUBLE), with_gradients(with_lengths(case))
    wanted = [*leaves(args), *module.parameters()]
    outputs = tensors(module(*args))
    grads = [torch.randn(3, *out.shape, **DOUBLE) for out in outputs]
    found = torch.autograd.grad(outputs, wanted, grads, is_grads_batched=True, retain_graph=True)
    assert not any(each.requires_grad for each in found)
    of_each = [torch.autograd.grad(outputs, wanted, each, retain_graph=True) for each in zip(*grads, strict=True)]
    assert_equal(found, stacked(of_each))


def failing(*names: str, **expected: Any):
    """Marks of the cases that fail by a norm of torch's own."""
    return [(name, pytest.mark.xfail(**{"strict": True, "condition": True, **expected})) for name in names]


CONVOLUTIONS, NORMED = ("MinConv1dGRU", "MinConv2dGRU", "MinConv3dGRU"), ("MinGRU", "combined model")
HESSIAN = "With `norm`, the vectorized Hessian of torch.autograd.functional fails before torch 2.15, in torch's "
HESSIAN += "group_norm. torch.func.hessian works."
JACREV = "jacrev(jacrev(f)) and torch.func.hessian(f) are wrong for torch's layer_norm. jacfwd(grad(f)) is right: "
JACREV += "https://github.com/pytorch/functorch/issues/534"
JVP = "The gradient of layer_norm's forward-mode derivative treats mean and standard deviation as constants: "
JVP += "https://github.com/pytorch/pytorch/issues/196700"
BEFORE = {"reason": HESSIAN, "condition": torch.__version__ < "2.15", "raises": RuntimeError}


@mode("batched gradients (is_grads_batched)", marks=failing(*CONVOLUTIONS, **BEFORE))
def test_vectorized_hessian(case):
    """Of one factor for each input."""
    module, args = case.make(**DOUBLE), with_lengths(case, steps=3)

    def function(*factors):
        remaining = iter(factors)
        inputs = pytree.tree_map(lambda each: each * next(remaining) if each.is_floating_point() else each, args)
        return sum(out.sin().sum() for out in tensors(module(*inputs)))

    at = tuple(torch.randn((), **DOUBLE) for _ in leaves(args))
    assert_equal(curvature(function, at, vectorize=True), plainly(curvature, function, at))


@mode("vmap over the batch")
def test_vmap_over_the_batch(case):
    module, args = case.make(**DOUBLE), given(case, batch=3)
    one = alone(case, module)
    truth = plainly(lambda: stacked([one(*each) for each in samples(case, args, 3)]))
    assert_equal(vmap(one, batch_dims(case))(*args), truth)
    # Over the last dimension, and x alone.
    moved = pytree.tree_map(lambda each, dim: each.movedim(dim, -1), args, batch_dims(case))
    assert_equal(vmap(one, -1, -1)(*moved), pytree.tree_map(lambda each: each.movedim(0, -1), truth))
    at = case.batch_dim
    found = vmap(lambda one: module(one.unsqueeze(at)), at)(args[0])
    assert_equal(found, plainly(lambda: stacked([module(one) for one in args[0].split(1, at)])))


def models(case: Case, count: int = 3):
    """Some models, their weights, stacked, and a function of one's weights, by a model that has no numbers at all."""
    made = [case.make(**DOUBLE) for _ in range(count)]
    weights, _ = stack_module_state(made)
    return made, weights, of_weights(case.make(device="meta", **DOUBLE))


@mode("vmap over parameters (stack_module_state)")
def test_vmap_over_parameters(case):
    made, weights, call = models(case)
    args = given(case)
    found = vmap(call, (0, *[None] * len(args)))(weights, *args)
    assert_equal(found, plainly(lambda: stacked([module(*args) for module in made])))


@mode("vmap over both")
def test_vmap_over_parameters_and_batch(case):
    """Of each model all sequences, and of each model one."""
    made, weights, call = models(case)
    args = given(case, batch=3)

    def one(weights, *args):
        return alone(case, functools.partial(call, weights))(*args)

    each = samples(case, args, 3)
    truth = plainly(lambda: [[alone(case, module)(*one) for one in each] for module in made])
    over_batch = vmap(one, (None, *batch_dims(case)))
    found = vmap(over_batch, (0, *[None] * len(args)))(weights, *args)
    assert_equal(found, stacked([stacked(row) for row in truth]))
    at_once = vmap(one, (0, *batch_dims(case)))
    assert_equal(at_once(weights, *args), stacked([truth[index][index] for index in range(3)]))


def test_vmap_draws_dropout_as_it_is_told():
    module, x = mingru.MinGRU(INPUT, HIDDEN, 2, dropout=0.5), torch.randn(1, STEPS, INPUT).expand(3, 1, -1, -1)
    for randomness in ("different", "same"):
        out = vmap(lambda x: module(x)[0], randomness=randomness)(x)
        assert torch.equal(out[0], out[1]) == (randomness == "same")
        assert not torch.allclose(out, module.eval()(x[0])[0])
        module.train()
    refuses(RuntimeError, "randomness", vmap(module), x)


def some_directions(*groups: Any) -> tuple[Any, ...]:
    return pytree.tree_map(torch.randn_like, groups)


@mode("jvp (forward mode)")
def test_jvp_of_parameters_inputs_and_states(case):
    module, args = case.make(**DOUBLE), with_lengths(case)

    def function(weights, x, h):
        return tuple(tensors(of_weights(module)(weights, x, h, *args[2:])))

    primals = (weights_of(module), *args[:2])
    tangents = some_directions(*primals)
    truth = plainly(jvp, function, primals, tangents)
    assert_equal(jvp(function, primals, tangents), truth)
    with forward_ad.dual_level():
        duals = pytree.tree_map(forward_ad.make_dual, primals, tangents)
        found = [forward_ad.unpack_dual(each).tangent for each in function(*duals)]
    assert_equal(found, truth[1])


def squared(case: Case):
    """A number, and where: the square of some numbers of all outputs, by coordinates of weights, x and states."""
    module, args = case.make(**DOUBLE), with_lengths(case, steps=3)
    origin = (weights_of(module), *args[:2])
    axes = [some_directions(*origin) for _ in range(3)]
    size = sum(each.numel() for each in tensors(module(*args)))
    into = torch.randn(3, size, **DOUBLE) / size**0.5

    def function(coordinates):
        at = pytree.tree_map(lambda start, *along: start + sum(map(torch.mul, coordinates, along)), origin, *axes)
        outputs = of_weights(module)(*at, *args[2:])
        return into @ torch.cat([each.flatten() for each in tensors(outputs)]).sin()

    return function, lambda at: function(at).square().sum(), torch.zeros(3, **DOUBLE)


@mode("jacrev")
def test_jacobians_and_second_derivatives(case):
    function, number, at = squared(case)
    truth = plainly(torch.autograd.functional.jacobian, function, at)
    assert_equal([jacrev(function)(at), jacfwd(function)(at)], [truth, truth])
    truth = plainly(curvature, number, at)
    assert_equal([jacfwd(grad(number))(at), jacrev(grad(number))(at)], [truth, truth])


@mode("jacrev", marks=failing(*NORMED, reason=JACREV, raises=AssertionError))
def test_jacobian_of_jacrev(case):
    _, number, at = squared(case)
    truth = plainly(curvature, number, at)
    assert_equal([hessian(number)(at), jacrev(jacrev(number))(at)], [truth, truth])


@mode("jvp (forward mode)", marks=failing(*NORMED, reason=JVP, raises=AssertionError))
def test_gradient_of_forward_mode(case):
    _, number, at = squared(case)
    along = torch.randn_like(at)
    found = grad(lambda at: jvp(number, (at,), (along,))[1])(at)
    assert_equal(found, plainly(curvature, number, at) @ along)


@mode("per-sample gradients")
def test_per_sample_gradients(case):
    module, args = case.make(**DOUBLE), given(case, batch=3)
    call, one = of_weights(module), alone(case, module)

    def of_one(weights, *args):
        return loss_of(alone(case, functools.partial(call, weights))(*args))

    found = vmap(grad(of_one), (None, *batch_dims(case)))(weights_of(module), *args)
    by_hand = lambda args: torch.autograd.grad(loss_of(one(*args)), list(module.parameters()))  # noqa: E731
    assert_equal(found, plainly(lambda: stacked([by_hand(each) for each in samples(case, args, 3)])))


@mode("double backward")
def test_second_derivatives(case):
    _, number, at = squared(case)
    assert_equal(curvature(number, at), plainly(curvature, number, at))


@mode("checkpoint, reentrant and not")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(case, use_reentrant):
    module, args = case.make(**DOUBLE), given(case)
    truth, runs, form = plainly(gradients, module, args), [], pytree.tree_structure(args)
    module.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))

    # Flat, as the reentrant kind sees no tensors inside lists.
    def inside(*flat):
        return tuple(tensors(module(*pytree.tree_unflatten(flat, form))))

    call = lambda *args: checkpoint(inside, *pytree.tree_leaves(args), use_reentrant=use_reentrant)  # noqa: E731
    args = with_gradients(args)
    module.zero_grad()
    loss_of(call(*args)).backward()
    assert_equal([each.grad for each in [*module.parameters(), *leaves(args)]], truth)
    assert runs == [not use_reentrant, True]


@mode("saved-tensor hooks")
def test_tensors_packed_by_a_hook(case):
    module, args = case.make(**DOUBLE), given(case)
    truth = plainly(gradients, module, args)

    def pack(tensor):
        return tensor.tolist(), tensor.shape, tensor.dtype

    def unpack(kept):
        numbers, shape, dtype = kept
        return torch.tensor(numbers, dtype=dtype).view(shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert_equal(gradients(module, args), truth)
    # What they saved came from the hook: other numbers give other gradients.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: torch.zeros_like(unpack(kept))):
        assert not torch.allclose(gradients(module, args)[0], truth[0])


@mode("anomaly mode")
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_anomaly_mode_tells_where_a_nan_is_from(case):
    module, args = case.make(**DOUBLE), with_gradients(given(case))
    with torch.autograd.detect_anomaly():
        assert_equal(gradients(module, args), plainly(gradients, module, args))
        x = args[0] + 0
        with torch.no_grad():
            x.view(-1)[0] = torch.nan
        outputs = module(x, *args[1:])
        with (
            pytest.warns(UserWarning, match=r"(?s)Error detected in .*= module\(x.*(ops/autograd|modules/plan)\.py"),
            pytest.raises(RuntimeError, match=r"RecurrenceBackward' returned nan values"),
        ):
            # The first state, or the output of a module that returns no state.
            tensors(outputs)[:2][-1].sum().backward()


@mode("inference_mode")
def test_inference_mode(case):
    module, args = case.make(**DOUBLE), given(case)
    truth = plainly(module, *args)
    with torch.inference_mode():
        inside, copies = case.make(**DOUBLE), pytree.tree_map(torch.clone, args)
        inside.load_state_dict(module.state_dict())
        for found in (module(*args), module(*copies), inside(*args)):
            assert_equal(found, truth)
            assert all(each.is_inference() for each in tensors(found))
    # Outside, tensors of inference mode have no gradients, and the module learns as before.
    with torch.no_grad():
        assert_equal(module(*copies), truth)
    refuses(RuntimeError, "Inference tensors cannot be saved for backward", module, *copies)
    assert_equal(gradients(module, args), plainly(gradients, module, args))
