"""What the programs share: refusals, files, options, checkpoints, progress and logs. A program uses it like this:

    parser = Parser(__file__, __doc__, {"num_steps": 50, "seeds": [0]}, models=MODELS, num_steps=1000, plot="name.png")
    parser.add_argument("--noise", type=at_least(0, float), default=0.1, help="...")    # an option of its own
    args = parser.parse_args(argv)                                # with --quick, the smaller numbers are the defaults
    run = Run(parser, args)                                       # refuses wrong files
    for name in args.models:
        errors = run.each_seed(name, train, name, data)           # trains, or reads results from the checkpoint
        run.print(f"{name:8} {spread(errors, 6, '.3f')}")

    def train(run, name, data, seed):
        torch.manual_seed(seed)

        def loss_of(model, step):
            x, y = run.fabric.to_device(batch())
            return F.cross_entropy(model(x), y)

        model = run.train(run.args.num_steps, loss_of, Model())
        return evaluate(model)                        # numbers, strings, tensors, and lists and dicts of them

Other kinds of training are loops over `run.steps`. A program that trains one model needs no `run.once`.
"""

import argparse
import importlib.util
import io
import itertools
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn


def fail(message: str) -> NoReturn:
    """Stop the program with a message of one line."""
    sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}")


try:
    # All packages of the extra "examples" that programs import at the top.
    import gymnasium  # noqa: F401
    import numpy  # noqa: F401
    import safetensors  # noqa: F401
    import torch
    from lightning_fabric import Fabric
    from lightning_fabric.loggers import CSVLogger, TensorBoardLogger
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from torch import Tensor, nn
    from tqdm import tqdm
except ModuleNotFoundError as error:
    fail(f'the package {error.name} is not installed; run `pip install ".[examples]"` in a clone of the repository')


