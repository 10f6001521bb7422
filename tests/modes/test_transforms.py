"""Transforms of torch.func, and the ways of autograd, over the kernels; the truth is the back end "sequential".

That one is plain operations under torch's own autograd, and is called in loops, one sample or one model at a time.
"""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from cases import CASES, HIDDEN, INPUT, Case, assert_equal, every_case, tensors
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import mingru
from mingru.ops import inference, route

BATCH, STEPS = 2, 5
DOUBLE = {"dtype": torch.double}


@pytest.fixture(autouse=True)
def _kernels_run(monkeypatch):
    """Where there are kernels, they have run when a test is over."""
    monkeypatch.delenv("MINGRU_BACKEND", raising=False)
    calls = []

    def counted(function):
        return lambda *args: calls.append(function) or function(*args)

    def run(*args, of_library=inference.run):
        done = of_library(*args)
        calls.extend([] if done is None else [of_library])
        return done

    native = route.BACKENDS["native"]
    counting = {"scan": counted(native.scan)}
    for name in ("kernel", "linear_kernel"):
        kernel = getattr(native, name)
        counting[name] = dataclasses.replace(kernel, forward=counted(kernel.forward))
    monkeypatch.setitem(route.BACKENDS, "native", dataclasses.replace(native, **counting))
    monkeypatch.setattr(inference, "run", run)
    yield
    assert calls or mingru.backends()["native"] is not True


def plainly(function, *args: Any) -> Any:
    with mingru.use_backend("sequential"):
        return function(*args)


def given(case: Case, batch: int = BATCH, steps: int = STEPS) -> tuple[Any, ...]:
    """What the module is called with: x, states and resets."""
    return case.x(batch, steps, **DOUBLE), case.h(batch, **DOUBLE), case.reset(batch, steps)


def batch_dims(case: Case) -> tuple[Any, ...]:
    """Where each of these has its batch."""
    _, of_h = case.dynamic("batch", "steps")
    dims = next(iter(of_h)) if isinstance(of_h, dict) else case.of_states(next(iter(each)) for each in of_h)
    return case.batch_dim, dims, case.batch_dim


def alone(case: Case, call):
    """The call for one sample, whose tensors have no batch."""
    if case.time_dim is None or case.name in ("drop_in.GRU", "drop_in.LSTM"):
        return call
    return lambda *args: call(*pytree.tree_map(torch.unsqueeze, args, batch_dims(case)))


def samples(case: Case, args: tuple[Any, ...], batch: int = BATCH) -> list[Any]:
    dims = batch_dims(case)
    return [pytree.tree_map(lambda tensor, dim: tensor.select(dim, i), args, dims) for i in range(batch)]  # noqa: B023


def stacked(results: list[Any]) -> Any:
    return pytree.tree_map(lambda *parts: torch.stack(parts), *results)


def loss(outputs: Any) -> Tensor:
    return sum(each.square().sum() for each in tensors(outputs))


def leaves(args: Any) -> list[Tensor]:
    return [each for each in tensors(args) if each.is_floating_point()]


def with_gradients(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return pytree.tree_map(lambda each: each.requires_grad_(each.is_floating_point()), args)


def gradients(module: nn.Module, args: tuple[Any, ...], call=None) -> list[Tensor]:
    """Of x, the states and all parameters, by backward()."""
    args = with_gradients(pytree.tree_map(lambda each: each.detach().clone(), args))
    module.zero_grad()
    loss((call or module)(*args)).backward()
    found = [each.grad for each in [*leaves(args), *module.parameters()]]
    assert all(each is not None for each in found)
    return found


def of_weights(module: nn.Module):
    """The module as a function of its parameters too."""
    return lambda weights, *args: functional_call(module, weights, args)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in module.named_parameters()}


@pytest.mark.mode("torch.func.grad")
@every_case
def test_func_grad_is_backward(case):
    module, args = case.make(**DOUBLE), given(case)
    call = of_weights(module)
    found = grad(lambda weights, x, h: loss(call(weights, x, h, *args[2:])), (0, 1, 2))(weights_of(module), *args[:2])
    of_module, *of_inputs = found
    assert_equal([of_inputs, of_module], plainly(gradients, module, args))
    assert_equal([of_inputs, of_module], gradients(module, args))


