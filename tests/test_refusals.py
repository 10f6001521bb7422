"""Wrong calls, and what they are told.

Every wrong kind of every argument is made here, from tables of what messages say. Hints for single mistakes are in the
doctest data/refusals.txt.
"""

import doctest
import inspect
import math
import re
from functools import partial
from pathlib import Path

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

SIZES = {"B": 2, "S": 5, "H": 4, "L": 2, "D": 1, "K": 2, "C": 3, "space": (6,), "rest": (3,)}
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
OF_GRU = {**dict.fromkeys(["reset_gate", "update_gate", "candidate"], "(B, S, H)"), "bias": "(H,)", "reset": "(B, S)"}
OF_GRU |= dict.fromkeys(["h", "initial_state"], "expandable to (B, 1, H)")


def swapped(forms):
    return {name: text.replace("B, S", "S, B") for name, text in forms.items()}


def without(name, forms):
    return {key: text for key, text in forms.items() if key != name}


ALONE = {"x": "(3,)", "h": "(H,)", "reset": "a scalar", "dt": "a scalar"}
CELL_OF_TORCH = {"input": "(B, 3)", "reset": "(B,)", "dt": "(B,)"}
OF_TORCH = {"input": "(B, S, 3)", "hx": "(L * D, B, H)", **STEPS, **LENGTHS}
# By the name in messages and what else tells two apart: what is called, and the letters.
CALLS = {
    "mingru": (functional.mingru, {"gate": A, "candidate": A, **STATES}),
    "minlstm": (functional.minlstm, {"forget": A, "input": A, "candidate": A, **STATES}),
    "gru": (partial(functional.gru, weight=torch.ones(12, 4)), OF_GRU),
    "linear_scan": (functional.linear_scan, {"a": A, "b": A, "h": STATES["h"], "reset": "(B, S)", **LENGTHS}),
    "parallel_scan_log": (functional.parallel_scan_log, {"log_a": A, "log_b": "(B, S + 1, *)"}),
    "elapsed_times": (partial(functional.elapsed_times, first=1.0), {"t": "(B, S)", "reset": "(B, S)", **LENGTHS}),
    "MinGRU": (mingru.MinGRU(3, 4, 2), LAYER),
    "MinGRU with the time first": (mingru.MinGRU(3, 4, 2, batch_first=False), swapped(LAYER)),
    "MinLSTM": (mingru.MinLSTM(3, 4, 2), LAYER),
    "mingru.GRU": (mingru.GRU(3, 4, 2), without("dt", LAYER)),
    "MinGRUCell": (mingru.MinGRUCell(3, 4), CELL),
    "MinGRUCell without a batch": (mingru.MinGRUCell(3, 4), ALONE),
    "MinLSTMCell": (mingru.MinLSTMCell(3, 4), CELL),
    "mingru.GRUCell": (mingru.GRUCell(3, 4), without("dt", CELL)),
    "MinConv1dGRU": (mingru.MinConv1dGRU(3, 4, 1), IMAGES),
    "MinConv1dGRU with the time first": (mingru.MinConv1dGRU(3, 4, 1, batch_first=False), swapped(IMAGES)),
    "MinConv1dGRUCell": (mingru.MinConv1dGRUCell(3, 4, 1), IMAGE),
    "Block": (Block(3, expansion=4 / 3, conv=3), {"x": "(B, S, 3)", **OF_BLOCK, **STEPS, **LENGTHS}),
    "LanguageModel": (LanguageModel(9, 3, 1, expansion=4 / 3, conv=3), {"ids": "(B, S)", **OF_MODEL, **LENGTHS}),
    "mingru.drop_in.GRULike": (drop_in.GRULike(3, 4, 2, cell="mingru"), swapped(OF_TORCH)),
    "mingru.drop_in.GRULikeCell": (drop_in.GRULikeCell(3, 4, cell="mingru"), CELL_OF_TORCH),
}
NUMBERS = ("a tensor", torch.float32, "torch.float32 like {}", "to(torch.float32)")
KINDS = {
    "reset": ("a bool tensor", torch.bool, "of dtype torch.bool", "bool()"),
    "lengths": ("an integer tensor", torch.int64, "of a signed integer dtype or uint8", "long()"),
    "ids": ("an integer tensor (B, S)", torch.int64, "int64 or int32", "long()"),
    **dict.fromkeys("gate reset_gate forget a log_a".split(), (*NUMBERS[:2], "of a floating-point dtype", "float()")),
}


def right(argument, letters):
    text = letters.removeprefix("expandable to ").replace("*)", "*rest)")
    shape = () if text == "a scalar" else eval(text, SIZES)
    return torch.ones(shape, dtype=KINDS.get(argument, NUMBERS)[1])


