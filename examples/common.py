"""What the programs share: refusals, checkpoints, devices, progress and logs. A program uses it like this:

    parser = Parser(__file__, __doc__, quick={"num_steps": 50, "seeds": [0]})       # smaller numbers for --quick
    parser.add_argument("--num-steps", type=at_least(1), default=1000, help="training steps")
    parser.add_output("--plot", default=Path("name.png"), help="picture to write")  # an output may be None
    args = parser.parse_args(argv)
    run = Run(parser, args, free=["seeds"])          # refuses wrong files; a resumed run may have other seeds
    for seed in args.seeds:
        error = run.once(f"seed {seed}", train, run, seed, args)       # trains, or reads the result from the checkpoint
        run.print(f"{seed:4} {error:.3f}")

    def train(run, seed, args):
        torch.manual_seed(seed)
        ...
        model, optimizer = run.fabric.setup(model, optimizer)
        for step in run.steps(args.num_steps, model, optimizer, schedule):          # all that a step changes
            x, y = run.fabric.to_device(batch())
            ...
            run.fabric.backward(loss)
            run.log(loss=loss)
        return evaluate(model)                       # numbers, strings, tensors, and lists and dicts of them

A program that trains one model calls `run.steps` without `run.once`. `fail(message)` stops a program with one line,
`installed` finds the files of a package, and `write` replaces a file in one operation.
"""

import argparse
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


def fail(message: str) -> NoReturn:
    """Stop the program with a message of one line."""
    sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}")


EXTRA = 'run `pip install ".[examples]"` in a clone of the repository'
try:
    # All packages of the extra "examples" that programs import at the top.
    import numpy  # noqa: F401
    import safetensors  # noqa: F401
    import torch
    from lightning_fabric import Fabric
    from torch import Tensor, nn
    from tqdm import tqdm
except ModuleNotFoundError as error:
    fail(f"the package {error.name} is not installed; {EXTRA}")

# If stderr is not a terminal, progress is a line every so many seconds.
PLAIN_EVERY = 30
PLAIN_FORMAT = "{desc}: step {n}/{total}{postfix}, {rate_fmt}, {remaining} left"


