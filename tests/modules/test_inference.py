"""Compare inference passes that run as one operator with calls of the modules one by one."""

import copy
import functools
import gc
import pickle
import random
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import mingru
from mingru.ops import inference
from mingru.ops.cells import TIMED

WHY_NOT = mingru.backends()["native"]
pytestmark = pytest.mark.skipif(WHY_NOT is not True, reason=str(WHY_NOT))


class Calls:
    """Count the passes that run as one operator, or forbid them."""

    def __init__(self, monkeypatch):
        self.count, self.allowed = 0, True
        run = inference.run

        def counted(*args):
            done = run(*args) if self.allowed else None
            self.count += done is not None
            return done

        monkeypatch.setattr(inference, "run", counted)

    @contextmanager
    def forbidden(self):
        self.allowed = False
        try:
            yield
        finally:
            self.allowed = True

    def in_one(self, function, *args, **kwargs):
        """Return the result, and whether one operator computed it."""
        before = self.count
        with torch.no_grad():
            result = function(*args, **kwargs)
        assert self.count - before <= 1
        return result, self.count > before

    def one_by_one(self, function, *args, **kwargs):
        with torch.no_grad(), self.forbidden():
            return function(*args, **kwargs)


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


DROP_IN = (mingru.drop_in.GRU, mingru.drop_in.GRUCell)


def states(result):
    """Return the state in the result of a layer, or of a cell, whose result is the state."""
    return result if isinstance(result, torch.Tensor) else result[1]


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result]
    out, states = result
    return [out, *(states if isinstance(states, list) else [states])]


def assert_same(got, expected, dtype, error=0):
    eps = torch.finfo(dtype).eps
    largest = max(float(each.abs().max()) for each in flat(expected))
    for one, other in zip(flat(got), flat(expected), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=16 * eps, atol=(16 * max(1, largest) + 4 * error) * eps)


def error_in_eps(calls, module, *args):
    """Return the error of a float32 copy whose modules are called one by one, in units of eps."""
    results = []
    for dtype in (torch.float32, torch.float64):
        of_dtype = [arg.to(dtype) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args]
        of_dtype = [[each.to(dtype) for each in arg] if isinstance(arg, list) else arg for arg in of_dtype]
        results.append(flat(calls.one_by_one(copy.deepcopy(module).to(dtype), *of_dtype)))
    errors = [(one - other).abs().max() for one, other in zip(*results, strict=True)]
    return float(max(errors)) / torch.finfo(torch.float32).eps


def random_layer(pick, input_dims, dtype):
    options = {"candidate": pick(["positive", "linear", "tanh"]), "bias": pick([True, False]), "dtype": dtype}
    bounded = functools.partial(mingru.MinGRU, min_decay=0.25)
    kind = pick([mingru.MinGRU, mingru.MinLSTM, functools.partial(mingru.MinLSTM, normalize=False), bounded])
    return kind(
        input_dims,
        pick([1, 5, 16, 33]),
        pick([1, 1, 2, 3]),
        bidirectional=pick([True, False]),
        residual=pick([True, False]),
        norm=pick([None, "rms", "layer"]),
        learn_initial_state=pick([True, False]),
        dropout=0.0,
        **options,
    )


