"""What names and values that callers write by mistake mean here: those of other packages, and typing errors."""

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .values import written

if TYPE_CHECKING:
    from .forms import Checked, Form, LayerLike

LENGTHS_OF_MASK = "lengths=mask.sum(1), with all padding at the end"
# Argument names of other packages (torch, minGRU-pytorch, cheind/mingru, transformers, libraries of reinforcement
# learning) that users wrote here, and their names here, followed by a value or an explanation. Without those that look
# like a typing error, as "strides". The first that a function has is meant.
_BY_NAMES = {
    "in_channels input_size input_dims": ("input_dims", "input_size"),
    "hidden_size hidden_sizes out_channels": ("hidden_dims", "dims"),
    "hidden_dims expansion_factor": ("hidden_dims", "hidden_size", "expansion"),
    "dim": ("input_dims and hidden_dims", "dims"),
    "num_blocks": ("block_size, the number of features of a block", "num_layers"),
    "time_major": ("batch_first=False for time_major=True",),
    "activation": ("candidate",),
    "n_vocab": ("vocab_size",),
    "tie_weights": ("tied",),
    "mask attention_mask": (LENGTHS_OF_MASK,),
    "padding_mask key_padding_mask src_key_padding_mask": ("lengths=(~mask).sum(1) if it is True in the padding",),
    "seq_len seq_lens seq_lengths sequence_length sequence_lengths": ("lengths",),
    "episode_start episode_starts is_init is_first starts": ("reset",),
    "done dones terminated terminations truncated": ("reset, one step later: reset[:, t] = done[:, t - 1]",),
    "t time times timestamps": ("t", "dt=mingru.functional.elapsed_times(times, first=...)"),
    "deltas delta_t delta_time elapsed": ("dt",),
    "max_length": ("max_new_tokens",),
    "eos_token_id": ("stop",),
    "do_sample": ("temperature=0 for do_sample=False, and nothing for True",),
    "input_ids": ("ids", "prompts"),
    "input x": ("x", "input"),
    "h hx h0 h_0 hidden hidden_state initial_state past_key_values prev_hidden state": ("h", "hx", "state"),
}
COUNTERPARTS = {name: meant for names, meant in _BY_NAMES.items() for name in names.split()}
REMEDIES = {
    **dict.fromkeys(["proj_size", "proj_out"], "apply a torch.nn.Linear to the output"),
    **dict.fromkeys(["labels", "targets"], "compute the loss of logits[:, :-1] and ids[:, 1:] yourself"),
    "forget_bias": "only a minLSTM has a forget gate",
    "normalize": "only a minLSTM has two gates",
    "gate": "only a minGRU has several gates",
    "min_decay": "only MinGRU and MinGRUCell have a bound of the decay",
    "opset_version": "torch chooses the opset; change that of the file with onnx.version_converter",
}
BY_THEIR_NAMES_ONLY = ("bench", "distributed", "integrations", "streaming")
EMBED = "embed token ids first (torch.nn.Embedding)"
# Arguments of functions that have the form of the first one.
_SEQUENCES = ("angle", "b", "candidate", "input")


def unknown_argument(name: str, argument: str, names: list[str]) -> str:
    """Return the error message for an argument that is not one of `names`."""
    meant = counterpart(argument, names)
    remedy = f"use {meant}" if meant else REMEDIES.get(argument) or f"the arguments are {', '.join(names)}"
    return f"{name}: no argument {argument!r}; {remedy}"


def counterpart(argument: str, names: list[str]) -> str:
    """Return what a caller probably means, which begins with one of `names`, or ""."""
    known = [name for name in COUNTERPARTS.get(argument, ()) if re.split(r"\W", name)[0] in names]
    # The high cutoff, 0.8, accepts only typing errors.
    return next(iter(known or difflib.get_close_matches(argument, names, 1, 0.8)), "")