def wrong(argument, letters, value, first):
    """Return errors, wrong values of an argument, what each must be, what came, and the remedy if it is always one."""
    noun, dtype, of_dtype, method = KINDS.get(argument, NUMBERS)
    is_first, is_length, weights = argument == first, argument == "lengths", "the weights" if first == "ids" else first
    found = [(TypeError, 0.5, noun, "float", "use torch.as_tensor"), (TypeError, {}, noun, "dict", "")]
    found += [(TypeError, None, noun, "NoneType", "")] if argument == "x" else []
    if argument != "t":
        other = value.double() if of_dtype == NUMBERS[2] else value.long() if dtype == torch.float32 else value.float()
        must_be = of_dtype.format("the layer's weight" if is_first else weights)
        quantized = torch.quantize_per_tensor(value.float(), 0.5, 0, torch.quint8)
        found.append((TypeError, quantized, must_be, "torch.quint8", f"use {argument}.dequantize().{method}"))
        found.append((TypeError, other, must_be, str(other.dtype), f"use {argument}.{method}"))
    if argument != "t" and not (is_first and "floating" in of_dtype):
        like = "the layer's weight" if is_first and first != "ids" else weights
        where = "on the CPU or on cpu" if is_length else "on cpu"
        remedy = f"create {argument} there, because a tensor on"
        found.append((ValueError, value.to("meta"), f"{where} like {like}", "a tensor on meta", remedy))
    shapes = [value.unsqueeze(-1), *(torch.cat([value, value], dim) for dim in range(value.dim()))]
    if is_first:
        at = re.sub(r"[(),]", " ", letters).split().index("3") if "3" in letters else None
        shapes = [value.flatten()[:2]] if at is None else [value.unsqueeze(-1), value.narrow(at, 0, 2)]
    must_be = letters if is_first else f"{letters} = {tuple(value.shape)}"
    found += [(ValueError, each, must_be, str(tuple(each.shape)), None) for each in shapes]
    for dim in [dim for dim in range(value.dim()) if value.shape[dim] == 1 and not is_first]:
        remedy = f"{argument}.unsqueeze({dim})" if letters[:2] not in ("(D", "(1") else "pass a state of this batch"
        found.append((ValueError, value.squeeze(dim), must_be, str(tuple(value.squeeze(dim).shape)), remedy))
    if argument == "reset":
        nested, sparse = torch.nested.nested_tensor([value.float().flatten()]), value.to_sparse()
        found.append((TypeError, nested, "a tensor", "a nested tensor", "use torch.nested.to_padded_tensor"))
        got = f"a tensor with the layout {sparse.layout}"
        found.append((TypeError, sparse, "a tensor", got, "use reset.to_dense()"))
    values = {"dt": ("at least 0", (-3.0, math.nan)), "lengths": ("from 0 to S = 5", (-1, 6))}
    must_be, factors = values.get(argument, ("", ()))
    return found + [(ValueError, value * each, must_be, str(each), "") for each in factors]


# What a remedy says to pass in place of an argument.
REMEDY = re.compile(r"; use ((\w+)(?:\[(\d)\])?\.\w+\(.*?\))(?: for .*|, .*)?$")


def remedied(message, argument, value):
    """Return the arguments after what a message says to do, or {} if it says it in other words."""
    found = REMEDY.search(message)
    if found is None or found[2] != argument.partition("[")[0]:
        return {}
    return {argument: eval(found[1], {"torch": torch, found[2]: [value, value] if found[3] else value})}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.* are deprecated")
@with_and_without_grad
@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_tensor(name, grad):
    call, forms = CALLS[name]
    values = {argument: right(argument, letters) for argument, letters in forms.items()}
    first, states = next(iter(forms)), [argument for argument in forms if argument.endswith("]")]
    listed, cases = [values[state] for state in states], []
    if isinstance(call, torch.nn.Module):
        taken = inspect.signature(call.forward).parameters.keys()
        assert taken - {each[:-3] for each in states} - forms.keys() <= {"dt", "hx"}
    for argument, letters in forms.items():
        cases += [(argument, *case) for case in wrong(argument, letters, values[argument], first)]
    no_lists = ((ValueError, listed * 2, 2 * len(listed)), (TypeError, {0: 1}, "dict"), (TypeError, 0.5, "float"))
    for case in no_lists if states else ():
        cases.append((states[0][:-3], *case[:2], f"a list of {len(states)} ", case[2], None))

    def outcome(**changed):
        given = values | changed
        of_states = {states[0][:-3]: [given.pop(state) for state in states]} if states else {}
        return call(**{**of_states, **given})

    with torch.set_grad_enabled(grad):
        expected = outcome()
        for argument, error, other, must_be, got, remedy in cases:
            end = "(; .+)?" if remedy is None else f"; .*{re.escape(remedy)}.*" if remedy else ""
            text = f"{name.split()[0]}: {argument} must be "
            pattern = rf"^{re.escape(text)}(\(B, 3\) or )?{re.escape(must_be)}.*, got {re.escape(str(got))}{end}$"
            with pytest.raises(error, match=pattern) as caught:
                outcome(**{argument: other})
            if changed := remedied(str(caught.value), argument, other):
                outcome(**changed)
        torch.testing.assert_close(outcome(), expected, rtol=0, atol=0)