def random_module(pick, dtype):
    kind = pick(["layer", "layer", "stack", "block", "blocks", "cell", "drop_in"])
    dims = pick([1, 4, 7, 32])
    options = {"norm": pick([None, "rms", "layer"]), "dtype": dtype}
    if kind == "cell":
        return pick([mingru.MinGRUCell, mingru.MinLSTMCell])(dims, pick([1, 5, 33]), **options)
    if kind == "drop_in":
        if pick([True, False]):
            return mingru.drop_in.GRUCell(dims, pick([1, 5, 33]), **options)
        options.update(bidirectional=pick([True, False]), batch_first=pick([True, False]), residual=pick([True, False]))
        return mingru.drop_in.GRU(dims, pick([1, 5, 33]), pick([1, 2]), **options)
    if kind == "layer":
        return random_layer(pick, dims, dtype)
    if kind == "stack":
        layers = [random_layer(pick, dims, dtype)]
        layers.append(random_layer(pick, layers[0].output_dims, dtype))
        return mingru.Stack(layers, residual=pick([True, False]))
    blocks = [
        mingru.models.Block(
            dims,
            cell=pick(["mingru", "minlstm"]),
            expansion=pick([1.0, 1.5, 2.0]),
            conv=pick([None, 2, 4]),
            mlp=pick([None, 2]),
            norm=pick(["rms", "layer"]),
            bias=pick([True, False]),
            bidirectional=pick([True, False]),
            dtype=dtype,
        )
        for _ in range(2)
    ]
    return blocks[0] if kind == "block" else mingru.Stack(blocks, residual=pick([True, False]))


