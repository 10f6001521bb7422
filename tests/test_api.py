"""The public names and their signatures, as the contract has them; what an import costs; what the package carries."""

import importlib.metadata
import importlib.resources
import importlib.util
import inspect
import operator
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

import mingru
from mingru.modules import options
from mingru.modules.conv_layer import ConvOptions
from mingru.modules.recurrent import RecurrentOptions
from mingru.ops import private
from mingru.ops.activation import ACTIVATIONS
from mingru.ops.cells import GATES

CONV = (
    "input_dims, hidden_dims, kernel_size, num_layers=1, *, stride=1, padding=0, dilation=1, groups=1, bias=True, "
    "dropout=0.0, bidirectional=False, residual=False, norm=None, candidate=None, gate='sigmoid', "
    "learn_initial_state=False, memory=None, batch_first=True, device=None, dtype=None"
)
CONV_CELL = (
    "input_dims, hidden_dims, kernel_size, *, stride=1, padding=0, dilation=1, groups=1, bias=True, norm=None, "
    "candidate=None, gate='sigmoid', learn_initial_state=False, memory=None, device=None, dtype=None"
)
OF_TORCH = (
    "input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False, "
    "proj_size=0, device=None, dtype=None"
)
CELL_OF_TORCH = "input_size, hidden_size, bias=True, device=None, dtype=None"
OPTIONS = (
    "residual=False, norm=None, candidate=None, gate='sigmoid', min_decay=0.0, learn_initial_state=False, memory=None, "
    "recompute=None"
)
CELL_OPTIONS = "norm=None, candidate=None, gate='sigmoid', min_decay=0.0, learn_initial_state=False, memory=None"
LSTM_OPTIONS = "cell='minlstm', forget_bias=1.0, normalize=True"
FORWARD = "self, x, h=None, reset=None"
# Name, and what stands between the brackets of its signature.
CONTRACT = {
    "MinGRU": (
        "input_dims, hidden_dims, num_layers=1, bias=True, batch_first=True, dropout=0.0, bidirectional=False, "
        "*, residual=False, norm=None, candidate=None, gate='sigmoid', min_decay=0.0, "
        "learn_initial_state=False, memory=None, recompute=None, device=None, dtype=None"
    ),
    "MinGRU.forward": f"{FORWARD}, lengths=None, dt=None",
    "MinLSTM": (
        "input_dims, hidden_dims, num_layers=1, bias=True, batch_first=True, dropout=0.0, bidirectional=False, "
        "*, forget_bias=0.0, normalize=True, residual=False, norm=None, candidate='positive', "
        "learn_initial_state=False, memory=None, recompute=None, device=None, dtype=None"
    ),
    "MinLSTM.forward": f"{FORWARD}, lengths=None, dt=None",
    "MinGRUCell": (
        "input_dims, hidden_dims, bias=True, *, norm=None, candidate=None, gate='sigmoid', min_decay=0.0, "
        "learn_initial_state=False, memory=None, device=None, dtype=None"
    ),
    "MinGRUCell.forward": f"{FORWARD}, dt=None",
    "MinLSTMCell": (
        "input_dims, hidden_dims, bias=True, *, forget_bias=0.0, normalize=True, norm=None, candidate='positive', "
        "learn_initial_state=False, memory=None, device=None, dtype=None"
    ),
    "MinLSTMCell.forward": f"{FORWARD}, dt=None",
    **{f"MinConv{dims}dGRU": CONV for dims in (1, 2, 3)},
    **{f"MinConv{dims}dGRU.forward": FORWARD for dims in (1, 2, 3)},
    **{f"MinConv{dims}dGRUCell": CONV_CELL for dims in (1, 2, 3)},
    **{f"MinConv{dims}dGRUCell.forward": FORWARD for dims in (1, 2, 3)},
    "Stack": "layers, *, dropout=0.0, residual=False",
    "Stack.forward": f"{FORWARD}, lengths=None, dt=None",
    "drop_in.GRU": f"{OF_TORCH}, *, {OPTIONS}",
    "drop_in.GRU.forward": "self, input, hx=None, reset=None, lengths=None, dt=None, mask=None",
    "drop_in.GRUCell": f"{CELL_OF_TORCH}, *, {CELL_OPTIONS}",
    "drop_in.GRUCell.forward": "self, input, hx=None, reset=None, dt=None",
    "drop_in.LSTM": f"{OF_TORCH}, *, {LSTM_OPTIONS}, {OPTIONS}",
    "drop_in.LSTM.forward": "self, input, hx=None, reset=None, lengths=None, dt=None, mask=None",
    "drop_in.LSTMCell": f"{CELL_OF_TORCH}, *, {LSTM_OPTIONS}, {CELL_OPTIONS}",
    "drop_in.LSTMCell.forward": "self, input, hx=None, reset=None, dt=None",
    "drop_in.patch": "gru=True, lstm=True, *, everywhere=False, num_layers=None, **options",
    "drop_in.replace": "model, gru=True, lstm=True, *, num_layers=None, **options",
    "convert.from_cheind": (
        "state_dict, prefix='', *, residual=None, dropout=0.0, stride=None, padding=None, num_groups=None"
    ),
    "convert.from_lucidrains": "state_dict, prefix=''",
    "convert.language_model_from_lucidrains": "state_dict, prefix=''",
    "convert.from_minrnns": "state_dict, prefix='', *, use_coeff_norm=None",
    "convert.from_pufferlib": "state_dict, prefix=''",
    "export.onnx": "model, example_inputs, path, *, kind='sequence'",
    "functional.check_resets": "rnn, x, h, reset, out",
    "functional.elapsed_times": "t, first, *, reset=None, lengths=None, batch_first=True",
    "functional.g": "x",
    "functional.log_g": "x",
    "functional.mingru": "gate, candidate, h=None, *, reset=None, dt=None, backend='auto'",
    "functional.minlstm": "forget, input, candidate, h=None, *, reset=None, dt=None, backend='auto'",
    "functional.linear_scan": "a, b, h=None, *, reverse=False, reset=None, lengths=None, backend='auto'",
    "functional.parallel_scan_log": "log_a, log_b",
    "functional.reset_from_lengths": "lengths, num_steps=None",
    "models.Block": (
        "dims, *, cell='mingru', expansion=1.0, conv=None, mlp=None, norm='rms', dropout=0.0, checkpoint=False, "
        "**layer_options"
    ),
    "models.Block.forward": f"{FORWARD}, lengths=None, dt=None",
    "models.LanguageModel": "vocab_size, dims, num_layers, *, tied=True, **block_options",
    "models.LanguageModel.forward": "self, ids, state=None, reset=None, lengths=None",
    "models.LanguageModel.generate": (
        "self, prompts, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, min_p=None, stop=None, seed=None, "
        "state=None, streamer=None"
    ),
    "models.map_state": "function, state",
    "backends": "",
    "safe_globals": "",
    "use_backend": "name",
}
# Keywords that the library adds behind those of the contract.
ADDED = {
    "functional.mingru": "*, kind='sigmoid', angle=None, min_decay=0.0, activation=None, initial_state=None",
    "functional.minlstm": "*, normalize=True, activation='positive', initial_state=None",
    "export.onnx": "*, max_steps=None, dynamic_shapes=None",
}
# Their arguments are those of another class, which tells them.
THIN = {f"MinConv{dims}dGRU{end}" for dims in (1, 3) for end in ("", "Cell")} | {"MinConv2dGRUCell"}
MODULES = ("convert", "drop_in", "export", "functional", "models")