def unknown_name(public: list[str], package: dict[str, object], name: str) -> str:
    """Return the error message for a name that the package does not have: where it is, or what it is called here."""
    known = {each.lower(): f"{home}.{each}" for home in public for each in getattr(package[home], "__all__", ())}
    known |= {"sessions": "streaming.Sessions, after import mingru.streaming"} | {each.lower(): each for each in public}
    meant = difflib.get_close_matches(name.lower(), known, 1, 0.8)
    remedy = f"use mingru.{known[meant[0]]}" if meant else f"the names are {', '.join(public)}"
    if name in BY_THEIR_NAMES_ONLY:
        remedy = f"import it by its name: import mingru.{name}"
    return f"module 'mingru' has no attribute {name!r}; {remedy}"


def of_layers(layer: "LayerLike", form: "Form", value: object, shape: Sequence[int]) -> str:
    """Return the remedy for an argument of a layer or cell that has another type or shape, or ""."""
    if form.argument == "h" and isinstance(value, (list, tuple)):
        is_joined = isinstance(value, list) and form.parts[0] == "L*D"
        end = "; torch.cat joins a list with a state of each layer" * is_joined
        return f"the state is one tensor, {written(form.parts)}, unlike the (h, c) of an LSTM{end}"
    if not isinstance(value, Tensor):
        return ""
    if form.argument == "x":
        return of_ids(value) or _of_x(layer, value)
    if form.parts[:1] in (["1"], ["D"]):
        return "pass a state of this batch size and of a module with the same options"
    if form.parts == ["L*D", "B", "1", "H"] and value.dim() == 3:
        return "convert a state of nn.GRU, (L * D, B, H), with h.unsqueeze(2)"
    is_transposed = form.parts[:1] == ["L*D"] and value.shape == (*shape[1::-1], *shape[2:])
    return f"batch_first applies to the input only; the state is always {written(form.parts)}" if is_transposed else ""


def of_functions(function: "Checked", form: "Form", value: object, shape: Sequence[int]) -> str:
    """Return the remedy for an argument of a function that has another shape, or ""."""
    lacks_dim = form.argument in _SEQUENCES and isinstance(value, Tensor) and value.shape[:-1] == shape
    return f"use {function._forms.names['x']}.unsqueeze(-1).expand_as({form.argument})" * lacks_dim


def of_dtype(owner: "Checked", argument: str, value: Tensor, remedy: str) -> str:
    """Return the remedy for another dtype."""
    if argument == "lengths" and value.dtype == torch.bool:
        return f"use {LENGTHS_OF_MASK}"
    is_1d = value.dtype == torch.int64 and value.dim() == 1
    if is_1d and argument in ("h", "reset") and "lengths" in owner._forms.batch_first[0]:
        return "pass lengths by their name, lengths="
    if argument == "x" and of_ids(value):
        return f"{EMBED}, or {remedy} for numbers"
    return (of_mask(value) if argument == "h" else "") or remedy


def of_mask(h: object) -> str:
    """Return the remedy for a mask in place of a state, or ""."""
    is_mask = isinstance(h, Tensor) and h.dtype == torch.bool
    return f"pass the starts of episodes as reset=; a layer takes a padding mask as {LENGTHS_OF_MASK}" * is_mask


def of_ids(x: Tensor) -> str:
    """Return the remedy for token ids, if x has a dtype that an embedding accepts, or ""."""
    return EMBED if x.dtype in (torch.int64, torch.int32) else ""


def of_missing_dim(argument: str, x: Tensor, shape: Sequence[int]) -> str:
    """Return the remedy for a tensor that lacks one dimension of size 1 of this shape, or ""."""
    missing = (dim for dim, size in enumerate(shape) if size == 1 and x.shape == (*shape[:dim], *shape[dim + 1 :]))
    return next((f"use {argument}.unsqueeze({dim})" for dim in missing), "")


def _of_x(layer: "LayerLike", x: Tensor) -> str:
    if layer.num_space_dims > 0 or layer.role in ("step", "torch"):
        return ""
    if x.shape == (layer.input_dims,):
        return "use x[None, None] for one step"
    if x.dim() == 2 and x.shape[1] == layer.input_dims:
        batch, time = (0, 1) if layer.batch_first else (1, 0)
        return f"use x.unsqueeze({batch}) for one sequence, or x.unsqueeze({time}) for one step of a batch"
    return ""
