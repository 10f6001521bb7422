"""A language model of recurrent blocks."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from ..check.calls import arguments_checked
from ..check.forms import LANGUAGE_MODEL, Shape, check_given, check_states
from ..check.values import check_int, check_min_decay, check_number, per_layer, require
from ..modules.layer import Layer, typed_as
from ..modules.level import NORMS
from ..modules.stack import Stack
from ..ops.modes import is_scripting
from ..ops.shape import MaybeList, MaybeTensor, Outputs
from . import files, generation
from .block import Block, BlockOptions, check_layer_options


class LanguageModel(Layer):
    """Predict the next token of a sequence with a stack of recurrent blocks.

        x_t = embedding of ids_t
        x = block_L(... block_1(x))
        logits_t = V norm(x_t)

    where V is the embedding's weight if `tied`. The state has a fixed size, whatever the number of tokens.

    Args:
        vocab_size: Number of different tokens, V. Ids are from 0 to V - 1.
        dims: Number of features of embeddings and blocks.
        num_layers: Number of blocks, L.
        tied: If True, the output layer shares the embedding's weight.
        **block_options: Options of `mingru.models.Block`: `cell`, `expansion`, `conv`, `mlp`, `norm`, `dropout`,
            `checkpoint`, and options of the layer, `device` and `dtype` included. `bidirectional` must be False.
            `gate` and `min_decay` may be lists with one value for each block.

    Inputs:
        - **ids**: Tokens, integers (B, S).
        - **state**: List of all blocks' states before the first token, as returned. Default: `initial(B)`.
        - **lengths**: Number of valid tokens of each sequence, integers (B,) from 0 to S, by keyword. Padded positions
          may have any valid ids, and their logits have no meaning.
        - **reset**: Bool mask, (B, S), by keyword. Where True, the state is set to its default before that token.

    Outputs:
        - **logits**: Scores of the next token, (B, S, V).
        - **state**: List of tensors with the batch in dimension 1, so that `lm(ids2, state)` continues. For each block:
          (1, B, 1, H), and (1, B, conv - 1, dims) with `conv`, where H = round(expansion * dims). The state of a
          sequence has num_layers * (H + (conv - 1) * dims) numbers, or num_layers * H without `conv`.

        Both outputs are differentiable. `mingru.models.map_state` detaches, moves or selects the states of sequences.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A size, shape, device or option is invalid, or an id is not from 0 to V - 1 (checked on the CPU).

    State dict:
        `embedding.weight` (V, dims), `blocks.layers.{l}.*`, `norm.*` and, if not `tied`, `head.weight` (V, dims).

    Examples:
        >>> lm = mingru.models.LanguageModel(vocab_size=100, dims=64, num_layers=2, conv=4, mlp=2)
        >>> ids = torch.randint(100, (8, 50))
        >>> logits, state = lm(ids)
        >>> logits.shape
        torch.Size([8, 50, 100])
        >>> logits, state = lm(ids[:, :1], state)  # the next token
        >>> lm.generate(ids, max_new_tokens=10, seed=0).shape
        torch.Size([8, 60])

    References:
        Feng et al. 2024, "Were RNNs All We Needed?", section 4.
    """

    _forms = LANGUAGE_MODEL

    @arguments_checked()
    def __init__(
        self, vocab_size: int, dims: int, num_layers: int, *, tied: bool = True, **block_options: Unpack[BlockOptions]
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {**block_options}
        parameters = list(inspect.signature(LanguageModel).parameters | inspect.signature(Block).parameters)
        check_layer_options(self.name, options.get("cell", "mingru"), options, parameters)
        for argument, size in (("vocab_size", vocab_size), ("dims", dims), ("num_layers", num_layers)):
            check_int(self.name, argument, size)
        bidirectional = options.get("bidirectional", False)
        remedy = "the reverse direction would read the tokens that are to be predicted"
        require(self.name, "bidirectional", bidirectional is False, "False", repr(bidirectional), remedy)
        factory: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        self.vocab_size = vocab_size
        self.tied = tied
        self.config = {"vocab_size": vocab_size, "dims": dims, "num_layers": num_layers, "tied": tied}
        # A copy, so that later changes to the caller's list have no effect.
        self.config |= copy.deepcopy({name: value for name, value in options.items() if name not in factory})
        # First, because they check the options.
        gates = per_layer(self.name, "gate", options.pop("gate", "sigmoid"), num_layers)
        bounds = check_min_decay(self.name, options.pop("min_decay", 0.0), gates)
        # Without the defaults, because a minLSTM has neither option.
        of_each = [
            ({} if gate == "sigmoid" else {"gate": gate}) | ({"min_decay": bound} if bound else {})
            for gate, bound in zip(gates, bounds, strict=True)
        ]
        blocks = [Block(dims, **options, **own) for own in of_each]
        self.embedding = nn.Embedding(vocab_size, dims, **factory)
        self.blocks = Stack(blocks)
        self.num_states = self.blocks.num_states
        self.norm = NORMS[options.get("norm", "rms")](dims, **factory)
        self.head = None if tied else nn.Linear(dims, vocab_size, bias=False, **factory)
        self._initialize_embedding()

    def _initialize_embedding(self) -> None:
        # The output layer of the same weight then starts with logits of about 1. Otherwise, N(0, 1) learns faster.
        if self.tied:
            nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)

    def reset_parameters(self) -> None:
        """Re-initialize all parameters."""
        super().reset_parameters()
        self._initialize_embedding()

    def default_states(self, x: Tensor, batch: int) -> list[Tensor]:
        """Return the states that replace state=None."""
        return self.blocks.default_states(x, batch)

    def forward(
        self, ids: Tensor, state: list[Tensor] | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the output of all steps and the state after the last: see `Inputs` and `Outputs` of the class."""
        return self._forward(ids, state, reset, lengths, None)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self) -> Any: ...

    def _compute(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> Outputs:
        if is_scripting():
            y, states = self.blocks(self.embedding(x), h, reset, lengths)
        else:
            y, states = self.blocks(self._embed(x), h, reset, lengths)
        return self._logits(y), states

    def _logits(self, x: Tensor) -> Tensor:
        head = self.head
        x = self.norm(x)
        logits: Tensor = F.linear(x, self.embedding.weight) if head is None else head(x)
        return logits

    def _embed(self, ids: Tensor) -> Tensor:
        try:
            return self.embedding(ids)  # type: ignore[no-any-return]
        except IndexError:
            generation.check_vocabulary(self.name, "ids", ids, self.vocab_size)
            raise

    def _check(self, x: Tensor, h: MaybeList, reset: MaybeTensor, lengths: MaybeTensor, dt: MaybeTensor) -> None:
        """Raise an error that names this model, not a block, if an argument is wrong."""
        generation.check_ids(self.name, "ids", x, 2, self.embedding.weight.device)
        self._check_state(h, x.shape)
        check_given(self, LANGUAGE_MODEL.batch_first[0], x, x.shape, "mingru", reset=reset, lengths=lengths)

    def _check_state(self, state: MaybeList, x: Shape) -> None:
        if state is not None:
            check_states(self, state, self.blocks._state_forms(x), self.embedding.weight, "tensors")

    @torch.jit.unused
    @arguments_checked()
    def generate(
        self,
        prompts: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop: int | Sequence[int] | None = None,
        seed: int | Sequence[int] | None = None,
        state: list[Tensor] | None = None,
        streamer: Callable[[Tensor], object] | None = None,
    ) -> Tensor | list[Tensor]:
        """Continue each prompt with sampled tokens.

        The prompts are read in one parallel pass, then each step adds a token. A sequence gives the same tokens in any
        batch, because each has its own random numbers. Only the rounding of the logits can depend on the batch. The
        model runs in eval mode and without gradients, and is in its own mode again after each step.

        Args:
            prompts: Tokens, int64 or int32, (B, S), or a list of B tensors (S_b,) of any lengths of at least 1.
            max_new_tokens: Largest number of tokens to add to each prompt.
            temperature: Divisor of the logits. 0 takes the most likely token.
            top_k: Sample only from the k most likely tokens, and from tokens as likely as the last of them.
            top_p: Sample only from the most likely tokens whose probabilities first sum to at least this number, above
                0 and at most 1. It applies after `top_k`, to probabilities that sum to 1.
            min_p: Sample only from tokens at least this many times as likely as the most likely one, from 0 to 1.
            stop: Token or tokens that end a sequence. The token is part of the result.
            seed: Seed of the first sequence; sequence b has seed + b. Or a list with a seed for each. Default: random.
            state: State before the prompts, as `forward` returns it. Default: `initial(B)`.
            streamer: Called after each step with the new tokens, (B,); -1 for sequences that have ended.
                `stream` has the same tokens as an iterator.

        Returns:
            For a tensor, (B, S + n): prompts and new tokens; a sequence that ends early is filled with its stop token.
            For a list, a list of tensors (S_b + n_b,).

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: A prompt is empty, an id or option is out of range, or the state does not fit.
        """
        is_valid, got = streamer is None or callable(streamer), type(streamer).__name__
        require(self.name, "streamer", is_valid, "a function of the new tokens, or None", got, error=TypeError)
        new = []
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        for tokens in self.stream(prompts, max_new_tokens, **sampling, stop=stop, seed=seed, state=state):
            new.append(tokens)
            if streamer is not None:
                streamer(tokens.clone())
        return generation.joined(prompts, new)

    @torch.jit.unused
    @arguments_checked()
    def stream(
        self,
        prompts: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop: int | Sequence[int] | None = None,
        seed: int | Sequence[int] | None = None,
        state: list[Tensor] | None = None,
    ) -> Iterator[Tensor]:
        """Yield the new tokens of each step, (B,), with -1 for sequences that have ended.

        The arguments are those of `generate`.
        """
        sampling = generation.Sampling(self.name, temperature, top_k, top_p, min_p)
        return generation.stream(self, prompts, max_new_tokens, sampling, stop, seed, state)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the parameters in two groups for an optimizer such as `torch.optim.AdamW`.

        All matrices have weight decay: those of the embedding, gates, candidates, convolutions, W, MLP and output
        layer. Norms, biases and initial states have none. Frozen parameters are in the groups too: an optimizer skips
        them because they have no gradient. In the authors' code, gates and candidates have none; with it, models of
        text generalize better.

        Args:
            weight_decay: Weight decay of the first group, a number of at least 0.
        """
        check_number(self.name, "weight_decay", weight_decay, "a number, at least 0", lambda decay: decay >= 0)
        groups: list[list[nn.Parameter]] = [[], []]
        for name, parameter in self.named_parameters():
            has_decay = parameter.dim() > 1 and not name.endswith("initial_state")
            groups[0 if has_decay else 1].append(parameter)
        return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]

    @torch.jit.unused
    @arguments_checked()
    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the model to a folder: `config.json` with the options, and `model.safetensors`.

        `config.json` also says which parameters are not trained. Existing files are replaced one after the other when
        both new files are complete. Changes of attributes and modules after the construction are not saved.

        Args:
            folder: Path of the folder, which is created if necessary.

        Raises:
            ModuleNotFoundError: safetensors is missing.
            OSError: The folder cannot be written.
            RuntimeError: Two tensors share their memory; use `tied=True` for the head.
        """
        files.save(self, self.config, folder)

    def __getattr__(self, name: str) -> Any:
        if name == "push_to_hub":
            call = "huggingface_hub.upload_folder(repo_id='owner/name', folder_path=folder)"
            raise AttributeError(f"{self.name}: no attribute 'push_to_hub'; use save_pretrained(folder), then {call}")
        return super().__getattr__(name)

    @classmethod
    def from_pretrained(
        cls, folder_or_name: str | PathLike[str], *, revision: str | None = None, device: Any = None
    ) -> "LanguageModel":
        """Load a model from a folder, or from the Hugging Face hub. The model is in eval mode.

        Args:
            folder_or_name: Folder that `save_pretrained` wrote, or the name of a model on the hub, "owner/name".
            revision: Branch, tag or commit on the hub.
            device: Device of the parameters. Default: the CPU. Their dtype is the dtype in the file.

        Raises:
            ModuleNotFoundError: safetensors or, for a name, huggingface_hub is missing.
            ValueError: The folder has no model, a file is damaged, or an option is wrong, or a tensor is missing,
                unexpected or of the wrong shape.

        Errors of huggingface_hub pass through.
        """
        return files.load(cls, folder_or_name, revision, device)