@pytest.mark.mode("batched gradients (is_grads_batched)")
@every_case
def test_batched_gradients_are_those_one_by_one(case):
    module, args = case.make(**DOUBLE), with_gradients(given(case))
    wanted = [*leaves(args), *module.parameters()]
    outputs = tensors(module(*args))
    grads = [torch.randn(3, *out.shape, **DOUBLE) for out in outputs]
    found = torch.autograd.grad(outputs, wanted, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [
        torch.autograd.grad(outputs, wanted, [each[index] for each in grads], retain_graph=True) for index in range(3)
    ]
    assert_equal(found, stacked(one_by_one))


def every_case_but_group_norm(reason: str):
    """`every_case`, where the group_norm of an older torch fails."""
    fails = pytest.mark.xfail(torch.__version__ < "2.15", strict=True, raises=RuntimeError, reason=reason)
    normalized = ("MinConv1dGRU", "MinConv2dGRU", "MinConv3dGRU")
    cases = [pytest.param(case, id=case.name, marks=fails if case.name in normalized else ()) for case in CASES]
    return pytest.mark.parametrize("case", cases)


def scaled(case: Case):
    """Numbers of a model's outputs, as a function of one factor for each of its inputs; and factors."""
    module, args = case.make(**DOUBLE), given(case, steps=3)

    def function(*factors):
        remaining = iter(factors)
        inputs = pytree.tree_map(lambda each: each * next(remaining) if each.is_floating_point() else each, args)
        return torch.stack([out.sin().sum() for out in tensors(module(*inputs))])

    return function, tuple(torch.randn((), **DOUBLE) for _ in leaves(args))


@pytest.mark.mode("batched gradients (is_grads_batched)")
@every_case
def test_vectorized_jacobian(case):
    function, at = scaled(case)
    jacobian = torch.autograd.functional.jacobian
    assert_equal(jacobian(function, at, vectorize=True), plainly(jacobian, function, at))


@pytest.mark.mode("batched gradients (is_grads_batched)")
@every_case_but_group_norm(
    "With `norm`, the vectorized Hessian of torch.autograd.functional fails before torch 2.15, because under "
    "`is_grads_batched` shapes do not match in the second derivative of torch's group_norm. torch.func.hessian works."
)
def test_vectorized_hessian(case):
    function, at = scaled(case)
    hessian = torch.autograd.functional.hessian
    total = lambda *factors: function(*factors).sum()  # noqa: E731
    assert_equal(hessian(total, at, vectorize=True), plainly(hessian, total, at))


@pytest.mark.mode("vmap over the batch")
@every_case
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


@pytest.mark.mode("vmap over parameters (stack_module_state)")
@every_case
def test_vmap_over_parameters(case):
    made, weights, call = models(case)
    args = given(case)
    found = vmap(call, (0, *[None] * len(args)))(weights, *args)
    assert_equal(found, plainly(lambda: stacked([module(*args) for module in made])))


@pytest.mark.mode("vmap over both")
@every_case
def test_vmap_over_parameters_and_batch(case):
    """Of each model all sequences, and of each model one."""
    made, weights, call = models(case)
    args = given(case, batch=3)

    def over_batch(weights, *args):
        return vmap(alone(case, functools.partial(call, weights)), batch_dims(case))(*args)

    found = vmap(over_batch, (0, *[None] * len(args)))(weights, *args)
    each = samples(case, args, 3)
    truth = plainly(lambda: [[alone(case, module)(*one) for one in each] for module in made])
    assert_equal(found, stacked([stacked(row) for row in truth]))
    at_once = vmap(lambda weights, *args: alone(case, functools.partial(call, weights))(*args), (0, *batch_dims(case)))
    assert_equal(at_once(weights, *args), stacked([truth[index][index] for index in range(3)]))


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_vmap_draws_dropout_as_it_is_told(randomness):
    module, x = mingru.MinGRU(INPUT, HIDDEN, 2, dropout=0.5, **DOUBLE), torch.randn(1, STEPS, INPUT, **DOUBLE)
    lower, upper = (mingru.MinGRU(size, HIDDEN, **DOUBLE) for size in (INPUT, HIDDEN))
    for layer, own in zip((lower, upper), module.layers, strict=True):
        layer.layers[0].load_state_dict(own.state_dict())
    seen = []
    module.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0] != 0))
    out, kept = vmap(lambda x: (module(x)[0], seen[0]), randomness=randomness)(x.expand(3, 1, STEPS, INPUT))
    assert kept.any() and not kept.all()
    assert torch.equal(kept[0], kept[1]) == (randomness == "same")
    # The states are positive, so that a 0 is one that was dropped.
    truth = plainly(lambda: torch.stack([upper(torch.where(each, 2 * lower(x)[0], 0.0))[0] for each in kept]))
    assert_equal(out, truth)


