"""One table of calls: every cell with every option, by every backend and by the float64 reference.

`check` compares a row of the table on a backend with the reference: one step and one sequence after the other, without
padding. The tests in this folder and `benchmarks/gpu/smoke.py` use the same table.
"""

import functools
import math
import os
from typing import NamedTuple

import reference
import torch
from options import CALLS, CANDIDATES, MEMORY, cover, lengths_of, steps_of
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import mingru
from mingru import ops
from mingru.ops import Context, Layout, autograd, modes, route, spec_of
from mingru.ops.backends import torch_in_graphs
from mingru.ops.cells import NUM_INPUTS
from mingru.ops.scan import LinearScan
from mingru.ops.shape import accumulate_dtype, from_parts, to_parts

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# A process in Triton's interpreter tests its kernels, and other processes the other backends.
BACKENDS = [name for name, can_run in mingru.backends().items() if can_run is True]
BACKENDS = ["triton"] if INTERPRETED else BACKENDS
# With the version of "torch" for graphs, which is not a backend of its own.
ALL = BACKENDS if INTERPRETED else [*BACKENDS, "traceable"]
NOT_LOG = [name for name in ALL if name != "log"]
SCANS = ("linear_scan", "complex_linear_scan", "quaternion_linear_scan")
CELLS = [*NUM_INPUTS, *SCANS]
TIMED = [name for name, cell in ops.cells.CELLS.items() if cell.not_timed is None]
HALF = (torch.bfloat16, torch.float16)


def device_of(backend):
    return torch.accelerator.current_accelerator() if backend == "triton" and not INTERPRETED else torch.device("cpu")


def parts_of(cell):
    """Return the number of features that are one number."""
    return {"complex_linear_scan": 2, "quaternion_linear_scan": 4}.get(cell) or ops.cells.parts_of(cell)


class Row(NamedTuple):
    """A call."""

    cell: str = "mingru"
    candidate: str = "positive"
    dtype: torch.dtype = torch.float32
    reverse: bool = False
    reset: bool = False
    dt: bool = False
    min_decay: float = 0.0
    batch_first: bool = True
    layout: str = "padded"
    memory: str = "contiguous"
    wide_state: bool = False
    """Whether states of half-width sequences are in float32."""
    steps: int = 17
    features: tuple[int, ...] = (7,)
    batch: int = 3
    tiling: str | None = None
    """How a Triton kernel divides its work; see conftest.py."""

    def __str__(self):
        default = Row(self.cell)
        fields = self._asdict().items()
        words = [f"{name}={value}" for name, value in fields if name == "dtype" or value != getattr(default, name)]
        return " ".join([self.cell, *words]).replace("torch.", "")


TOGETHER = {
    "parts of a tensor": lambda xs, dim: torch.cat(xs, dim).chunk(len(xs), dim),
    "different strides": lambda xs, dim: [xs[0], MEMORY["other dimension first"](xs[1]), *xs[2:]],
}
FACTORS = {
    "cell": CELLS,
    "candidate": CANDIDATES,
    "dtype": [torch.float64, torch.float32, *HALF],
    "reverse": [False, True],
    "dt": [False, True],
    "min_decay": [0.0, 0.1, 0.9],
    **CALLS,
    "memory": [*MEMORY, *TOGETHER],
    "wide_state": [False, True],
}
# Around the sizes of chunks (16), of groups of lanes (16), of checkpoints (64) and of a state in the cache (512).
STEPS = [1, 2, 3, 15, 16, 17, 63, 64, 65, 130, 257]
LANES = [1, 2, 15, 16, 17, 63, 64, 65, 127, 511, 512, 513, 1030]
SIZES = {
    "native": {"steps": STEPS, "features": [*((lanes,) for lanes in LANES), (2, 3, 4)]},
    # Small, because the interpreter runs each element of a scan on its own.
    "triton": {"steps": [1, 2, 7, 13, 18], "features": [(1,), (7,), (10,), (2, 2)], "batch": [1, 2, 3]},
    "": {"steps": STEPS, "features": [(1,), (6,), (18,), (2, 3, 4)]},
}
TILINGS = ["walk", "chunks", "segments", *([] if INTERPRETED else [None])]


def supports(backend, cell, candidate="positive"):
    """Return whether the backend computes the cell; the log backend needs positive numbers."""
    if cell in SCANS:
        return backend not in ("log", "traceable") and candidate == "linear"
    return backend != "log" or (candidate == "positive" and ops.cells.CELLS[cell].has_logarithms)


