"""Time a training step of a tagger of sentences: with packed sequences, and with `lengths=`.

    python benchmarks/tagger.py

The tagger is an embedding, a bidirectional layer and a linear map. Lengths are random, between 1 and the longest.
"""

import argparse
import functools

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mingru import drop_in
from mingru.bench import medians_ms, print_table, where

BATCH, FEATURES, WORDS, TAGS = 32, 128, 1000, 20
LONGEST = [40, 400]
LAYERS = {
    "nn.GRU, packed": nn.GRU,
    "nn.LSTM, packed": nn.LSTM,
    "drop_in.GRU, packed": drop_in.GRU,
    "drop_in.LSTM, packed": drop_in.LSTM,
    "drop_in.GRU, lengths=": drop_in.GRU,
    "drop_in.LSTM, lengths=": drop_in.LSTM,
    "packed without a layer": None,
}


class Tagger(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.is_packed = "packed" in name
        self.embedding = nn.Embedding(WORDS, FEATURES)
        kind = LAYERS[name]
        self.rnn = None if kind is None else kind(FEATURES, FEATURES // 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(FEATURES, TAGS)

    def forward(self, words, lengths):
        x = self.embedding(words)
        if not self.is_packed:
            return self.head(self.rnn(x, lengths=lengths)[0])
        x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x = x if self.rnn is None else self.rnn(x)[0]
        return self.head(pad_packed_sequence(x, batch_first=True, total_length=words.shape[1])[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="seconds for each length (default: %(default)s)")
    parser.add_argument("--longest", type=int, nargs="*", default=LONGEST, help="longest sentences (default: 40 400)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, value in where().items():
        print(f"{name}: {value}")
    taken = []
    for longest in args.longest:
        torch.manual_seed(0)
        words, lengths = torch.randint(WORDS, (BATCH, longest)), torch.randint(1, longest + 1, (BATCH,))
        lengths[0] = longest

        def step(tagger, words=words, lengths=lengths):
            tagger.zero_grad()
            tagger(words, lengths).square().mean().backward()

        calls = {name: functools.partial(step, Tagger(name)) for name in LAYERS}
        taken.append(medians_ms(calls, args.seconds, 3))
    rows = [[name, *(f"{each[name]:.3g}" for each in taken)] for name in LAYERS]
    print_table("ms of a training step", ["layer", *(f"up to {longest} words" for longest in args.longest)], rows)


if __name__ == "__main__":
    main()