def test_vmap_draws_no_dropout_unless_it_is_told():
    module = mingru.MinGRU(INPUT, HIDDEN, 2, dropout=0.5)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(module)(torch.randn(3, 1, STEPS, INPUT))


def some_directions(*groups: Any) -> tuple[Any, ...]:
    return pytree.tree_map(torch.randn_like, groups)


@pytest.mark.mode("jvp (forward mode)")
@every_case
def test_jvp_of_parameters_inputs_and_states(case):
    module, args = case.make(**DOUBLE), given(case)

    def function(weights, x, h):
        return tuple(tensors(of_weights(module)(weights, x, h, *args[2:])))

    primals = (weights_of(module), *args[:2])
    tangents = some_directions(*primals)
    outputs, found = jvp(function, primals, tangents)
    assert_equal(outputs, plainly(function, *primals))

    def nudged(by):
        return plainly(function, *pytree.tree_map(lambda at, along: at + by * along, primals, tangents))

    step = 1e-6
    truth = [(after - before) / (2 * step) for after, before in zip(nudged(step), nudged(-step), strict=True)]
    assert_equal(found, truth, rtol=1e-6, atol=1e-7)

    cotangents = some_directions(*outputs)
    _, pull = vjp(function, *primals)
    pulled = sum((one * other).sum() for one, other in zip(tensors(pull(cotangents)), tensors(tangents), strict=True))
    pushed = sum((one * other).sum() for one, other in zip(cotangents, found, strict=True))
    assert_equal(pushed, pulled)


@pytest.mark.mode("jvp (forward mode)")
@every_case
def test_dual_numbers(case):
    module, args = case.make(**DOUBLE), given(case)
    primals = (weights_of(module), *args[:2])
    tangents = some_directions(*primals)
    call = of_weights(module)
    _, truth = plainly(jvp, lambda *primals: tuple(tensors(call(*primals, *args[2:]))), primals, tangents)
    with forward_ad.dual_level():
        duals = pytree.tree_map(forward_ad.make_dual, primals, tangents)
        found = [forward_ad.unpack_dual(each).tangent for each in tensors(call(*duals, *args[2:]))]
    assert_equal(found, truth)


def test_forward_mode_over_forward_mode_is_refused():
    module, x = mingru.MinGRU(INPUT, HIDDEN, **DOUBLE), torch.randn(BATCH, STEPS, INPUT, **DOUBLE)
    with pytest.raises(RuntimeError, match="forward mode over forward mode would give wrong results"):
        jacfwd(jacfwd(lambda x: module(x)[0].sum()))(x)


def mixed(case: Case, module: nn.Module, args: tuple[Any, ...], count: int = 3):
    """Some numbers of all outputs, as a function of a few: coordinates along directions of weights, x and states."""
    origin = (weights_of(module), *args[:2])
    axes = [some_directions(*origin) for _ in range(count)]
    sizes = sum(each.numel() for each in tensors(module(*args)))
    into = torch.randn(count, sizes, **DOUBLE) / sizes**0.5

    def function(coordinates):
        at = pytree.tree_map(lambda start, *along: start + sum(map(torch.mul, coordinates, along)), origin, *axes)
        outputs = of_weights(module)(*at, *args[2:])
        return into @ torch.cat([each.flatten() for each in tensors(outputs)]).sin()

    return function, torch.zeros(count, **DOUBLE)


def rows(function, at: Tensor) -> Tensor:
    """The Jacobian, row by row, by plain autograd."""
    at = at.detach().requires_grad_()
    return torch.stack([torch.autograd.grad(each, at, retain_graph=True)[0] for each in function(at)])


def turns(function, at: Tensor) -> Tensor:
    """The Hessian of a number, likewise."""
    at = at.detach().requires_grad_()
    (slope,) = torch.autograd.grad(function(at), at, create_graph=True)
    return torch.stack([torch.autograd.grad(each, at, retain_graph=True)[0] for each in slope])