def parameters(text):
    return plain(inspect.signature(eval(f"lambda {text}: None")))


def plain(signature):
    return [(each.name, each.kind, each.default) for each in signature.parameters.values()]


def found(name):
    value = mingru
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", CONTRACT)
def test_signatures(name):
    expected = parameters(CONTRACT[name]) + parameters(ADDED.get(name, ""))
    assert plain(inspect.signature(found(name))) == expected


def test_public_names():
    assert {name.partition(".")[0] for name in CONTRACT} | {"__version__"} == set(mingru.__all__)
    functions = {name.partition(".")[2] for name in CONTRACT if name.startswith("functional.")}
    assert functions == set(mingru.functional.__all__)
    for module in (mingru, *(getattr(mingru, name) for name in MODULES)):
        assert len(module.__all__) == len(set(module.__all__))
        for name in module.__all__:
            assert getattr(module, name) is not None


def test_nothing_else_is_in_the_package():
    public = {
        name
        for name, value in vars(mingru).items()
        if not name.startswith("_") and not (isinstance(value, types.ModuleType) and name not in MODULES)
    }
    assert public == set(mingru.__all__) - {"__version__"}


@pytest.mark.parametrize("name", [name for name in CONTRACT if not name.endswith((".forward", ".generate"))])
def test_public_names_are_documented(name):
    """Each public function and class has a docstring, with its example; arguments are all named in it."""
    value = found(name)
    text = inspect.getdoc(value)
    assert ">>> " in text
    if name in THIN:
        assert "MinConv2dGRU" in text
        return
    for parameter in inspect.signature(value).parameters:
        assert parameter in text.partition("Args:")[2], parameter