def moved_parameters(module):
    """Change each parameter, so that none is 0 or 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@pytest.mark.parametrize("count", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_configurations(calls, count):
    generator = random.Random(count)
    pick = generator.choice
    for _ in range(count):
        dtype = pick([torch.float32, torch.float32, torch.float64])
        module = random_module(pick, dtype)
        moved_parameters(module)
        batch, steps = pick([1, 2, 5]), pick([1, 1, 2, 3, 17])
        leading = (batch,) if module.role == "step" else (batch, steps)
        x = torch.randn(*leading, module.input_dims, dtype=dtype)
        if len(leading) == 2 and pick([True, False]):
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        given = []
        if not isinstance(module, DROP_IN):
            is_timed = all(getattr(each, "cell", "mingru") in TIMED for each in module.modules())
            dt = pick([None, 2 * torch.rand(leading, dtype=dtype)]) if is_timed else None
            reset = pick([None, torch.rand(leading) < 0.3])
            given = [reset, dt] if module.role == "step" else [reset, None, dt]
        h = None
        if pick([True, False]):
            h = states(calls.one_by_one(module, x))
            h = [torch.rand_like(each) for each in h] if isinstance(h, list) else torch.rand_like(h)
        copies = [each.clone() for each in [x, *([] if h is None else h)]]
        result, is_one = calls.in_one(module, x, h, *given)
        assert is_one
        error = error_in_eps(calls, module, x, h, *given)
        assert_same(result, calls.one_by_one(module, x, h, *given), dtype, error)
        for before, after in zip(copies, [x, *([] if h is None else h)], strict=True):
            assert torch.equal(before, after)


def block(**options):
    return mingru.models.Block(8, conv=3, mlp=2, **options)


def layer(**options):
    return mingru.MinGRU(8, 8, 2, norm="rms", residual=True, **options)


def add_hook(module):
    next(each for each in module.modules() if isinstance(each, nn.RMSNorm)).register_forward_hook(
        lambda _, args, out: out + 1
    )


def linear_of(module):
    return module.layers[0].linear if isinstance(module, mingru.MinGRU) else module.rnn.layers[0].linear


def patch_forward(module):
    forward = linear_of(module).forward
    linear_of(module).forward = lambda x: forward(x) + 1


def parametrize_weight(module):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(linear_of(module), "weight", Double())


def replace_linear(module):
    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    owner = module.layers[0] if isinstance(module, mingru.MinGRU) else module.rnn.layers[0]
    owner.linear = Other(8, 16)


def norm_of(module):
    return next(each for each in module.modules() if isinstance(each, nn.RMSNorm))


ONE_BY_ONE = {
    "hook": add_hook,
    "forward of an instance": patch_forward,
    "parametrization": parametrize_weight,
    "subclass of Linear": replace_linear,
}
STILL_IN_ONE = {
    "weight replaced": lambda module: setattr(linear_of(module), "weight", nn.Parameter(torch.randn(16, 8))),
    "weight changed in place": lambda module: linear_of(module).weight.data.mul_(2),
    "data replaced": lambda module: setattr(linear_of(module).weight, "data", torch.randn(16, 8)),
    "bias removed": lambda module: setattr(linear_of(module), "bias", None),
    "eps": lambda module: setattr(norm_of(module), "eps", 0.5),
    "linear map replaced": lambda module: setattr(
        module.layers[0] if isinstance(module, mingru.MinGRU) else module.rnn.layers[0], "linear", nn.Linear(8, 16)
    ),
    "no residual": lambda module: [
        setattr(each, "residual", False) for each in module.modules() if hasattr(each, "align")
    ],
    "load_state_dict": lambda module: module.load_state_dict(type_of(module).state_dict()),
    "load_state_dict, assign": lambda module: module.load_state_dict(type_of(module).state_dict(), assign=True),
}


def type_of(module):
    return layer() if isinstance(module, mingru.MinGRU) else block()


def test_a_compiled_part_is_called():
    stack = mingru.Stack([layer(), layer()])
    assert inference.plan_of(stack).is_open()
    stack.layers[0].compile(backend="eager")
    assert not inference.plan_of(stack).is_open()


@pytest.mark.parametrize("make", [layer, block])
@pytest.mark.parametrize("change", [*ONE_BY_ONE, *STILL_IN_ONE])
def test_changes_are_noticed(calls, make, change):
    module, x = make(), torch.randn(2, 3, 8)
    before, is_one = calls.in_one(module, x)
    assert is_one
    {**ONE_BY_ONE, **STILL_IN_ONE}[change](module)
    result, is_one = calls.in_one(module, x)
    assert is_one == (change in STILL_IN_ONE)
    assert_same(result, calls.one_by_one(module, x), torch.float32)
    if not (change == "no residual" and make is block):
        assert not torch.equal(before[0], result[0])


def test_a_removed_hook_opens_the_way_again(calls):
    module, x = layer(), torch.randn(2, 3, 8)
    handle = linear_of(module).register_forward_pre_hook(lambda *_: None)
    assert not calls.in_one(module, x)[1]
    handle.remove()
    assert calls.in_one(module, x)[1]


def test_dropout(calls):
    module, x = mingru.MinGRU(8, 8, 2, dropout=0.5), torch.randn(2, 3, 8)
    assert not calls.in_one(module, x)[1]
    module.eval()
    assert calls.in_one(module, x)[1]
    module.train()
    assert not calls.in_one(module, x)[1]


@pytest.mark.parametrize(
    "dt",
    [
        -torch.ones(2, 3),
        torch.full((2, 3), float("nan")),
        torch.ones(2, 2),
        torch.ones(6),
        torch.ones(2, 3).double(),
        1.0,
    ],
    ids=["negative", "nan", "shape", "dimensions", "float64", "number"],
)
def test_wrong_elapsed_times_have_the_ordinary_errors(calls, dt):
    for module in (layer(), block(), mingru.Stack([layer(bidirectional=True)])):
        x = torch.randn(2, 3, 8)
        errors = []
        for run in (calls.in_one, calls.one_by_one):
            with pytest.raises((ValueError, TypeError), match="dt must be") as error:
                run(module, x, dt=dt)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]


@pytest.mark.parametrize("make", [functools.partial(layer, gate="signed"), functools.partial(block, gate="signed")])
def test_elapsed_times_of_a_cell_that_has_none(calls, make):
    module, x = make(), torch.randn(2, 3, 8)
    assert calls.in_one(module, x)[1]
    with pytest.raises(ValueError, match="dt must be None because the gate is 'signed'"):
        calls.in_one(module, x, dt=torch.ones(2, 3))
    mixed = mingru.Stack([layer(gate="signed"), layer()])
    with pytest.raises(ValueError, match="dt must be None because the gate is 'signed'"):
        calls.in_one(mixed, x, dt=torch.ones(2, 3))


def test_a_new_bound_is_noticed(calls):
    module, x = mingru.MinGRU(8, 8, min_decay=0.5), torch.randn(2, 3, 8)
    before, is_one = calls.in_one(module, x)
    assert is_one
    module.layers[0].min_decay = 0.9
    result, is_one = calls.in_one(module, x)
    assert is_one
    assert not torch.equal(before[0], result[0])
    assert_same(result, calls.one_by_one(module, x), torch.float32)


def test_a_highway_is_called_one_by_one(calls):
    highway, x = mingru.MinGRU(8, 8, residual="highway"), torch.randn(2, 3, 8)
    for module in (highway, mingru.Stack([highway])):
        result, is_one = calls.in_one(module, x)
        assert not is_one
        assert not inference.plan_of(module).is_open()
        assert_same(result, calls.one_by_one(module, x), torch.float32)


def test_double(calls):
    module, x = block(), torch.randn(2, 3, 8)
    calls.in_one(module, x)
    module.double()
    result, is_one = calls.in_one(module, x.double())
    assert is_one
    assert_same(result, calls.one_by_one(module, x.double()), torch.float64)


class Subclass(mingru.MinGRU):
    def _run(self, *args):
        out, last = super()._run(*args)
        return out + 1, last


def test_subclasses_run_their_own_code(calls):
    module, x = Subclass(8, 8), torch.randn(2, 3, 8)
    result, is_one = calls.in_one(module, x)
    assert not is_one
    assert result[0].min() > 1
    assert not calls.in_one(mingru.Stack([module]), x)[1]


@pytest.mark.parametrize("make", [layer, block])
def test_contexts_in_which_modules_are_called_one_by_one(calls, make):
    module, x = make(), torch.randn(2, 3, 8)

    def inside(context, **arguments):
        with context:
            return calls.in_one(module, x, **arguments)[1]

    assert inside(torch.no_grad())
    assert inside(torch.inference_mode())
    before = calls.count
    module(x)
    assert calls.count == before  # with gradients
    assert not inside(torch.autocast("cpu", torch.bfloat16))
    assert not inside(mingru.use_backend("torch"))
    assert not inside(FlopCounterMode(display=False))
    assert not inside(BaseTorchFunctionMode())
    # A device context changes no operation, except together with another mode.
    for device in ("cpu", "meta"):
        with torch.device(device):
            assert inside(torch.no_grad(), reset=torch.ones(2, 3, dtype=torch.bool, device="cpu"))
            assert not inside(BaseTorchFunctionMode())
    torch.set_default_device("meta")
    try:
        assert inside(torch.no_grad())
    finally:
        torch.set_default_device(None)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not inside(torch.no_grad())
    handle.remove()
    assert inside(torch.no_grad())
    assert not inside(torch.no_grad(), lengths=torch.tensor([3, 2]))
    assert not calls.in_one(torch.func.vmap(lambda x: module(x.unsqueeze(0))[0]), x)[1]
    assert not calls.in_one(module.to(torch.bfloat16), x.bfloat16())[1]


@pytest.mark.parametrize("make", [layer, block])
@pytest.mark.parametrize(
    "arguments",
    [
        lambda x, h: (x.int(),),
        lambda x, h: (x[0],),
        lambda x, h: (x[..., :5],),
        lambda x, h: (x.double(),),
        lambda x, h: (x.to("meta"),),
        lambda x, h: (x, [each[:, :1].expand(-1, 3, *each.shape[2:]) for each in h]),
        lambda x, h: (x, [each[..., :5] for each in h]),
        lambda x, h: (x, [each.double() for each in h]),
        lambda x, h: (x, [each.to("meta") for each in h]),
        lambda x, h: (x, [*h, h[0]]),
        lambda x, h: (x, [None for _ in h]),
        lambda x, h: (x, None, torch.ones(2, 3)),
        lambda x, h: (x, None, torch.ones(2, 4, dtype=torch.bool)),
        lambda x, h: (x, None, torch.ones(2, 3, dtype=torch.bool, device="meta")),
    ],
)
def test_errors_are_those_of_the_modules(calls, make, arguments):
    module, x = make(), torch.randn(2, 3, 8)
    h = calls.one_by_one(module, x)[1]
    args = arguments(x, h if isinstance(h, list) else [h])
    if make is layer and len(args) > 1 and args[1] is not None:
        args = (args[0], args[1][0] if args[1][0] is not None else [None], *args[2:])
        if isinstance(h, torch.Tensor) and args[1] is h:
            return  # a layer has one state
    with pytest.raises((TypeError, ValueError)) as expected:
        calls.one_by_one(module, *args)
    with pytest.raises(type(expected.value)) as found:
        calls.in_one(module, *args)
    assert str(found.value) == str(expected.value)
    assert calls.count == 0


def test_weights_on_another_device(calls):
    module, x = layer(), torch.randn(2, 3, 8)
    calls.in_one(module, x)
    module.layers[1].to("meta")
    with pytest.raises((RuntimeError, ValueError)):
        calls.in_one(module, x)


def cell(**options):
    return mingru.MinGRUCell(8, 8, **options)


def like_torch(**options):
    return mingru.drop_in.GRU(8, 8, **options)


def like_torchs_cell(**options):
    return mingru.drop_in.GRUCell(8, 8, **options)


@pytest.mark.parametrize("make", [cell, like_torchs_cell])
def test_a_cell_has_no_time_dimension(calls, make):
    module, x = make(), torch.randn(2, 8)
    module.batch_first = False
    result, is_one = calls.in_one(module, x)
    assert is_one
    assert_same(result, calls.one_by_one(module, x), torch.float32)


@pytest.mark.parametrize("make", [layer, block, cell, like_torch, like_torchs_cell])
def test_results_are_new_tensors(calls, make):
    module = make()
    x = torch.randn(2, 8) if module.role == "step" else torch.randn(2, 3, 8)
    with torch.no_grad():
        h = states(module(x))
        for tensor in flat(module(x, h)):
            assert not tensor._is_view()
            assert tensor.is_contiguous()
            assert not tensor.requires_grad
    assert calls.count == 2


@pytest.mark.parametrize("make", [layer, block])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_their_own_plan(calls, make, copied):
    module, x = make(), torch.randn(2, 3, 8)
    calls.in_one(module, x)
    other = copied(module)
    moved_parameters(other)
    result, is_one = calls.in_one(other, x)
    assert is_one
    assert_same(result, calls.one_by_one(other, x), torch.float32)
    add_hook(other)
    assert not calls.in_one(other, x)[1]
    assert calls.in_one(module, x)[1]


def test_modules_are_freed():
    module = block()
    with torch.no_grad():
        module(torch.randn(2, 3, 8))
    assert module._plan.is_supported
    found = weakref.ref(module)
    del module
    gc.collect()
    assert found() is None


def test_results_do_not_depend_on_the_number_of_threads(calls):
    module, x = mingru.models.Block(64, conv=4, mlp=2, bidirectional=True), torch.randn(9, 200, 64)
    one, _ = calls.in_one(module, x)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 2)
    try:
        other, _ = calls.in_one(module, x)
    finally:
        torch.set_num_threads(threads)
    assert_same(one, other, torch.float32)


def test_nan_and_infinity_pass_through(calls):
    module, x = block(), torch.randn(1, 9, 8)
    x[0, 4, 0], x[0, 5, 1] = float("nan"), float("inf")
    result, is_one = calls.in_one(module, x)
    assert is_one
    expected = calls.one_by_one(module, x)
    torch.testing.assert_close(flat(result), flat(expected), equal_nan=True)
    assert result[0][0, 4:].isnan().all()