@pytest.mark.mode("jacrev")
@every_case
def test_jacobians_along_directions(case):
    module, args = case.make(**DOUBLE), given(case, steps=3)
    function, at = mixed(case, module, args)
    truth = plainly(rows, function, at)
    assert_equal(jacrev(function)(at), truth)
    assert_equal(jacfwd(function)(at), truth)


def squared(case: Case):
    """A number of all outputs, and where."""
    function, at = mixed(case, case.make(**DOUBLE), given(case, steps=3))
    return lambda at: function(at).square().sum(), at


@pytest.mark.mode("jacrev")
@every_case
def test_second_derivatives_by_grad(case):
    number, at = squared(case)
    truth = plainly(turns, number, at)
    assert_equal(jacfwd(grad(number))(at), truth)
    assert_equal(jacrev(grad(number))(at), truth)


def every_case_but_layer_norm(reason: str):
    """`every_case`, where torch's own layer_norm gives wrong numbers."""
    wrong = pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)
    marks = {"MinGRU": wrong, "combined model": wrong}
    cases = [pytest.param(case, id=case.name, marks=marks.get(case.name, ())) for case in CASES]
    return pytest.mark.parametrize("case", cases)


@pytest.mark.mode("jacrev")
@every_case_but_layer_norm(
    "jacrev(jacrev(f)) and torch.func.hessian(f) are wrong for torch's own layer_norm, because vmap's rule for the "
    "backward of layer_norm treats mean and standard deviation as constants. jacfwd(grad(f)) is correct: "
    "https://github.com/pytorch/functorch/issues/534"
)
def test_jacobian_of_jacrev(case):
    number, at = squared(case)
    truth = plainly(turns, number, at)
    assert_equal(hessian(number)(at), truth)
    assert_equal(jacrev(jacrev(number))(at), truth)


@pytest.mark.mode("jvp (forward mode)")
@every_case_but_layer_norm(
    "The gradient of layer_norm's forward-mode derivative treats mean and standard deviation as constants: "
    "https://github.com/pytorch/pytorch/issues/196700"
)
def test_gradient_of_forward_mode(case):
    number, at = squared(case)
    along = torch.randn_like(at)
    found = grad(lambda at: jvp(number, (at,), (along,))[1])(at)
    assert_equal(found, plainly(turns, number, at) @ along)


@pytest.mark.mode("jacrev")
@every_case
def test_jacrev_of_inputs_and_parameters(case):
    module, args = case.make(**DOUBLE), given(case, steps=3)
    call, weights = of_weights(module), weights_of(module)

    def few(weights, x, h):
        return torch.stack([each.square().sum() for each in tensors(call(weights, x, h, *args[2:]))])

    found = jacrev(few, (0, 1, 2))(weights, *args[:2])
    fresh = with_gradients(pytree.tree_map(lambda each: each.clone(), (weights, *args[:2])))
    numbers = plainly(few, *fresh)
    each = [
        torch.autograd.grad(number, tensors(fresh), retain_graph=True, materialize_grads=True) for number in numbers
    ]
    assert_equal(found, stacked(each))


@pytest.mark.mode("per-sample gradients")
@every_case
def test_per_sample_gradients(case):
    module, args = case.make(**DOUBLE), given(case, batch=3)
    call = of_weights(module)

    def of_one(weights, *args):
        return loss(alone(case, functools.partial(call, weights))(*args))

    found = vmap(grad(of_one), (None, *batch_dims(case)))(weights_of(module), *args)
    one = alone(case, module)

    def by_hand(args):
        return torch.autograd.grad(loss(one(*args)), list(module.parameters()))

    assert_equal(found, plainly(lambda: stacked([by_hand(each) for each in samples(case, args, 3)])))


@pytest.mark.mode("double backward")
@every_case
def test_second_derivatives(case):
    module, args = case.make(**DOUBLE), given(case, steps=3)
    call = of_weights(module)
    flat, form = pytree.tree_flatten((dict(module.named_parameters()), *args[:2]))
    flat = [each.detach().requires_grad_() for each in flat]

    def function(*flat):
        return tuple(tensors(call(*pytree.tree_unflatten(flat, form), *args[2:])))

    assert torch.autograd.gradgradcheck(function, flat, fast_mode=True)


