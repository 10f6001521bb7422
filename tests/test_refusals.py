"""Wrong calls, and what they are told.

Every wrong kind of every argument is made here, from tables of what messages say. Hints for single mistakes are in the
doctest data/refusals.txt.
"""

import doctest
import inspect
import math
import re
from functools import partial

import pytest
import torch

import mingru
from mingru import drop_in, functional
from mingru.models import Block, LanguageModel

with_and_without_grad = pytest.mark.parametrize("grad", [True, False])


class Parser(doctest.DocTestParser):
    """Takes the last line of a traceback alone."""

    _EXCEPTION_RE = re.compile(r"(?:Traceback .*\n)?(?P<msg>\w+(?:Error|Warning): .*)")


@with_and_without_grad
def test_refusals(grad):
    """Other code runs without gradients."""
    with torch.set_grad_enabled(grad):
        failed, tried = doctest.testfile("data/refusals.txt", optionflags=doctest.ELLIPSIS, parser=Parser())
    assert failed == 0 and tried > 400


# Tensors: the letters of each argument, as in messages. The first argument is x, and h[1] is a state in a list.

SIZES = {"B": 2, "S": 5, "P": 7, "H": 4, "L": 2, "D": 1, "K": 2, "C": 3, "space": (6,), "rest": (3,)}
STEPS = {"reset": "(B, S)", "dt": "(B, S)"}
LENGTHS = {"lengths": "(B,)"}
H = "expandable to (L * D, B, 1, H)"
LAYER = {"x": "(B, S, 3)", "h": H, **STEPS, **LENGTHS}
CELL = {"x": "(B, 3)", "h": "(B, H)", "reset": "(B,)", "dt": "(B,)"}
IMAGES = {"x": "(B, S, 3, *space)", "h[0]": "expandable to (B, 1, H, *space)", "reset": "(B, S)"}
IMAGE = {"x": "(B, 3, *space)", "h": "expandable to (B, H, *space)", "reset": "(B,)"}
OF_BLOCK = {"h[0]": "(D, B, 1, H)", "h[1]": "(1, B, K, C)"}
OF_MODEL = {"state[0]": "(D, B, 1, H)", "state[1]": "(1, B, K, C)", "reset": "(B, S)"}
STATES = {"h": "expandable to (B, 1, *)", "initial_state": "expandable to (B, 1, *)", **STEPS}
A = "(B, S, *)"


def swapped(forms):
    return {name: text.replace("B, S", "S, B") for name, text in forms.items()}


def without(name, forms):
    return {key: text for key, text in forms.items() if key != name}


# By the name in messages and what else tells two apart: what is called, and the letters.
CALLS = {
    "mingru": (functional.mingru, {"gate": A, "candidate": A, **STATES}),
    "minlstm": (functional.minlstm, {"forget": A, "input": A, "candidate": A, **STATES}),
    "linear_scan": (functional.linear_scan, {"a": A, "b": A, "h": STATES["h"], "reset": "(B, S)", **LENGTHS}),
    "parallel_scan_log": (functional.parallel_scan_log, {"log_a": A, "log_b": "(B, S + 1, *)"}),
    "elapsed_times": (partial(functional.elapsed_times, first=1.0), {"t": "(B, S)", "reset": "(B, S)", **LENGTHS}),
    "MinGRU": (mingru.MinGRU(3, 4, 2), LAYER),
    "MinGRU with the time first": (mingru.MinGRU(3, 4, 2, batch_first=False), swapped(LAYER)),
    "MinLSTM": (mingru.MinLSTM(3, 4, 2), LAYER),
    "BlockGRU": (mingru.BlockGRU(3, 4, 2), without("dt", LAYER)),
    "MinGRUCell": (mingru.MinGRUCell(3, 4), CELL),
    "MinGRUCell without a batch": (
        mingru.MinGRUCell(3, 4),
        {"x": "(3,)", "h": "(H,)", "reset": "a scalar", "dt": "a scalar"},
    ),
    "MinLSTMCell": (mingru.MinLSTMCell(3, 4), CELL),
    "BlockGRUCell": (mingru.BlockGRUCell(3, 4), without("dt", CELL)),
    "MinConv1dGRU": (mingru.MinConv1dGRU(3, 4, 1), IMAGES),
    "MinConv1dGRU with the time first": (mingru.MinConv1dGRU(3, 4, 1, batch_first=False), swapped(IMAGES)),
    "MinConv1dGRUCell": (mingru.MinConv1dGRUCell(3, 4, 1), IMAGE),
    "Block": (Block(3, expansion=4 / 3, conv=3), {"x": "(B, S, 3)", **OF_BLOCK, **STEPS, **LENGTHS}),
    "LanguageModel": (LanguageModel(9, 3, 1, expansion=4 / 3, conv=3), {"ids": "(B, S)", **OF_MODEL, **LENGTHS}),
    "mingru.drop_in.GRU": (
        drop_in.GRU(3, 4, 2),
        swapped({"input": "(B, S, 3)", "hx": "(L * D, B, H)", **STEPS, **LENGTHS, "mask": "(B, S)"}),
    ),
    "mingru.drop_in.GRUCell": (drop_in.GRUCell(3, 4), {"input": "(B, 3)", "reset": "(B,)", "dt": "(B,)"}),
}
CPU = "to('cpu')"
NO_LISTS = ((torch.zeros(2), "Tensor"), ({0: torch.zeros(2)}, "dict"), (0.5, "float"))
NUMBERS = ("a tensor", torch.float32, "torch.float32 like {}", "to(torch.float32)")
KINDS = {
    **dict.fromkeys(["reset", "mask"], ("a bool tensor", torch.bool, "of dtype torch.bool", "bool()")),
    "lengths": ("an integer tensor", torch.int64, "of an integer dtype", "long()"),
    "ids": ("an integer tensor (B, S)", torch.int64, "int64 or int32", "long()"),
    **dict.fromkeys(["gate", "forget", "a", "log_a"], (*NUMBERS[:2], "of a floating-point dtype", "float()")),
}