def is_allowed(row, backend="torch"):
    """Return whether there is such a call. Options that are not given count as the default ones."""
    row = Row(**row)
    cell, layout, memory = row.cell, row.layout, row.memory
    return (
        supports(backend, cell, row.candidate)
        and (cell in TIMED or not (row.dt or row.min_decay))
        and not (backend == "log" and (row.reset or row.dt))
        and (row.dtype in HALF or not row.wide_state)
        and (cell not in SCANS[1:] or row.dtype not in HALF)
        and (row.batch_first or layout == "padded")
        and (cell not in SCANS or (row.batch_first and layout in ("padded", "lengths")[: 2 - (cell == SCANS[2])]))
        and (cell not in SCANS[1:] or (len(row.features) == 1 and memory != "an odd address"))
        and (layout != "packed" or len(row.features) == 1 or memory == "contiguous")
    )


def each(backends=ALL, cells=tuple(NUM_INPUTS), candidate="positive"):
    """Return the pairs of a backend and a cell that it computes."""
    return [(backend, cell) for backend in backends for cell in cells if supports(backend, cell, candidate)]


@functools.cache
def _covered(sizes, backend):
    factors = {**FACTORS, **SIZES[sizes], **({"tiling": TILINGS} if sizes == "triton" else {})}

    def allowed(row):
        # Sequences of different lengths are several.
        few = "batch" not in row or (row["batch"] == 3) == (row["layout"] in ("lengths", "packed"))
        return few and is_allowed(row, backend)

    return [Row(**row) for row in cover(factors, allowed)]


def rows(backend):
    """Return few rows in which each two values of two options meet."""
    return _covered(backend if backend in SIZES else "", backend if backend in ("log", "traceable") else "torch")


class Given(NamedTuple):
    """The tensors of a call, in its layout."""

    inputs: list[torch.Tensor]
    h: torch.Tensor
    initial: torch.Tensor
    reset: torch.Tensor | None
    dt: torch.Tensor | None
    lengths: torch.Tensor | None = None
    batch_sizes: torch.Tensor | None = None

    def leaves(self):
        return [*self.inputs, self.h, self.initial, *([] if self.dt is None else [self.dt])]

    def of(self, *leaves):
        """Return the same call of other leaves."""
        *inputs, h, initial = leaves if self.dt is None else leaves[:-1]
        return self._replace(inputs=inputs, h=h, initial=initial, dt=None if self.dt is None else leaves[-1])

    def to(self, device):
        moved = [x if x is None or i == 6 else x.to(device) for i, x in enumerate(self[1:], 1)]
        return Given([x.to(device) for x in self.inputs], *moved)


def make(cell, batch, steps, *rest, dtype=torch.double, reset=False):
    """Return the inputs of a cell, a state, an initial state, resets and elapsed times from 0 to 3."""
    parts, (features, *rest) = parts_of(cell), rest or (6,)
    rest = (features + -features % parts, *rest)
    inputs = [2 * torch.randn(batch, steps, *rest).to(dtype) for _ in range(NUM_INPUTS.get(cell, 2))]
    if cell in SCANS:
        # |a| <= 1.
        inputs[0] = inputs[0].clamp(-(parts**-0.5), parts**-0.5)
    h, initial = (torch.randn(batch, 1, *rest).to(dtype) for _ in range(2))
    drawn, dt = steps_of(batch, steps, dtype=accumulate_dtype(dtype))
    return inputs, h, initial, drawn if reset else None, dt


def drawn(row, seed=0, in_padding=None):
    """Return random tensors of a row, and weights of its states and last states. `in_padding` replaces the padding."""
    torch.manual_seed(seed)
    of_row = {"dtype": row.dtype, "reset": row.reset}
    inputs, h, initial, reset, dt = make(row.cell, row.batch, row.steps, *row.features, **of_row)
    lengths = batch_sizes = None
    dt[:, 4:5] = 0
    if reset is not None:
        # One sequence begins anew at every step.
        reset[1:2] = True
    weight, dt = torch.randn(inputs[0].shape).to(row.dtype), dt if row.dt else None
    if row.layout in ("lengths", "packed"):
        # One that is empty cannot be packed.
        lengths = lengths_of(row.batch, row.steps, int(row.layout == "packed"))
    if row.layout == "packed":
        batch_sizes = pack_padded_sequence(weight, lengths, batch_first=True).batch_sizes

    def laid_out(x):
        if row.layout == "packed":
            return pack_padded_sequence(x, lengths, batch_first=True).data
        if row.layout == "lengths" and in_padding is not None and x.is_floating_point():
            x = x.masked_fill(ops.shape.along(ops.layout.padding_of(lengths, x), x), in_padding)
        return x if row.batch_first else x.transpose(0, 1)

    inputs, weight = [laid_out(x) for x in inputs], laid_out(weight).nan_to_num()
    reset, dt = (None if x is None else laid_out(x) for x in (reset, dt))
    if row.memory in TOGETHER:
        inputs = TOGETHER[row.memory](inputs, 1 if row.layout == "packed" else 2)
    else:
        inputs = [MEMORY[row.memory](x) for x in inputs]
    if row.memory == "one row for all":
        initial = initial[:1].expand_as(initial)
        dt = None if dt is None else dt[:1].expand_as(dt)
    if row.memory == "every other feature":
        h = MEMORY[row.memory](h)
    if row.memory == "other dimension first" and row.layout != "packed" and reset is not None:
        reset = MEMORY[row.memory](reset)
    if row.wide_state:
        h, initial = h.float(), initial.float()
    given = Given(inputs, h, initial, reset, dt, lengths if row.layout == "lengths" else None, batch_sizes)
    return given, [weight, torch.randn(h.shape).to(h.dtype)]