def at_least(least: float, kind: type = int, most: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """Return the type of an option that is a number from `least` to `most`, or finite and above `least`."""
    what = "an integer" if kind is int else "a number"
    limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
    expected = f"{what} above {least}" if above else f"{what} {limits}"

    def parse(text: str) -> Any:
        with suppress(ValueError):
            value = kind(text)
            if least < value < most if above else least <= value <= most:
                return value
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")

    return parse


positive = at_least(0, float, above=True)


def installed(package: str, fix: str) -> Path:
    """Return the folder of a package. It is not imported, because its import may need other packages."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        fail(f"the package {package} is not installed; {fix}")
    return Path((spec.submodule_search_locations or [spec.origin])[0])


@contextmanager
def reading(path: Path, expected: str, fix: str = "check the path") -> Iterator[None]:
    """Stop the program if the block cannot read a file. `fix` says what to do if there is none."""
    try:
        yield
    except FileNotFoundError:
        fail(f"there is no file {path}; {fix}")
    except KeyError as error:
        fail(f"{path} must be {expected}, got no {error}")
    except (EOFError, IndexError, OSError, TypeError, ValueError, wave.Error) as error:
        fail(f"{path} must be {expected}, got {error}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Stop the program if the block cannot write a file."""
    try:
        yield
    except OSError as error:
        fail(f"cannot write {path} ({error.strerror or error}); check the disk, or name another file")


def temporary(path: Path) -> Path:
    """Return a path beside a file, or beside the target of a link, which then remains a link."""
    return path.resolve().with_name(f"{path.resolve().name}.tmp")


def write(path: Path, content: bytes) -> None:
    """Replace a file in one operation: a program that is killed here leaves the old file or the new one."""
    with writing(path):
        try:
            temporary(path).write_bytes(content)
            os.replace(temporary(path), path.resolve())
        finally:
            temporary(path).unlink(missing_ok=True)


@contextmanager
def drawing(path: Path, width: float, height: float, dpi: int = 150, **style: Any) -> Iterator[Any]:
    """Give the block a figure to draw, and write it to a file. `style`: matplotlib's parameters, with "_" for "."."""
    style = {"axes_grid": True, "grid_alpha": 0.3, **style}
    with rc_context({name.replace("_", "."): value for name, value in style.items()}):
        figure, content = Figure(figsize=(width, height), dpi=dpi, layout="constrained"), io.BytesIO()
        yield figure
    figure.savefig(content, format=path.suffix[1:].lower())
    write(path, content.getvalue())
    print(f"saved {path}", file=sys.stderr)


def draw_runs(axes: Any, x: Sequence[float], runs: Any, **style: Any) -> None:
    """Draw the mean over the runs, and each run in a light color."""
    axes.plot(x, torch.as_tensor(runs).mean(0), **style)
    for run in runs if len(runs) > 1 else ():
        axes.plot(x, run, color=style["color"], alpha=0.25, linewidth=0.8)


def check_output(option: str, path: Path) -> None:
    """Stop the program if a file could not be written, or is a picture of an unknown format."""
    endings = Figure().canvas.get_supported_filetypes()
    if option == "plot" and path.suffix[1:].lower() not in endings:
        fail(f"--plot must end in one of .{', .'.join(endings)}, got {path}")
    with writing(path):
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")
        # The temporary file is tested, because its name is longer than that of the file, and may be too long.
        temporary(path).touch()
        temporary(path).unlink(missing_ok=True)  # other processes of the run delete it too


def check_folder(path: Path) -> None:
    """Create a folder if there is none, and stop the program if its files could not be written."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def widest(build: Callable[[int], nn.Module], most: int, first: int = 1, step: int = 1) -> Any:
    """Return the widest model of at most this many parameters. The widths are `first`, `first + step`, ..."""
    widths = itertools.count(first, step)
    return build(next(width for width in widths if num_parameters(build(width + step)) > most))


def one_cycle(optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
    """Return a schedule that raises the learning rate to its value in the first tenth of the steps, and lowers it."""
    # At least 20, because the rate must rise for at least one step.
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], max(num_steps, 20), pct_start=0.1)


def warmup_cosine(optimizer: torch.optim.Optimizer, num_steps: int, share: float) -> Any:
    """Return a schedule that raises the learning rate in this share of the steps, and lowers it to 0 by a cosine."""
    num_warmup = max(1, round(share * num_steps))

    def factor(step: int) -> float:
        position = (step - num_warmup) / max(1, num_steps - num_warmup)
        return (step + 1) / num_warmup if position < 0 else (1 + math.cos(math.pi * position)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def spread(values: Sequence[float], width: int, form: str) -> str:
    """Return the mean of values, whose text has at least this width, and half of their range."""
    return f"{statistics.mean(values):{width}{form}} ± {(max(values) - min(values)) / 2:{form}}"


# Options that several programs have, each with its type and its help.
OPTIONS: dict[str, tuple[Any, str]] = {
    "models": (str, "models to train"),
    "seeds": (at_least(0), "random seeds of weights and training data"),
    "num_steps": (at_least(1), "training steps of each model"),
    "num_parameters": (at_least(1000), "largest number of parameters of each model"),
    "batch_size": (at_least(1), "examples in each training step"),
    "hidden_dims": (at_least(2), "features of each layer"),
    "num_layers": (at_least(1), "number of layers"),
    "learning_rate": (positive, "highest learning rate"),
    "plot": (Path, "picture to write"),
}


# What pictures call models.
LABELS = {"mingru.GRU": "GRU of mingru", "nn.GRU": "GRU of torch", "nn.LSTM": "LSTM of torch"}
LABELS |= {"mixed": "minGRU, states can turn"}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A form of `--help` that shows defaults which say something, and examples in their own lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser with the options of all programs. It refuses in one line, and shows defaults in the help.

    Args:
        file: `__file__` of the program.
        doc: Its docstring, whose first line is the description, and whose commands are the examples of `--help`.
        quick: The defaults that `--quick` replaces.
        defaults: Defaults of those of OPTIONS that the program has, and of options of all programs.
    """

    def __init__(self, file: str, doc: str, quick: Mapping[str, Any], **defaults: Any) -> None:
        commands = "\n".join(["examples:", *re.findall(r"^    (?:pip|apt-get|python) .*", doc, re.MULTILINE)])
        super().__init__(Path(file).name, "%(prog)s [options]", doc.splitlines()[0], commands, formatter_class=Help)
        self.quick, self.outputs, self.error = quick, ["checkpoint"], fail
        self.add("--quick", action="store_true", help="run the whole program with smaller numbers, in under a minute")
        add = self.add_argument_group("checkpoints, logs and devices").add_argument
        add("--checkpoint", type=Path, help="file to save to and, with --resume, to continue from")
        add("--resume", action="store_true", help="continue from --checkpoint")
        add("--save-every", type=at_least(1), default=100, help="training steps between checkpoints")
        add("--log", type=Path, help="folder for CSV and TensorBoard logs")
        add("--accelerator", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="device type")
        add("--precision", choices=("32-true", "bf16-mixed", "bf16-true"), default="32-true", help="float precision")
        defaults = {**({"seeds": (0, 1, 2)} if "models" in defaults else {}), **defaults}
        for name, (kind, text) in OPTIONS.items():
            if name in defaults:
                several = {"nargs": "+"} if name in ("models", "seeds") else {}
                choices = defaults[name] if name == "models" else None
                self.add_argument(f"--{name.replace('_', '-')}", type=kind, choices=choices, help=text, **several)
        self.set_defaults(**defaults)
        self.outputs += ["plot"] if "plot" in defaults else []

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        return super().add_argument(*names, *["--lr"] * ("--learning-rate" in names), **options)

    add = add_argument

    def add_output(self, option: str, text: str) -> None:
        """Add an option for a file to write, which is checked before the training."""
        self.outputs.append(self.add_argument(option, type=Path, help=text).dest)

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        args = super().parse_args(argv)
        if args.quick:
            self.set_defaults(**self.quick)
            args = super().parse_args(argv)
        return args


class Run:
    """The training of the models of a program: checkpoint, device, progress and logs.

    Args:
        parser: The program's parser.
        args: Its options. All of them must be as in the checkpoint of a resumed run, except `free` ones, models, seeds,
            outputs, and options about devices, logs and checkpoints.
        free: Options in which a resumed run may differ.
        more: Other values that must be as in the checkpoint.
    """

    def __init__(self, parser: Parser, args: argparse.Namespace, free: Sequence[str] = (), **more: Any) -> None:
        self.args, self.name, self.done, self.metrics, self.loggers = args, "", 0, {}, []
        self.results, self.unfinished = {}, {}
        ignored = {"quick", "resume", "save_every", "log", "accelerator", "devices", "models", "seeds"}
        ignored |= {*parser.outputs, *free}
        options = {name: value for name, value in vars(args).items() if name not in ignored}
        # As a checkpoint holds them: paths are strings, and tuples are lists.
        self.settings = json.loads(json.dumps({"program": parser.prog, **options, **more}, default=str))

        for option in parser.outputs:
            if path := getattr(args, option):
                check_output(option, path)
        if args.log:
            installed("tensorboard", "run `pip install tensorboard`, or omit --log")
            check_folder(args.log)
        if args.resume:
            self._load()
        elif args.checkpoint and args.checkpoint.exists():
            fail(f"--checkpoint must be a new file, got {args.checkpoint}; add --resume, or name another file")
        try:
            devices = getattr(args, "devices", 1)
            self.fabric = Fabric(accelerator=args.accelerator, devices=devices, precision=args.precision)
        except (RuntimeError, ValueError) as error:
            fail(f"--accelerator must be one of this machine, got {args.accelerator} ({error}); use --accelerator auto")
        device = self.fabric.device.type
        self.random = [torch] if device == "cpu" else [torch, torch.get_device_module(device)]
        # After the checks, because the other processes run the program from the top.
        self.fabric.launch()

    def once(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(run, *arguments)`, or what it returned before the checkpoint was saved."""
        if name not in self.results:
            self.name = name
            self.results[name] = function(self, *arguments)
            self.unfinished.pop(name, None)
            self.save()
        return self.results[name]

    def each_seed(self, name: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what `function(run, *arguments, seed)` returns for each of `--seeds`."""
        return [self.once(f"{name}, seed {seed}", function, *arguments, seed) for seed in self.args.seeds]

    def train(
        self, num_steps: int, loss_of: Any, model: Any, *more: Any, schedule_of: Any = None, max_norm=1.0, **adamw: Any
    ) -> nn.Module:
        """Minimize `loss_of(model, step)`, and return the model for evaluation.

        Args:
            num_steps: Number of steps.
            loss_of: Function that draws a batch and returns the loss.
            model: Model.
            more: Other objects that `loss_of` changes, as in `steps`.
            schedule_of: Function of the optimizer and the number of steps that returns the schedule of the learning
                rate; by default `one_cycle`.
            max_norm: Norm to which larger gradients are scaled down.
            adamw: Options of AdamW. The learning rate is --learning-rate by default.
        """
        optimizer = torch.optim.AdamW(model.parameters(), adamw.pop("lr", None) or self.args.learning_rate, **adamw)
        schedule = (schedule_of or one_cycle)(optimizer, num_steps)
        model, optimizer = self.fabric.setup(model, optimizer)
        for step in self.steps(num_steps, model, optimizer, schedule, *more):
            loss = loss_of(model, step)
            optimizer.zero_grad()
            self.fabric.backward(loss)
            self.fabric.clip_gradients(model, optimizer, max_norm=max_norm)
            optimizer.step()
            schedule.step()
            self.log(loss=loss)
        return model.eval()

    def steps(self, num_steps: int | None, *objects: Any) -> Iterator[int]:
        """Yield the numbers of the training steps, beginning after those in the checkpoint.

        After every `--save-every` steps, and after the last one, the checkpoint is saved.

        Args:
            num_steps: Number of steps, or None for an endless loop.
            objects: All that the steps change: objects with `state_dict` and `load_state_dict`, tensors and lists. The
                generators of torch and of the device need not be passed.
        """
        self._restore(objects)
        if self.args.log:
            # In a new folder version_0, version_1, ..., so that a resumed run leaves the first logs.
            table = CSVLogger(self.args.log, re.sub(r"[^\w.]+", "-", self.name))
            self.loggers = [table, TensorBoardLogger(self.args.log, table.name, table.version)]
        options = {"desc": self.name or "training", "unit": " steps", "miniters": 1, "leave": False}
        # None: there is a bar if stderr is a terminal.
        disable = None if self.fabric.is_global_zero else True
        bar = tqdm(initial=self.done, total=num_steps, disable=disable, **options)
        try:
            while num_steps is None or self.done < num_steps:
                yield self.done
                self.done += 1
                if self.done % self.args.save_every == 0 or self.done == num_steps:
                    self.save(*objects)
                if bar.update():
                    bar.set_postfix({name: float(value) for name, value in self.metrics.items()})
        finally:
            bar.close()
            for logger in self.loggers:
                logger.finalize("success")

    def log(self, **metrics: Tensor | float) -> None:
        """Show these numbers of this step beside the bar, write them to the logs, and read the clocks."""
        self.metrics = {name: value.detach() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        for logger in self.loggers:
            logger.log_metrics({name: float(value) for name, value in self.metrics.items()}, self.done + 1)
        self.seconds, self.processor_seconds = self._spent()

    def print(self, *values: Any) -> None:
        """Print a line, above the bar if there is one, and only once if there are several processes."""
        if self.fabric.is_global_zero:
            tqdm.write(" ".join(map(str, values)), sys.stdout)
            sys.stdout.flush()

    def save(self, *objects: Any) -> None:
        """Save the checkpoint, if there is to be one, with these objects of an unfinished training."""
        if not self.args.checkpoint:
            return
        # Logs first, so that they have all steps of the checkpoint.
        for logger in self.loggers:
            logger.save()
        if objects:
            random = [module.get_rng_state() for module in self.random]
            states = [each.state_dict() if hasattr(each, "state_dict") else each for each in objects]
            now = {"step": self.done, "seconds": self._spent(), "random": random, "objects": states}
            self.unfinished[self.name] = now
        if self.fabric.is_global_zero:
            file = io.BytesIO()
            torch.save({"settings": self.settings, "results": self.results, "unfinished": self.unfinished}, file)
            # An object that `_load` could not read raises an error here, before the last checkpoint is replaced.
            torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            write(self.args.checkpoint, file.getvalue())

    def _load(self) -> None:
        """Read the results and the unfinished training from the checkpoint."""
        path, program = self.args.checkpoint, self.settings["program"]
        if not path:
            fail("--resume needs --checkpoint; name the file to continue from")
        try:
            contents = torch.load(path, map_location="cpu", weights_only=True)
            settings, self.results, self.unfinished = (contents[name] for name in ("settings", "results", "unfinished"))
            if settings["program"] != program or settings.keys() != self.settings.keys():
                raise ValueError(f"a checkpoint of {settings['program']} with other options")
        except Exception as error:  # files of other programs raise errors of many types
            fix = f"name a checkpoint of {program}, or start again without --resume"
            fail(f"--checkpoint must be a file that {program} wrote, got {path} ({error}); {fix}")
        for name, value in settings.items():
            if value != self.settings[name]:
                option = "--" + name.replace("_", "-")
                fail(f"{option} must be {value}, as in {path}, got {self.settings[name]}; give the same {option}")

    def _restore(self, objects: Sequence[Any]) -> None:
        """Load the step, the clocks and the states of the objects, if the checkpoint has them."""
        start = self.unfinished.get(self.name, {"step": 0, "seconds": (0.0, 0.0)})
        self.done, (self.seconds, self.processor_seconds), self.metrics = start["step"], start["seconds"], {}
        self.began = time.perf_counter() - self.seconds, time.process_time() - self.processor_seconds
        if not self.done:
            return
        for each, state in zip(objects, start["objects"], strict=True):
            if hasattr(each, "load_state_dict"):
                each.load_state_dict(state)
            else:
                each[:] = self.fabric.to_device(state)
        # On another kind of device, its random numbers are new.
        for module, state in zip(self.random, start["random"], strict=False):
            module.set_rng_state(state)

    def _spent(self) -> tuple[float, float]:
        """Return the seconds and processor seconds of this training, those before an interruption included."""
        return time.perf_counter() - self.began[0], time.process_time() - self.began[1]
