"""What arguments that a function does not have are called here: names of other packages, and typing errors."""

import difflib

LENGTHS_OF_MASK = "lengths=mask.sum(1), with all padding at the end"
# Argument names of other packages (torch, Keras, minGRU-pytorch, cheind/mingru, convolutional GRUs, transformers) and
# their names here, with a value where another one is meant. Without those that look like a typing error, as "strides".
COUNTERPARTS = {
    "in_channels": ("input_dims",),
    **dict.fromkeys(["input_size", "input_dims"], ("input_dims", "input_size")),
    **dict.fromkeys(["hidden_size", "hidden_dims"], ("hidden_dims", "hidden_size", "expansion")),
    **dict.fromkeys(["hidden_sizes", "out_channels", "units"], ("hidden_dims",)),
    "dim": ("input_dims", "hidden_dims"),
    "expansion_factor": ("hidden_dims", "expansion"),
    "batch_norm": ("norm",),
    **dict.fromkeys(["activation", "nonlinearity"], ("candidate",)),
    "recurrent_dropout": ("dropout",),
    **dict.fromkeys(["n_vocab", "num_tokens", "num_embeddings"], ("vocab_size",)),
    **dict.fromkeys(["mask", "attention_mask", "key_padding_mask", "padding_mask"], (LENGTHS_OF_MASK,)),
    **dict.fromkeys(["max_length", "max_tokens"], ("max_new_tokens",)),
    "eos_token_id": ("stop",),
    "do_sample": ("temperature=0 for do_sample=False, and nothing for True",),
    **dict.fromkeys(["input", "x"], ("x", "input")),
    **dict.fromkeys(["h", "hx", "h0", "h_0", "hidden", "hidden_state", "prev_hidden", "state"], ("h", "hx")),
}
LINEAR_BEHIND = "apply a torch.nn.Linear to the output"
REMEDIES = {
    "proj_size": LINEAR_BEHIND,
    "proj_out": LINEAR_BEHIND,
    "forget_bias": "only a minLSTM has a forget gate",
    "normalize": "only a minLSTM has two gates",
    "gate": "only a minGRU has several gates",
    "min_decay": "only MinGRU and MinGRUCell have a bound of the decay",
    "return_sequences": "the output has all time steps; out[:, -1] is the last one",
    "stateful": "pass the returned state to the next call",
    "go_backwards": "pass x.flip(1), or bidirectional=True",
    "opset_version": "torch chooses the opset; change that of the file with onnx.version_converter",
}


def unknown_argument(name: str, argument: str, names: list[str]) -> str:
    """Return the error message for an argument that is not one of `names`."""
    meant = " and ".join(counterparts(argument, names))
    remedy = f"use {meant}" if meant else REMEDIES.get(argument) or f"the arguments are {', '.join(names)}"
    return f"{name}: no argument {argument!r}; {remedy}"


def counterparts(argument: str, names: list[str]) -> list[str]:
    """Return those of `names` that a caller probably means."""
    known = [name for name in COUNTERPARTS.get(argument, ()) if name.partition("=")[0] in names]
    # The high cutoff, 0.8, accepts only typing errors.
    return known or difflib.get_close_matches(argument, names, 1, 0.8)