def right(argument, letters):
    text = letters.removeprefix("expandable to ").replace("*)", "*rest)")
    shape = () if text == "a scalar" else eval(text, SIZES)
    return torch.ones(shape, dtype=KINDS.get(argument, NUMBERS)[1])


def wrong(argument, letters, value, first):
    """Return wrong values of an argument, what each must be, what came, and the remedy if there is one."""
    noun, dtype, of_dtype, method = KINDS.get(argument, NUMBERS)
    is_first, of_model, is_length = argument == first, first == "ids", argument == "lengths"
    like = "the layer's weight" if is_first else "the weights" if of_model else first
    found = [(0.5, noun, "float", "use torch.as_tensor"), (None, noun, "NoneType", "")][: 1 + (argument == "x")]
    if argument != "t":
        other = value.double() if dtype == torch.float32 and "floating" not in of_dtype else value.float()
        other = value.long() if other is value else other
        found.append((other, of_dtype.format(like), str(other.dtype), f"use {argument}.{method}"))
    if argument not in ("t", "gate", "forget", "a", "log_a"):
        where = f"{'on the CPU or ' * is_length}on cpu like {'the weights' if of_model else like}"
        remedy = f"use {argument}.{'cpu()' if is_length else CPU}"
        found.append((value.to("meta"), where, "a tensor on meta", remedy))
    shapes = [value.unsqueeze(-1), *(torch.cat([value, value], dim) for dim in range(value.dim()))]
    shapes += [value.squeeze(dim) for dim in range(value.dim()) if value.shape[dim] == 1]
    expected = f"{letters} = {tuple(value.shape)}"
    if is_first:
        at = re.sub(r"[(),]", " ", letters).split().index("3") if "3" in letters else None
        shapes = [value.flatten()[:2]] if at is None else [value.unsqueeze(-1), value.narrow(at, 0, 2)]
        expected = letters
    found += [(each, expected, str(tuple(each.shape)), None) for each in shapes]
    if argument == "reset":
        nested, got = torch.nested.nested_tensor([value.float().flatten()]), "a tensor with the layout torch.sparse_coo"
        found.append((value.to_sparse(), "a tensor", got, "use reset.to_dense()"))
        found.append((nested, "a tensor", "a nested tensor", "use torch.nested.to_padded_tensor, and lengths="))
    if argument == "dt":
        found += [(value * time, "at least 0", str(float(time)), "") for time in (-3, math.nan)]
    if argument == "lengths":
        found += [(value * time, "from 0 to S = 5", str([time] * 2), "") for time in (-1, 6)]
    return found


def refusal(call, **given):
    with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError)) as caught:
        call(**given)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@with_and_without_grad