@pytest.mark.mode("checkpoint, reentrant and not")
@pytest.mark.parametrize("use_reentrant", [False, True])
@every_case
def test_checkpoint(case, use_reentrant):
    module, args = case.make(**DOUBLE), given(case)
    runs = []
    module.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    truth = plainly(gradients, module, args)
    _, form = pytree.tree_flatten(args)

    # Flat, as the reentrant kind sees no tensors inside lists.
    def inside(*flat):
        return tuple(tensors(module(*pytree.tree_unflatten(flat, form))))

    def call(*args):
        return checkpoint(inside, *pytree.tree_leaves(args), use_reentrant=use_reentrant)

    runs.clear()
    assert_equal(gradients(module, args, call), truth)
    assert runs == [not use_reentrant, True]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_drops_the_same_again(use_reentrant):
    module, x = mingru.MinGRU(INPUT, HIDDEN, 2, dropout=0.5, **DOUBLE), torch.randn(BATCH, STEPS, INPUT, **DOUBLE)
    torch.manual_seed(1)
    truth = plainly(gradients, module, (x,))
    torch.manual_seed(1)
    found = gradients(module, (x,), lambda x: checkpoint(module, x, use_reentrant=use_reentrant))
    assert_equal(found, truth)


@pytest.mark.mode("saved-tensor hooks")
@every_case
def test_tensors_packed_by_a_hook(case):
    module, args = case.make(**DOUBLE), given(case)
    truth = plainly(gradients, module, args)
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.tolist(), tensor.shape, tensor.dtype

    def unpack(kept):
        numbers, shape, dtype = kept
        unpacked.append(shape)
        return torch.tensor(numbers, dtype=dtype).view(shape)

    def zeroed(kept):
        return torch.zeros_like(unpack(kept))

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert_equal(gradients(module, args), truth)
    assert packed and len(unpacked) == len(packed)
    # What they saved came from the hook: other numbers give other gradients.
    with torch.autograd.graph.saved_tensors_hooks(pack, zeroed):
        others = gradients(module, args)
    assert not torch.allclose(others[0], truth[0])


anomaly = pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")


@pytest.mark.mode("anomaly mode")
@anomaly
@every_case
def test_anomaly_mode(case):
    module, args = case.make(**DOUBLE), given(case)
    truth = plainly(gradients, module, args)
    with torch.autograd.detect_anomaly():
        assert_equal(gradients(module, args), truth)


@pytest.mark.mode("anomaly mode")
@anomaly
@every_case
def test_anomaly_mode_tells_where_a_nan_is_from(case):
    module, args = case.make(**DOUBLE), with_gradients(given(case))
    with torch.autograd.detect_anomaly():
        x = args[0] + 0
        with torch.no_grad():
            x.view(-1)[0] = torch.nan
        outputs = module(x, *args[1:])
        with (
            pytest.warns(UserWarning, match=r"(?s)Error detected in .*outputs = module\(x.*ops/autograd.py"),
            pytest.raises(RuntimeError, match=r"RecurrenceBackward' returned nan values"),
        ):
            # The first state, or the output of a module that returns no state.
            tensors(outputs)[:2][-1].sum().backward()


@pytest.mark.mode("inference_mode")
@every_case
def test_inference_mode(case):
    module, args = case.make(**DOUBLE), given(case)
    truth = plainly(module, *args)
    with torch.inference_mode():
        outputs = module(*args)
        again = module(*pytree.tree_map(torch.clone, args))
        inside = case.make(**DOUBLE)
        inside.load_state_dict(module.state_dict())
        of_inside = inside(*args)
    for found in (outputs, again, of_inside):
        assert_equal(found, truth)
        assert all(each.is_inference() for each in tensors(found))
    assert not any(each.is_inference() for each in leaves(args))
    # The module learns afterwards as before.
    assert_equal(gradients(module, args), plainly(gradients, module, args))


@pytest.mark.mode("inference_mode")
@every_case
def test_tensors_of_inference_mode_outside(case):
    module = case.make(**DOUBLE)
    with torch.inference_mode():
        args = given(case)
    with torch.no_grad():
        assert_equal(module(*args), plainly(module, *args))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        module(*args)
