"""Compile the Triton kernels for GPUs that are not there, and read what the compiler made of them.

`PYTHONPATH=tests python tests/ops/compiling.py` prints of the main kernels, on sm_80, sm_90, sm_100 and gfx942:
instructions per state in the loop (not on AMD), registers, spills in the loop (on AMD all), and bytes of shared memory.
"""

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from calls import Row
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import mangle_type

from mingru.ops.backends.triton import device, launch
from mingru.ops.backends.triton.kernels import PARAMETERS, recurrence_kernel
from mingru.ops.backends.triton.tiling import Tiling
from mingru.ops.call import Call, Context, Layout, spec_of
from mingru.ops.cells import NUM_INPUTS
from mingru.ops.shape import accumulate_dtype

TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
# Multiprocessors of a T4, A100, H100, B200, MI300X and RX 7900 XTX.
PROCESSORS = {75: 40, 80: 108, 90: 132, 100: 148, "gfx942": 304, "gfx1100": 48}


class Case(NamedTuple):
    """A kernel as it is launched for the tensors of a row."""

    name: str
    """Of the pass: "forward" or "backward"."""
    row: Row
    has_bias: bool = False
    needs_dt: bool = False
    is_summary: bool = False
    """The first launch, if time is divided into segments."""


def launched(case: Case, target: GPUTarget) -> tuple[Tiling, dict[str, Any]]:
    """Return the tiling and the arguments with which the kernel would be launched on this GPU."""
    row, batch, steps, wide = case.row, case.row.batch, case.row.steps, accumulate_dtype(case.row.dtype)
    leading, batch_sizes = (batch, steps), None
    if row.layout == "packed":
        leading, batch_sizes = (batch * steps,), torch.full((steps,), batch)

    def empty(*shape: int, dtype: torch.dtype = wide) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    sequence, h = empty(*leading, *row.features, dtype=row.dtype), empty(batch, 1, *row.features)
    inputs = [sequence] * NUM_INPUTS.get(row.cell, 2)
    reset = empty(*leading, dtype=torch.bool) if row.reset else None
    initial_state = h if row.reset and row.cell in NUM_INPUTS else None
    lengths = empty(batch, dtype=torch.int64) if row.layout == "lengths" else None
    spec = spec_of(row.cell, row.candidate, False, row.min_decay)
    context = Context(h, initial_state, reset, empty(*leading) if row.dt else None)
    call = Call(spec, inputs, context, Layout(False, batch_sizes, lengths))
    launches = []
    launch._recipes.clear()
    facts = target.warp_size, target.backend == "hip", PROCESSORS[target.arch]
    with (
        mock.patch.object(launch, "run", lambda name, num_programs, *found: launches.append(found)),
        mock.patch.object(device, "facts_of", return_value=facts),
    ):
        if case.name == "forward":
            launch.forward(call)
        else:
            launch.backward(call, (sequence, sequence, h), case.needs_dt, case.has_bias)
    return launches[0 if case.is_summary else -1]