def imported(statement):
    """The modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys, torch; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split())


def test_import_brings_nothing_but_the_package():
    loaded = imported("import mingru")
    assert "mingru" in loaded
    others = {name for name in loaded if name.partition(".")[0] not in {"mingru", *sys.stdlib_module_names}}
    # Not matplotlib, not numpy, not Triton, not Lightning, and of torch nothing that `import torch` leaves for later,
    # such as its compiler.
    assert others == set()


def test_version():
    assert mingru.__version__ == importlib.metadata.version("torch-mingru")


def test_types_are_shipped():
    assert importlib.resources.files("mingru").joinpath("py.typed").is_file()


def test_private_names_of_torch_stand_in_one_file():
    name = re.compile(
        r"\btorch\.([\w.]+\.)?_[a-zA-Z]|\bfrom torch[\w.]* import .*\b_[a-zA-Z]|\bforward_ad\._"
        r"|__(prepare_scriptable|script_if_tracing|original_fn)|\b_dynamo_"
    )
    files = Path(mingru.__file__).parent.rglob("*.py")
    assert [file.name for file in files if name.search(file.read_text("utf-8"))] == ["private.py"]


def computed(rnn, x):
    """What a layer computes, in ways that ask for private names."""
    with torch.no_grad():
        plain = rnn(x)
        steps = rnn(x[:, :1]), torch.vmap(lambda row: rnn(row.unsqueeze(0))[0])(x)
    out, h = rnn(x)
    grads = torch.autograd.grad(out.square().sum() + h.square().sum(), list(rnn.parameters()))
    several = torch.ones(2, *out.shape).double()
    batched = torch.autograd.grad(rnn(x)[0], rnn.layers[0].linear.bias, several, is_grads_batched=True)
    return plain, steps, (out, h), grads, batched, torch.jit.script(rnn)(x), torch.jit.trace(rnn, (x,))(x)


def test_without_the_private_names_of_torch_results_are_the_same(monkeypatch):
    rnn, x = mingru.MinGRU(3, 4, 2).double(), torch.randn(2, 20, 3).double()
    expected = computed(rnn, x)

    def gone(path):
        raise AttributeError(path)

    spec = importlib.util.spec_from_file_location("without", private.__file__)
    without = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(operator, "attrgetter", gone)
        spec.loader.exec_module(without)
    without.forward_ad = None
    names = {name: value for name, value in vars(private).items() if not name.startswith("_")}
    assert None not in names.values()
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "mingru"]:
        for name, value in names.items():
            if vars(module).get(name) is value:
                monkeypatch.setattr(module, name, getattr(without, name))
    assert not mingru.ops.graph.is_untransformed()
    torch.testing.assert_close(computed(rnn, x), expected)
    # Of these two, no right result is known.
    with pytest.raises(RuntimeError, match="forward mode over forward mode"):
        torch.func.jvp(lambda x: rnn(x)[0], (x,), (x,))
    with pytest.raises(ImportError, match="which this function needs"):
        mingru.export.onnx(rnn, x, "rnn.onnx")


# What people of other libraries write, and what they should have written.
LM, RNN = mingru.models.LanguageModel(10, 16, 1), mingru.MinGRU(3, 4)
IDS, X, MASK = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, 3), torch.ones(2, 5, dtype=torch.bool)
LUCIDRAINS, MAP_STATE = mingru.convert.from_lucidrains, mingru.models.map_state
FOREIGN = {
    "a mask as lengths": (RNN, (X,), {"lengths": MASK}, TypeError, "use lengths=mask.sum(1) for a mask"),
    "mask": (RNN, (X,), {"mask": MASK}, TypeError, "MinGRU: no argument 'mask'; use lengths=mask.sum(1)"),
    "attention_mask": (LM, (IDS,), {"attention_mask": MASK}, TypeError, "use lengths=mask.sum(1)"),
    "a mask for a cell": (mingru.MinGRUCell(3, 4), (X[0],), {"mask": MASK}, TypeError, "the arguments are x, h, "),
    "one step": (RNN, (X[0, 0],), {}, ValueError, "got (3,); use x[None, None] for one step"),
    "a path": (LUCIDRAINS, ("x.pt",), {}, TypeError, "got str; load the file with torch.load(path)"),
    "a checkpoint": (
        LUCIDRAINS,
        ({"model": {"a": X}},),
        {},
        ValueError,
        "got the key model; pass the mapping under 'model'",
    ),
    "sizes": (
        mingru.MinGRU,
        (3, [8, 16]),
        {},
        TypeError,
        "got [8, 16]; for layers of different sizes, use mingru.Stack",
    ),
    "activation": (mingru.MinGRU, (3, 4), {"activation": "tanh"}, TypeError, "no argument 'activation'; use candidate"),
    "n_vocab": (mingru.models.LanguageModel, (), {"n_vocab": 10}, TypeError, "no argument 'n_vocab'; use vocab_size"),
    "min_decay": (mingru.functional.mingru, (X, X), {"min_decay": 1.5}, ValueError, "0 to 1 (exclusive), got 1.5"),
    "a layer of torch": (mingru.Stack, ([torch.nn.GRU(3, 4)],), {}, TypeError, "GRU; use mingru.MinGRU or"),
    "max_length": (LM.generate, (IDS,), {"max_length": 3}, TypeError, "no argument 'max_length'; use max_new_tokens"),
    "do_sample": (LM.generate, (IDS, 3), {"do_sample": False}, TypeError, "no argument 'do_sample'; use temperature=0"),
    "eos_token_id": (LM.stream, (IDS, 3), {"eos_token_id": 1}, TypeError, "no argument 'eos_token_id'; use stop"),
    "state first": (
        MAP_STATE,
        ([X], torch.clone),
        {},
        TypeError,
        "a function of a tensor, got list; the function comes",
    ),
    "no state": (MAP_STATE, (torch.clone, None), {}, TypeError, "state must be a list of tensors, got NoneType"),
    "a class": (
        lambda name: mingru.drop_in.patch(name).__enter__(),
        ("LSTM",),
        {},
        TypeError,
        "gru=False replaces LSTMs",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_errors_say_what_was_meant(case):
    call, args, kwargs, error, message = FOREIGN[case]
    with pytest.raises(error, match=re.escape(message)):
        call(*args, **kwargs)


def test_numbers_of_numpy_are_numbers():
    rnn = mingru.MinGRU(np.int64(3), 4, num_layers=np.int32(2), dropout=np.float32(0.5))
    assert repr(rnn) == repr(mingru.MinGRU(3, 4, num_layers=2, dropout=0.5))
    assert all(type(size) is int for size in (rnn.input_dims, rnn.num_layers)) and type(rnn.dropout) is float


def test_what_type_checkers_accept_is_what_there_is():
    assert get_args(options.Gate) == tuple(GATES)
    assert set(get_args(options.Candidate)) == set(ACTIVATIONS)
    assert get_args(options.Norm) == RecurrentOptions.norms and ConvOptions.norms == ("group",)