def run(backend, row, given):
    """Return the states and the last state of a backend."""
    inputs, h, initial, reset, dt, lengths, batch_sizes = given
    spec = spec_of(row.cell, row.candidate, row.reverse, row.min_decay)
    if row.cell not in SCANS:
        order = Layout(not row.batch_first, batch_sizes, lengths)
        compute = torch_in_graphs.recurrence if backend == "traceable" else ops.recurrence
        more = () if backend == "traceable" else (backend,)
        return compute(spec, list(inputs), Context(h, initial, reset, dt), order, *more)
    parts = parts_of(row.cell)
    a, b, h = (to_parts(x, parts) for x in (*inputs, h))
    if parts == 4:
        out, last = autograd.scan(route.Way(backend, modes.mode_of(b)), LinearScan(a, b, h, reset, row.reverse, parts))
    else:
        a, b, h = (torch.view_as_complex(x.contiguous()) if parts == 2 else x for x in (a, b, h))
        out, last = ops.linear_scan(a, b, h, reset, row.reverse, backend, lengths)
        out, last = (torch.view_as_real(x) if parts == 2 else x for x in (out, last))
    return from_parts(out, parts), from_parts(last, parts)


def exact(row, given):
    """Return the same of the reference: one sequence after the other."""
    inputs, h, initial, reset, dt, lengths, batch_sizes = given

    def batch_first(x):
        if x is None or row.layout != "packed":
            return x if x is None or row.batch_first else x.transpose(0, 1)
        return pad_packed_sequence(PackedSequence(x, batch_sizes), True)[0]

    *inputs, reset, dt = map(batch_first, (*inputs, reset, dt))
    lengths = lengths if batch_sizes is None else ops.layout.lengths_of(batch_sizes)
    outs, lasts = torch.zeros_like(inputs[0]), []
    for b in range(len(h)) if lengths is not None else [slice(None)]:
        one, end = (b, outs.shape[1]) if lengths is None else (slice(b, b + 1), int(lengths[b]))
        if end > 0:
            own = (x if x is None else x[one, :end] for x in (reset, dt))
            outs[one, :end] = out = by_steps(row, [x[one, :end] for x in inputs], h[one], initial[one], *own)
        lasts.append(h[one] if end == 0 else out[:, :1] if row.reverse else out[:, -1:])
    outs = pack_padded_sequence(outs, lengths, True).data if row.layout == "packed" else outs
    return outs if row.batch_first else outs.transpose(0, 1), torch.cat(lasts)


def by_steps(row, inputs, h, initial, reset=None, dt=None):
    """Return the states (B, S, *) of the reference, one step after the other."""
    if row.cell not in SCANS:
        timed = {"dt": dt, "min_decay": row.min_decay} if row.cell in TIMED else {}
        return reference.CELLS[row.cell](*inputs, h, reset, row.candidate, initial, row.reverse, **timed)
    parts = parts_of(row.cell)
    a, b, h = (to_parts(x, parts) for x in (*inputs, h))
    if parts == 2:
        a, b, h = (torch.view_as_complex(x.contiguous()) for x in (a, b, h))
    times = reference.quaternion_product if parts == 4 else torch.mul
    out = reference.linear_scan(a, b, h, row.reverse, reset, times=times)
    return from_parts(torch.view_as_real(out) if parts == 2 else out, parts)