class Compiled:
    """A compiled kernel and what is known of it."""

    def __init__(self, case: Case, target: str) -> None:
        self.target = TARGETS[target]
        self.tiling, args = launched(case, self.target)
        values = dict(zip(PARAMETERS, launch.values_of(args), strict=True))
        # Constants have names in capitals.
        signature = {k: "constexpr" if k.isupper() else mangle_type(launch.stand_in(x)) for k, x in values.items()}
        constexprs = {name: value for name, value in values.items() if name.isupper()}
        source = triton.compiler.ASTSource(fn=recurrence_kernel, signature=signature, constexprs=constexprs)
        options = {"num_warps": self.tiling.warps, "enable_fp_fusion": True}
        self.compiled = triton.compile(source, target=self.target, options=options)
        self.shared = self.compiled.metadata.shared
        (self._read_cuda if self.target.backend == "cuda" else self._read_amd)()

    def _read_cuda(self) -> None:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.compiled.asm["cubin"])
            file.flush()
            command = [str(tool), "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        self.registers, self.stack, self.local = usage["REG"], usage["STACK"], usage["LOCAL"]
        self.accesses: Counter[str] = Counter()
        for line in self.compiled.asm["ptx"].splitlines():
            if found := re.search(r"\b(ld|st)\.global[.a-zA-Z0-9_:]*?(?:\.v([248]))?\.[bfu](\d+)", line):
                self.accesses[f"{found[1]} {int(found[2] or 1) * int(found[3]) // 8}"] += 1
            elif found := re.search(r"cp\.async\.c[ag]\.shared\.global .*, (0x\w+)", line):
                self.accesses[f"copy {int(found[1], 16)}"] += 1

    def _read_amd(self) -> None:
        text = self.compiled.asm["amdgcn"]
        names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        self.registers, self.stack, self.local = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in names)
        self.accesses = Counter()
        rdna = {"u8": 1, "b8": 1, "u16": 2, "b16": 2, "b32": 4, "b64": 8, "b128": 16}
        sizes = rdna | {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx4": 16}
        for way, suffix in re.findall(r"(?:global|buffer)_(load|store)_(\w+)", text):
            size = re.sub(r"_?d16_hi|_?d16", "", suffix).strip("_")
            if size in sizes:
                self.accesses[f"{'ld' if way == 'load' else 'st'} {sizes[size]}"] += 1

    def loop(self) -> list[str]:
        """Return the instructions of the longest loop, for CUDA targets."""
        instructions, labels = [], {}
        for line in self.compiled.asm["sass"].splitlines():
            if found := re.match(r"\s*(LBB\d+|\.L\S+):", line):
                labels[found[1]] = len(instructions)
            elif found := re.match(r"\s*\S+:\S*:\S*:\S*:\S*\s+(.*?);", line):
                instructions.append(found[1])
        best = (0, 0, 0)
        for index, instruction in enumerate(instructions):
            if found := re.search(r"BRA\S*\s+.*?(LBB\d+|\.L\S+|0x\w+)", instruction):
                # Triton makes no labels of the addresses of uniform branches. An instruction has 16 bytes.
                place = found[1].rstrip("`)(")
                begin = int(place, 16) // 16 if place.startswith("0x") else labels.get(place, index)
                best = max(best, (index - begin, begin, index))
        return instructions[best[1] : best[2] + 1]

    def __str__(self) -> str:
        per_state = f"{self.per_state():.0f}" if self.target.backend == "cuda" else "-"
        return f"{per_state} / {self.registers} / {self.num_spills()} / {self.shared}"

    def per_state(self) -> float:
        """Return the number of instructions per state in the loop."""
        chunks, steps, features, _, warps, _ = self.tiling
        return len(self.loop()) * self.target.warp_size * warps / (chunks * steps * features)

    def num_spills(self) -> int:
        """Return how many registers are saved in the loop, or on AMD GPUs anywhere."""
        return self.stack if self.target.backend == "hip" else sum(self.opcodes()[name] for name in ("STL", "LDL"))

    def opcodes(self) -> Counter[str]:
        return Counter(re.sub(r"^@!?\w+\s+", "", line).split()[0].split(".")[0] for line in self.loop())


if __name__ == "__main__":
    cells = ("mingru positive", "mingru tanh", "minlstm tanh", "mingru_rotation tanh", "mingru_quaternion tanh")
    shapes = {"forward": (8, 4096, 256), "backward": (8, 4096, 256), "summary": (1, 65_536, 32)}
    for name, cell, dtype in itertools.product(shapes, cells, (torch.float32, torch.bfloat16)):
        options = {"is_summary": name == "summary", "has_bias": name == "backward"}
        batch, steps, features = shapes[name]
        row = Row(*cell.split(), dtype, batch=batch, steps=steps, features=(features,))
        case = Case(name.replace("summary", "forward"), row, **options)
        print(name, cell, dtype, *(Compiled(case, target) for target in list(TARGETS)[1:5]), sep="\t", flush=True)
