"""A `SequenceTagger` for flair with minGRU or minLSTM layers, whose files load like others."""

from typing import Any

from .. import drop_in
from ..check.values import check_choice
from . import require

with require("flair", "flair 0.15", __name__):
    from flair.models import SequenceTagger

__all__ = ["MinGRUTagger"]


class MinGRUTagger(SequenceTagger):
    """Tag the words of sentences, as flair's `SequenceTagger` does.

    The arguments are those of `SequenceTagger`, with other defaults for two of them. `rnn_type` is "GRU" for
    `mingru.drop_in.GRU` (the default), "LSTM" for `mingru.drop_in.LSTM`, or "GRU" for `mingru.drop_in.GRU` with
    `cell="gru"`. `rnn_layers` is 2. The layers have `norm="rms"` and `residual=True`. For other options, pass such
    a layer with `batch_first=True` as `rnn`.

    `save`, `load` and flair's `ModelTrainer` work as usual. Load a file with `MinGRUTagger.load`.

    Examples:
        >>> tagger = MinGRUTagger(embeddings, tag_dictionary, "ner")  # doctest: +SKIP
        >>> tagger.save("tagger.pt")  # doctest: +SKIP
        >>> tagger = MinGRUTagger.load("tagger.pt")  # doctest: +SKIP

    References:
        flair 0.15, `flair/models/sequence_tagger_model.py`.
    """

    def __init__(self, *args: Any, rnn_type: str = "GRU", rnn_layers: int = 2, **kwargs: Any) -> None:
        super().__init__(*args, rnn_type=rnn_type, rnn_layers=rnn_layers, **kwargs)

    @staticmethod
    def RNN(  # noqa: N802 (the name in flair)
        rnn_type: str, rnn_layers: int, hidden_size: int, bidirectional: bool, rnn_input_dim: int
    ) -> Any:
        """Return the layers of a new tagger."""
        check_choice("MinGRUTagger", "rnn_type", rnn_type, ("GRU", "LSTM", "GRU"))
        dropout = 0.0 if rnn_layers == 1 else 0.5
        options = {"bidirectional": bidirectional, "dropout": dropout, "norm": "rms", "residual": True}
        options |= {"cell": "gru"} if rnn_type == "GRU" else {}
        layer: Any = drop_in.LSTM if rnn_type == "LSTM" else drop_in.GRU
        return layer(rnn_input_dim, hidden_size, rnn_layers, batch_first=True, **options)

    def _get_state_dict(self) -> dict[str, Any]:
        # The layers with their options. Their tensors are those of the state_dict, so that the file has them once.
        return {**super()._get_state_dict(), "rnn": self.rnn if self.use_rnn else None}

    @classmethod
    def _init_model_with_state_dict(cls, state: dict[str, Any], **kwargs: Any) -> Any:
        return super()._init_model_with_state_dict(state, rnn=state["rnn"], **kwargs)
