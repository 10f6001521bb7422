"""What arguments and names that are not there are called here: names of other packages, and typing errors."""

import difflib
import re
from typing import Any

LENGTHS_OF_MASK = "lengths=mask.sum(1), with all padding at the end"
# Argument names of other packages (torch, Keras, minGRU-pytorch, cheind/mingru, convolutional GRUs, transformers,
# libraries of reinforcement learning) and their names here, followed by a value or an explanation. Without those that
# look like a typing error, as "strides". The first that a function has is meant.
_BY_NAMES = {
    "in_channels input_size input_dims": ("input_dims", "input_size"),
    "hidden_size hidden_sizes out_channels units": ("hidden_dims", "dims"),
    "hidden_dims expansion_factor": ("hidden_dims", "hidden_size", "expansion"),
    "dim": ("input_dims and hidden_dims", "dims"),
    "d_model n_embd emb_dim embed_dim embedding_dim": ("dims",),
    "depth num_hidden_layers": ("num_layers",),
    "num_blocks": ("block_size, the number of features of a block", "num_layers"),
    "batch_norm": ("norm",),
    "time_major": ("batch_first=False for time_major=True",),
    "activation nonlinearity": ("candidate",),
    "recurrent_dropout": ("dropout",),
    "n_vocab num_tokens num_embeddings": ("vocab_size",),
    "tie_weights tie_embeddings tie_word_embeddings": ("tied",),
    "mask attention_mask": (LENGTHS_OF_MASK,),
    "padding_mask key_padding_mask src_key_padding_mask": ("lengths=(~mask).sum(1) if it is True in the padding",),
    "seq_len seq_lens seq_lengths sequence_length sequence_lengths": ("lengths",),
    "episode_start episode_starts is_init is_first starts": ("reset",),
    "done dones terminated terminations truncated": ("reset, one step later: reset[:, t] = done[:, t - 1]",),
    "t time times timestamps": ("t", "dt=mingru.functional.elapsed_times(times, first=...)"),
    "deltas delta_t delta_time elapsed elapsed_time timespans": ("dt",),
    "max_length max_tokens": ("max_new_tokens",),
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
    "groups": "use a layer for each group of channels, and join their outputs with torch.cat(outputs, 2)",
    "return_sequences": "the output has all time steps; out[:, -1] is the last one",
    "stateful": "pass the returned state to the next call",
    "go_backwards": "pass x.flip(1), or bidirectional=True",
    "opset_version": "torch chooses the opset; change that of the file with onnx.version_converter",
}
# What required arguments are that are easily forgotten.
FORGOTTEN = {"first": "a typical gap is a good choice", "batch": "it is the number of sequences"}
BY_THEIR_NAMES_ONLY = ("bench", "distributed", "integrations", "streaming")


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


def unknown_name(package: dict[str, Any], name: str) -> str:
    """Return the error message for a name that the package does not have: where it is, or what it is called here."""
    public: list[str] = package["__all__"]
    known = {each.lower(): f"{home}.{each}" for home in public for each in getattr(package[home], "__all__", ())}
    known |= {"sessions": "streaming.Sessions"} | {each.lower(): each for each in public}
    meant = difflib.get_close_matches(name.lower(), known, 1, 0.8)
    remedy = f"use mingru.{known[meant[0]]}" if meant else f"the names are {', '.join(public)}"
    if name in BY_THEIR_NAMES_ONLY:
        remedy = f"import it by its name: import mingru.{name}"
    return f"module 'mingru' has no attribute {name!r}; {remedy}"