@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_tensor(name, grad):
    call, forms = CALLS[name]
    values = {argument: right(argument, letters) for argument, letters in forms.items()}
    first, states = next(iter(forms)), [argument for argument in forms if argument.endswith("]")]

    def outcome(**changed):
        arguments = {"mask": None, **values, **changed} if "mask" in changed else without("mask", {**values, **changed})
        listed = {states[0][:-3]: [arguments.pop(state) for state in states]} if states else {}
        return call(**arguments, **listed)

    with torch.set_grad_enabled(grad):
        expected = outcome()
        for argument, letters in forms.items():
            for other, must_be, got, remedy in wrong(argument, letters, values[argument], first):
                more = {"lengths": None} if argument == "mask" else {}
                told = refusal(outcome, **more, **{argument: other})
                end = "(; .+)?" if remedy is None else f"; .*{re.escape(remedy)}.*" if remedy else ""
                text = rf"{name.split()[0]}: {re.escape(argument)} must be (\(B, 3\) or )?{re.escape(must_be)}"
                assert re.fullmatch(rf"{text}.*, got {re.escape(got)}{end}", told), (told, argument, must_be, got)
        torch.testing.assert_close(outcome(), expected, rtol=0, atol=0)
        listed = [values[state] for state in states]
        for other, got in ((listed[:-1], len(listed) - 1), (listed * 2, 2 * len(listed)), *NO_LISTS) if states else ():
            given = {argument: value for argument, value in values.items() if argument not in states}
            told = refusal(call, **given, **{states[0][:-3]: other})
            text = rf"{name.split()[0]}: {states[0][:-3]} must be a list of {len(listed)} (tensors|states)"
            assert re.fullmatch(f"{text}.*, got {got}", told), told


# Options: what they must be, and values of wrong types and wrong values.

NAMES = "options input_dims hidden_dims num_layers block_size dims vocab_size"
GATES = "one of ('sigmoid', 'signed', 'rotation', 'quaternion', 'mixed')"
OPTIONS = {
    **dict.fromkeys(NAMES.split(), ("an int|at least 1", [3.0, "2", True, None], [0, -1])),
    "conv": ("an int or None|at least 2", [3.0, True], [1]),
    "kernel_size": ("an int|at least 1", [3.0, None, "same"], [0]),
    "dropout": ("a number from 0 to 1", ["0.5", True], [1.5, -0.1, math.nan]),
    "min_decay": (r"a number from 0 to 1 \(exclusive\)", [None, "0.1", True], [1.0, -0.1, math.nan]),
    "memory": ("a number above 1, a pair of two such numbers, or None", ["long", True, (2,), [2, 3, 4]], [1, math.inf]),
    "expansion": (r"a finite number with expansion \* dims >= 1", [True, "1"], [0, -1.0, math.nan, 1e308, 0.05]),
    "mlp": (r"a finite number with mlp \* dims >= 1", [True], [0]),
    "forget_bias": ("a number", ["1"], []),
    "dtype": ("a floating-point dtype", [torch.int64, torch.cfloat, "float32"], []),
    "norm": (r"one of (None, |\('(layer|group)').*", [], ["batch", True, ["rms"]]),
    "candidate": (r"one of \('positive', 'linear', 'tanh'(, None)?\)", [], ["relu", 1]),
    "gate": (re.escape(GATES), [], ["tanh", None, 1]),
    "cell": (r"one of \('mingru', 'minlstm', 'blockgru'\)", [], ["gru", ["mingru"]]),
    "temperature": ("a number, at least 0", [True, None], [-0.1, math.nan, math.inf]),
    "top_k": ("an int or None|at least 1", [2.0, True], [0]),
    "top_p": ("a number above 0 and at most 1", [True], [0.0, 1.01, math.nan]),
    "min_p": ("a number from 0 to 1", ["0.1"], [-0.1, 1.1]),
    "max_new_tokens": ("an int|at least 0", [5.0, True], [-1]),
}
LM = LanguageModel(9, 3, 1)
LAYERS = mingru.MinGRU, mingru.MinLSTM, mingru.BlockGRU, mingru.MinGRUCell, mingru.MinLSTMCell, mingru.BlockGRUCell
OF_IMAGES = mingru.MinConv2dGRU, mingru.MinConv2dGRUCell
CONSTRUCTORS = [
    *(partial(kind, input_dims=3, hidden_dims=4) for kind in LAYERS),
    *(partial(kind, input_dims=4, hidden_dims=4, kernel_size=1) for kind in OF_IMAGES),
    partial(mingru.Stack, layers=[mingru.MinGRU(3, 4)]),
    partial(Block, dims=4),
    partial(LanguageModel, vocab_size=9, dims=4, num_layers=2),
    partial(LM.generate, prompts=torch.zeros(2, 3, dtype=torch.int64), max_new_tokens=3),
]


@pytest.mark.parametrize("call", CONSTRUCTORS, ids=lambda call: call.func.__name__)
def test_a_wrong_option(call):
    name = "LanguageModel" if call.func.__name__ == "generate" else call.func.__name__
    known = inspect.signature(call.func).parameters
    tried = [option for option in OPTIONS if option in known]
    assert len(tried) > 0
    for option in tried:
        expected, types, values = OPTIONS[option]
        for error, wrong_ones in ((TypeError, types), (ValueError, values)):
            for value in wrong_ones:
                with pytest.raises(error, match=rf"^{name}: {option} must be ({expected}).*, got .+$") as caught:
                    call(**{option: value})
                assert repr(value) in str(caught.value)
