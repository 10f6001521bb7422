"""flair's SequenceTagger: training, saving and loading.

`pip install flair` is not in the extra `integrations`, because it takes over a minute.
"""

import pytest
import torch

pytest.importorskip("flair", reason="pip install flair")
from flair import data, datasets, embeddings, nn
from flair.trainers import ModelTrainer

from mingru import drop_in
from mingru.integrations.flair import MinGRUTagger

# Of the libraries that flair uses.
pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = {
    "the dog saw a cat": "DNVDN",
    "a cat ran": "DNV",
    "the old dog ran home": "DANVN",
    "dog": "N",
    "a dog ran": "DNV",
}


@pytest.fixture
def corpus():
    sentences = []
    for words, tags in TEXT.items():
        sentences.append(data.Sentence(words))
        for token, tag in zip(sentences[-1], tags, strict=True):
            token.add_label("pos", tag)
    return data.Corpus(*[datasets.FlairDatapointDataset(sentences)] * 3, sample_missing_splits=False)


def make(corpus, **options):
    tags = corpus.make_label_dictionary("pos", add_unk=False)
    words = embeddings.OneHotEmbeddings.from_corpus(corpus, min_freq=1, embedding_length=6)
    return MinGRUTagger(words, tags, "pos", **{"hidden_size": 8, "locked_dropout": 0.0, "word_dropout": 0.0, **options})


def scores(tagger, corpus):
    with torch.no_grad():
        return tagger.eval().forward(*tagger._prepare_tensors(sorted(corpus.train, key=len, reverse=True)))


def given():
    return drop_in.LSTM(6, 5, 3, batch_first=True, candidate="tanh", proj_size=0)


OPTIONS = [{}, {"rnn_type": "LSTM", "use_crf": False}, {"rnn_type": "GRU"}, {"rnn": given}, {"use_rnn": False}]


@pytest.mark.parametrize("options", OPTIONS)
def test_training_saving_and_loading(options, corpus, tmp_path):
    tagger = make(corpus, **{name: x() if callable(x) else x for name, x in options.items()})
    if not options:
        given = {"batch_first": True, "bidirectional": True, "dropout": 0.5, "norm": "rms", "residual": True}
        assert repr(tagger.rnn) == repr(drop_in.GRU(6, 8, 2, **given))
    rnn = tagger.rnn if tagger.use_rnn else tagger.linear
    before = [x.detach().clone() for x in rnn.parameters()]
    ModelTrainer(tagger, corpus).train(tmp_path, max_epochs=2, mini_batch_size=2, create_file_logs=False)
    assert not any(torch.equal(x, old) for x, old in zip(rnn.parameters(), before, strict=True))
    expected = scores(tagger, corpus)
    tagger.save(tmp_path / "tagger.pt")
    for load in (MinGRUTagger.load, nn.Classifier.load):
        loaded = load(tmp_path / "tagger.pt")
        assert type(loaded) is MinGRUTagger and repr(loaded) == repr(tagger)
        torch.testing.assert_close(scores(loaded, corpus), expected, rtol=0, atol=0)


def test_wrong_type(corpus):
    with pytest.raises(ValueError, match=r"rnn_type must be one of \('GRU', 'LSTM', 'GRU'\), got 'RNN'"):
        make(corpus, rnn_type="RNN")