# Options: what they must be, and values of wrong types and wrong values.

NAMES = "options input_dims hidden_dims num_layers dims vocab_size"
GATES = "one of ('sigmoid', 'signed', 'rotation', 'quaternion', 'mixed')"
FLAGS = "reverse bias batch_first bidirectional learn_initial_state normalize recompute residual tied checkpoint"
OPTIONS = {
    **dict.fromkeys(FLAGS.split(), ("a bool", [0, 1, "False", 0.2, torch.tensor(True)], [])),
    **dict.fromkeys(NAMES.split(), ("an int|at least 1", [3.0, "2", True, None], [0, -1])),
    "block_size": ("an int|at least 1", [3.0, True], [0, -1]),
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
    "gate": (f"{re.escape(GATES)}|one value, or a list of", [], ["tanh", None, 1, ["signed"] * 3]),
    "cell": (r"one of \('mingru', 'minlstm', 'gru'\)", [], ["GRU", ["mingru"]]),
    "temperature": ("a number, at least 0", [True, None], [-0.1, math.nan, math.inf]),
    "top_k": ("an int or None|at least 1", [2.0, True], [0]),
    "top_p": ("a number above 0 and at most 1", [True], [0.0, 1.01, math.nan]),
    "min_p": ("a number from 0 to 1", ["0.1"], [-0.1, 1.1]),
    "max_new_tokens": ("an int|at least 0", [5.0, True], [-1]),
    "output_gate": (re.escape("one of ('silu', None)"), [], ["gelu", True]),
    "activation": (r"one of \('positive', 'linear', 'tanh'(, None)?\)", [], ["relu", 1]),
    "kind": (re.escape(GATES), [], ["tanh", None]),
    "backend": ("one of .*'native'.*'sequential'", [], ["cuda", None]),
}
REQUIRED = {"input_dims": 4, "hidden_dims": 4, "kernel_size": 1, "dims": 4, "vocab_size": 9, "num_layers": 2}
REQUIRED |= {"layers": [mingru.MinGRU(3, 4)], "prompts": torch.zeros(2, 3, dtype=torch.int64), "max_new_tokens": 3}
# What data/refusals.txt has wrong values of, or torch refuses.
ELSEWHERE = "angle device dilation first layers padding prompts seed state stop streamer stride weight"
# By the name in messages: what takes options, and the tensors that it is given, too.
LAYERS = {name: (type(call), {}) for name, (call, _) in CALLS.items() if re.match("[BLM]|mingru.GRU", name)}
FUNCTIONS = {name: each for name, each in CALLS.items() if not isinstance(each[0], torch.nn.Module)}
OTHERS = {"Stack": (mingru.Stack, {}), "generate": (LanguageModel(9, 3, 1).generate, {})}


@pytest.mark.parametrize("name", {**LAYERS, **FUNCTIONS, **OTHERS})
def test_a_wrong_option(name):
    """Of every option, which fails for one that is new."""
    kind, forms = {**LAYERS, **FUNCTIONS, **OTHERS}[name]
    tensors = {argument: right(argument, letters) for argument, letters in forms.items()}
    known = {name: each for name, each in inspect.signature(kind).parameters.items() if each.kind != each.VAR_KEYWORD}
    given = {option: value for option, value in REQUIRED.items() if option in known} | tensors
    name = "LanguageModel" if name == "generate" else name.split()[0]
    for option in known.keys() - tensors.keys() - {*ELSEWHERE.split()}:
        expected, types, values = OPTIONS[option]
        for error, value in [*((TypeError, each) for each in types), *((ValueError, each) for each in values)]:
            text = rf"^{name}: ({option} must be|backend selects) ({expected}).*, got {re.escape(repr(value))}(;|$)"
            with pytest.raises(error, match=text):
                kind(**given | {option: value})


def test_every_function_is_here():
    text = Path(__file__).with_name("data").joinpath("refusals.txt").read_text("utf-8")
    assert not [name for name in dir(functional) if name not in CALLS and f"Error: {name}: " not in text]
    assert [name for name in ELSEWHERE.split() if not re.search(rf"Error: .*\b{name} must", text)] == ["device"]