def graded(function, tensors, weights):
    """Return the states, the last states, and the gradients of all tensors, which are taken as they lie in memory."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    results = function(*leaves)
    weights = [weight.to(x) for weight, x in zip(weights, results, strict=True)]
    return [*results, *torch.autograd.grad(results, leaves, weights, allow_unused=True, materialize_grads=True)]


@functools.lru_cache(maxsize=4096)
def _truth(row, seed):
    given, weights = drawn(row, seed)
    wide = given.of(*(x.double() for x in given.leaves()))
    return graded(lambda *leaves: exact(row, wide.of(*leaves)), wide.leaves(), weights)


def error(got, exact):
    """Return the largest error of tensors; NaN if there is one.

    It is relative to the largest float64 number of each tensor, or to 1 if all its numbers are smaller.
    """
    pairs = [(one.double().to(other.device), other) for one, other in zip(got, exact, strict=True) if other.numel()]
    errors = [(one - other).abs().max() / other.abs().max().clamp_min(1.0) for one, other in pairs]
    # Python's `max` may lose NaN.
    return torch.stack(errors).max().item()


def allowed(dtype, num_roundings=2, num_sums=64):
    """Return the allowed `error`: roundings of the dtype of the sequences, and others of the accumulation dtype."""
    return num_roundings * torch.finfo(dtype).eps + num_sums * torch.finfo(accumulate_dtype(dtype)).eps


def share_of_allowed(backend, row, seed=0, device=None, runs=1):
    """Return the largest error of a row on a backend, and of its gradients, as a share of what is allowed.

    Infinity if runs differ in a bit.
    """
    # Layers clear the padding for tensor operations, which run if the parts of a number are not neighboring features.
    has_kernel = backend == "triton" and (parts_of(row.cell) == 1 or len(row.features) == 1)
    given, weights = drawn(row, seed, math.nan if has_kernel or row.cell in SCANS else None)
    given, truth = given.to(device or device_of(backend)), _truth(row._replace(tiling=None), seed)
    before = [x.clone() for x in given.leaves()]
    got, *others = (
        graded(lambda *leaves: run(backend, row, given.of(*leaves)), given.leaves(), weights) for _ in range(runs)
    )
    if any(not torch.equal(one, same) for other in others for one, same in zip(got, other, strict=True)):
        return math.inf
    pairs = zip(given.leaves(), before, strict=True)
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in pairs), "an input was written to"
    assert [x.dtype for x in got] == [given.inputs[0].dtype, given.h.dtype, *(x.dtype for x in given.leaves())]
    with torch.no_grad():
        # Other code runs without gradients.
        again = run(backend, row, given)
    if row.cell not in SCANS[1:] and backend != "traceable":
        assert not any(x._is_view() for x in (*got[:2], *again)) and got[0].is_contiguous()
        assert again[0].is_contiguous()
    most = allowed(row.dtype, 1 + bool(row.dt or row.min_decay)) * (1 if backend != "log" else 1000)
    # Near a fixed point, the gradient of dt is a small difference of the candidate and a state that was rounded.
    of_dt = allowed(row.dtype, 10) if row.dt and row.dtype in HALF and backend != "native" else most
    shares = [error(got[:-1], truth[:-1]) / most, error(got[-1:], truth[-1:]) / of_dt, error(again, truth[:2]) / most]
    # States are rounded to the nearest number, once. Logarithms are less exact than that.
    rounded = torch.finfo(row.dtype).eps / 2 * truth[0].abs() + 1e-5 * truth[0].abs().max()
    off = ((got[0].detach().double().cpu() - truth[0].detach()).abs() / rounded.detach().clamp_min(1e-30)).max()
    return max([*shares, 0.0 if backend == "log" else off.item()], key=lambda x: (math.isnan(x), x))


def states(backend, cell, inputs, h, initial=None, reset=None, dt=None, device=None, **options):
    """Return the states and the last state of batch-first sequences; "exact" is the reference, in float64."""
    given = Given(list(inputs), h, h if initial is None else initial, reset, dt)
    row = Row(cell, **options)
    if backend != "exact":
        return tuple(x.to(h.device) for x in run(backend, row, given.to(device or device_of(backend))))
    return exact(row, given.of(*(x.double() for x in given.leaves())))


def negative(x):
    """Return a tensor with the values of x, whose memory has -x."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def rounded_bfloat16():
    """Return the conversion of the interpreter, which truncates, but to the nearest bfloat16, as GPUs do."""
    import numpy as np
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x, before, after, mode):
        if (before.name, after.name) != ("fp32", "bf16"):
            return convert(x, before, after, mode)
        return torch.from_numpy(np.array(x)).bfloat16().view(torch.uint16).numpy()

    return rounded


def scanned_in_a_tree(scan, xs):
    """Replace the scan of the interpreter, which combines one number after the other, by that of neighbors, then of
    pairs and so on, as GPUs do."""
    import numpy as np

    for distance in (2**k for k in range(len(xs[0].handle.data).bit_length() - 1)):
        before = (scan.to_tensor(np.roll(x.handle.data, distance, 0), x.dtype) for x in xs)
        both = zip(xs, scan.combine_fn.fn(*before, *xs), strict=True)
        xs = [scan.to_tensor(np.r_[x.handle.data[:distance], y.handle.data[distance:]], x.dtype) for x, y in both]
    return xs