def at_least(least: float, kind: type = int, most: float = math.inf) -> Callable[[str], Any]:
    """Return the type of an option that is a number from `least` to `most`."""
    what = "an integer" if kind is int else "a number"
    expected = f"{what} of at least {least}" if most == math.inf else f"{what} from {least} to {most}"

    def parse(text: str) -> Any:
        try:
            if least <= kind(text) <= most:
                return kind(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")

    return parse


def positive(text: str) -> float:
    """Return a number above 0; the type of an option."""
    value = at_least(0, float)(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def installed(package: str, fix: str) -> Path:
    """Return the folder of a package. It is not imported, because its import may need other packages."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        fail(f"the package {package} is not installed; {fix}")
    return Path((spec.submodule_search_locations or [spec.origin])[0])


def target(path: Path) -> Path:
    """Return the path with symbolic links resolved, so that writing does not replace a link."""
    return Path(os.path.realpath(path))


def temporary(path: Path) -> Path:
    return target(path).with_name(target(path).name + ".tmp")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fail(f"cannot write {path} ({error.strerror or error}); check the disk, or name another file")


def write(path: Path, content: bytes) -> None:
    """Replace a file in one operation: a program that is killed here leaves the old file or the new one."""
    with writing(path):
        try:
            temporary(path).write_bytes(content)
            os.replace(temporary(path), target(path))
        finally:
            temporary(path).unlink(missing_ok=True)


def write_json(path: Path, contents: Any) -> None:
    write(path, (json.dumps(contents, indent=1) + "\n").encode())


def write_figure(path: Path, figure: Any) -> None:
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower())
    write(path, content.getvalue())


def check_writable(path: Path) -> None:
    with writing(path):
        if target(path).is_dir():
            raise OSError("it is a folder")
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")
        if path.exists() and not os.access(path, os.W_OK):
            raise OSError("it is read-only")
        # The temporary file is tested, because its name is longer than that of the file, and may be too long.
        temporary(path).touch()
        temporary(path).unlink(missing_ok=True)  # other processes of the run delete it too


def check_folder(path: Path) -> None:
    """Create a folder if there is none, and stop the program if its files could not be written."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def check_plot(path: Path) -> None:
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError:
        fail(f"--plot needs the package matplotlib; {EXTRA}")
    endings = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in endings:
        fail(f"--plot must end in one of .{', .'.join(endings)}, got {path}")


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def widest(build: Callable[[int], nn.Module], most: int, first: int = 1, step: int = 1) -> Any:
    """Return the widest model of at most this many parameters. The widths are `first`, `first + step`, ..."""
    widths = itertools.count(first, step)
    return build(next(width for width in widths if num_parameters(build(width + step)) > most))


def one_cycle(optimizer: torch.optim.Optimizer, rate: float, num_steps: int) -> Any:
    """Return a schedule that raises the learning rate to `rate` in the first tenth of the steps, and then lowers it."""
    # At least 20, because the rate must rise for at least one step.
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(num_steps, 20), pct_start=0.1)


def check_shapes(found: Mapping[str, Any], module: nn.Module, path: Path) -> None:
    """Stop the program if the tensors in a file are not those of a module."""

    def shapes(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {name: tuple(value.shape) for name, value in tensors.items() if isinstance(value, Tensor)}

    found, expected = shapes(found), shapes(module.state_dict())
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            is_found, is_expected = found.get(name, "missing"), expected.get(name, "no such tensor")
            fail(f"{path} does not match this model: {name} is {is_found}, expected {is_expected}")


class Parser(argparse.ArgumentParser):
    """A parser with the options of all programs. It refuses in one line, and shows defaults in the help.

    Args:
        file: `__file__` of the program.
        doc: Its docstring, whose first line is the description.
        quick: The defaults that `--quick` replaces.
        save_every: Default of `--save-every`.
        accelerator: Default of `--accelerator`.
    """

    def __init__(
        self, file: str, doc: str, *, quick: Mapping[str, Any], save_every: int = 100, accelerator: str = "auto"
    ) -> None:
        super().__init__(
            prog=Path(file).name,
            description=doc.splitlines()[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.quick, self.outputs = quick, ["checkpoint"]
        add = self.add_argument_group("all programs").add_argument
        add("--quick", action="store_true", help="run the whole program with smaller numbers, in less than a minute")
        add("--checkpoint", type=Path, help="file to save to and, with --resume, to continue from")
        add("--resume", action="store_true", help="continue from --checkpoint")
        add("--save-every", type=at_least(1), default=save_every, help="training steps between checkpoints")
        add("--log", type=Path, help="folder for CSV and TensorBoard logs")
        add("--accelerator", choices=("auto", "cpu", "cuda", "mps"), default=accelerator, help="device type")
        add("--precision", choices=("32-true", "bf16-mixed", "bf16-true"), default="32-true", help="float precision")

    def error(self, message: str) -> NoReturn:
        fail(message)

    def add_output(self, option: str, default: Path | None = None, help: str = "") -> None:
        """Add an option for a file to write, which is checked before the training. The option may be --plot."""
        self.outputs.append(self.add_argument(option, type=Path, default=default, help=help).dest)

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        args = super().parse_args(argv)
        assert self.quick.keys() <= vars(args).keys()
        if args.quick:
            self.set_defaults(**self.quick)
            args = super().parse_args(argv)
        return args


class Run:
    """The training of the models of a program: checkpoint, device, progress and logs.

    Args:
        parser: The program's parser.
        args: Its options. All of them must be as in the checkpoint of a resumed run, except `free` ones, outputs, and
            options about devices, logs and checkpoints.
        free: Options in which a resumed run may differ.
        more: Other values that must be as in the checkpoint.
    """

    def __init__(self, parser: Parser, args: argparse.Namespace, free: Sequence[str] = (), **more: Any) -> None:
        self.args = args
        not_settings = {"quick", "resume", "save_every", "log", "accelerator", "devices", *parser.outputs, *free}
        options = {name: value for name, value in vars(args).items() if name not in not_settings}
        # As a checkpoint holds them: paths are strings, and tuples are lists.
        self.settings = json.loads(json.dumps({"program": parser.prog, **options, **more}, default=str))
        self.name, self.metrics, self.loggers = "", {}, []
        self.results: dict[str, Any] = {}
        self.unfinished: dict[str, dict[str, Any]] = {}
        self.current: tuple[int, Sequence[Any]] | None = None

        outputs = {name: getattr(args, name) for name in parser.outputs if getattr(args, name)}
        for name, path in outputs.items():
            same = [other for other in outputs if target(outputs[other]) == target(path)]
            if len(same) > 1:
                fail(f"--{' and --'.join(same)} must be different files, got {path} for both")
            if name == "plot":
                check_plot(path)
            check_writable(path)
        if args.log:
            if not importlib.util.find_spec("tensorboardX"):
                installed("tensorboard", "run `pip install tensorboard`, or omit --log")
            check_folder(args.log)
        if args.resume:
            self._load()
        elif args.checkpoint and args.checkpoint.exists():
            fail(f"--checkpoint must be a new file, got {args.checkpoint}; add --resume, or name another file")
        try:
            self.fabric = Fabric(
                accelerator=args.accelerator, devices=getattr(args, "devices", 1), precision=args.precision
            )
        except (RuntimeError, ValueError) as error:
            fail(f"--accelerator must be one of this machine, got {args.accelerator} ({error}); use --accelerator auto")
        # After the checks, because the other processes run the program from the top.
        self.fabric.launch()

    def once(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(*arguments)`, or what it returned before the checkpoint was saved."""
        if name not in self.results:
            self.name = name
            self.results[name] = function(*arguments)
            self.current = None
            self.unfinished.pop(name, None)
            self.save()
        return self.results[name]

    def steps(self, num_steps: int | None, *objects: Any) -> Iterator[int]:
        """Yield the numbers of the training steps, beginning after those in the checkpoint.

        After every `--save-every` steps, and after the last one, the checkpoint is saved.

        Args:
            num_steps: Number of steps, or None for an endless loop.
            objects: All that the steps change: objects with `state_dict` and `load_state_dict`, tensors, lists,
                `torch.Generator` and `random.Random`. The generators of torch and of the device need not be passed.
        """
        first = self._restore(objects)
        self.metrics, self.loggers = {}, self._make_loggers() if self.args.log else []
        is_terminal = sys.stderr.isatty()
        plain = {"file": io.StringIO(), "bar_format": PLAIN_FORMAT, "mininterval": PLAIN_EVERY}
        bar = tqdm(
            **({} if is_terminal else plain),
            initial=first,
            total=num_steps,
            desc=self.name or "training",
            unit=" steps",
            miniters=1,
            leave=False,
            disable=not self.fabric.is_global_zero,
        )
        try:
            for step in itertools.count(first) if num_steps is None else range(first, num_steps):
                self.current = (step, objects)
                yield step
                done = step + 1
                self.current = (done, objects)
                if self.args.checkpoint and (done % self.args.save_every == 0 or done == num_steps):
                    self.save()
                if bar.update():
                    metrics = (f"{name} {float(value):.4g}" for name, value in self.metrics.items())
                    bar.set_postfix_str(", ".join(metrics), refresh=is_terminal)
                    if not is_terminal:
                        print(bar, file=sys.stderr, flush=True)
        finally:
            self.ended = clocks()
            bar.close()
            self._each_logger("finalize", "success")

    @property
    def seconds(self) -> float:
        """Seconds of the latest training so far, those before an interruption included."""
        return (self.ended or clocks())[0] - self.began[0]

    @property
    def processor_seconds(self) -> float:
        return (self.ended or clocks())[1] - self.began[1]

    def log(self, **metrics: Tensor | float) -> None:
        """Show these numbers of this step beside the bar, and write them to the logs."""
        self.metrics = {name: value.detach() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        if self.loggers:
            step = self.current[0] + 1 if self.current else 0
            self._each_logger("log_metrics", {name: float(value) for name, value in self.metrics.items()}, step)

    def print(self, *values: Any) -> None:
        """Print a line, above the bar if there is one, and only once if there are several processes."""
        if self.fabric.is_global_zero:
            tqdm.write(" ".join(map(str, values)), sys.stdout)
            sys.stdout.flush()

    def save(self) -> None:
        """Save the checkpoint, if there is to be one. All processes must call this."""
        if not self.args.checkpoint:
            return
        # Logs first, so that they have all steps of the checkpoint.
        self._each_logger("save")
        if self.current:
            self.unfinished[self.name] = {
                "step": self.current[0],
                "seconds": (self.seconds, self.processor_seconds),
                "random": [module.get_rng_state() for module in self._with_random_state()],
                "objects": [state_of(each) for each in self.current[1]],
            }
        if self.fabric.is_global_zero:
            contents = {"settings": self.settings, "results": self.results, "unfinished": self.unfinished}
            file = io.BytesIO()
            torch.save(contents, file)
            # An object that `_load` could not read raises an error here, before the last checkpoint is replaced.
            torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            write(self.args.checkpoint, file.getvalue())

    def _load(self) -> None:
        """Read the results and the unfinished training from the checkpoint."""
        path, fix = self.args.checkpoint, "name a checkpoint of this program, or start again without --resume"
        if not path:
            fail("--resume needs --checkpoint; name the file to continue from")
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except OSError as error:
            fail(f"cannot read {path} ({error.strerror}); {fix}")
        except zipfile.BadZipFile:
            damaged = "all"
        if damaged:
            fail(f"{path} is damaged, incomplete or not a checkpoint; {fix}")
        try:
            contents = torch.load(path, map_location="cpu", weights_only=True)
            settings, self.results, self.unfinished = (contents[name] for name in ("settings", "results", "unfinished"))
            program = settings["program"]
        except Exception:  # files of other programs raise errors of many types
            fail(f"{path} is not a checkpoint of {self.settings['program']}; {fix}")
        if program != self.settings["program"] or settings.keys() != self.settings.keys():
            fail(f"{path} is a checkpoint of {program} with other options; {fix}")
        for name, value in settings.items():
            if value != self.settings[name]:
                option = "--" + name.replace("_", "-")
                fail(f"{option} must be {value}, as in {path}, got {self.settings[name]}; give the same {option}")

    def _restore(self, objects: Sequence[Any]) -> int:
        """Load the states of the objects if the checkpoint has them, and return the number of steps done."""
        start = self.unfinished.get(self.name, {"step": 0, "seconds": (0.0, 0.0)})
        seconds, processor_seconds = start["seconds"]
        self.began, self.ended = (clocks()[0] - seconds, clocks()[1] - processor_seconds), None
        self.current = (start["step"], objects)
        if not start["step"]:
            return 0
        try:
            for thing, state in zip(objects, start["objects"], strict=True):
                if isinstance(thing, nn.Module):
                    check_shapes(state, thing, self.args.checkpoint)
                load_state(thing, self.fabric.to_device(state) if isinstance(thing, list) else state)
            # On another kind of device, its random numbers are new.
            for module, state in zip(self._with_random_state(), start["random"], strict=False):
                module.set_rng_state(state)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            fail(f"{self.args.checkpoint} does not match this program: {error}; start again without --resume")
        return start["step"]

    def _with_random_state(self) -> list[Any]:
        device = self.fabric.device.type
        return [torch] if device == "cpu" else [torch, torch.get_device_module(device)]

    def _make_loggers(self) -> list[Any]:
        """Return loggers in a new folder version_0, version_1, ..., so that a resumed run leaves the first logs."""
        from lightning_fabric.loggers import CSVLogger, TensorBoardLogger

        name = re.sub(r"[^\w.]+", "-", self.name)
        table = CSVLogger(self.args.log, name)
        return [table, TensorBoardLogger(self.args.log, name, table.version)]

    def _each_logger(self, method: str, *arguments: Any) -> None:
        with writing(self.args.log or Path()):
            for logger in self.loggers:
                getattr(logger, method)(*arguments)


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def state_of(thing: Any) -> Any:
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if isinstance(thing, random.Random):
        return thing.getstate()
    return thing if isinstance(thing, (Tensor, list)) else thing.state_dict()


def load_state(thing: Any, state: Any) -> None:
    if isinstance(thing, torch.Generator):
        thing.set_state(state)
    elif isinstance(thing, random.Random):
        thing.setstate(state)
    elif isinstance(thing, Tensor):
        thing.copy_(state)
    elif isinstance(thing, list):
        thing[:] = state
    else:
        thing.load_state_dict(state)
