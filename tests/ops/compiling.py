"""Compile the Triton kernels for GPUs that are not there, and read what the compiler made of them.

As a program, print the figures of docs/how_it_works.md.
"""

import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from mingru.ops import NUM_INPUTS
from mingru.ops.backends import triton_kernels
from mingru.ops.backends.triton import KEEPING, Plan, plan_of

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
_SEQUENCES = ("x0", "x1", "x2", "out", "grad_out", "grads")
_STATES = ("h", "initial_state", "last", "dt", "products", "ends")
_STATES += tuple(f"grad_{name}" for name in ("last", "h", "initial_state", "dt", "bias"))


class Case(NamedTuple):
    """A kernel as it is launched for tensors of this shape."""

    kernel: str
    cell: str
    activation: str
    dtype: torch.dtype
    num_sequences: int
    num_steps: int
    num_features: int
    has_reset: bool = False
    has_bias: bool = False
    is_packed: bool = False
    has_dt: bool = False
    is_bounded: bool = False
    needs_dt: bool = False
    is_summary: bool = False
    """The first launch, if time is divided into segments."""
    unit: int | None = None
    """Number of features of an access; default: as many as the shape allows."""
    plan: Plan | None = None

    def __str__(self):
        words = [self.kernel.removesuffix("_kernel"), self.cell, self.activation, _TYPES[self.dtype]]
        words += [str(self[4:7]), *(name for name, value in self._asdict().items() if value is True)]
        return " ".join(words)


def plan_for(case: Case, wave: int) -> Plan:
    if case.plan is not None:
        return case.plan
    return plan_of(
        *(case.num_sequences, case.num_steps, case.num_features, case.dtype.itemsize),
        cell=case.cell,
        backward=case.kernel == "backward_kernel",
        has_reset=case.has_reset,
        is_packed=case.is_packed,
        is_timed=case.has_dt or case.is_bounded,
        wave=wave,
    )


def _absent(case: Case, plan: Plan) -> set[str]:
    """Return the names of the arguments that are None."""
    absent = set() if NUM_INPUTS.get(case.cell, 2) > 2 else {"x2"}
    if not case.has_reset:
        absent.add("reset")
    if not case.has_reset or case.cell not in NUM_INPUTS:
        absent |= {"initial_state", "grad_initial_state"}
    if not case.has_bias:
        absent.add("grad_bias")
    if not case.is_packed:
        absent |= {"offsets", "lengths"}
    if not case.has_dt:
        absent.add("dt")
    if not case.needs_dt:
        absent.add("grad_dt")
    if not case.is_bounded:
        absent |= {"log_bound", "log_bound_rest", "log_range", "log_range_rest"}
    if plan.segments == 1:
        absent |= {"products", "ends"}
    if case.is_summary:
        absent |= {"out", "grads", "h", "last", "grad_last", "grad_h", "grad_initial_state", "grad_dt", "grad_bias"}
        if case.kernel == "backward_kernel":
            absent.add("initial_state")
    return absent


class Compiled:
    """A compiled kernel and what is known of it."""

    def __init__(self, case: Case, target: str) -> None:
        self.target = TARGETS[target]
        self.plan = plan = plan_for(case, self.target.warp_size)
        kernel = getattr(triton_kernels, case.kernel)
        unit = case.unit or 16 // case.dtype.itemsize
        constants: dict[str, Any] = {"CELL": case.cell, "ACTIVATION": case.activation, "KEEPING": KEEPING[case.cell]}
        constants |= {"C": plan.chunks, "T": plan.steps, "F": plan.features, "STAGES": plan.stages}
        constants |= {"V": unit, "EVEN": case.num_features % plan.features == 0}
        absent = _absent(case, plan)
        signature, constexprs = {}, {}
        state = "fp64" if case.dtype == torch.float64 else "fp32"
        for name in kernel.arg_names:
            if name in constants or name in absent:
                signature[name], constexprs[name] = "constexpr", constants.get(name)
            elif name in _SEQUENCES:
                signature[name] = f"*{_TYPES[case.dtype]}"
            elif name in _STATES:
                signature[name] = f"*{state}"
            elif name.startswith("log_"):
                signature[name] = "fp32"
            else:
                signature[name] = {"reset": "*i1", "offsets": "*i64", "lengths": "*i64"}.get(name, "i32")
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
        options = {"num_warps": plan.warps, "enable_fp_fusion": True}
        self.compiled = triton.compile(source, target=self.target, options=options)
        self.shared = self.compiled.metadata.shared
        if self.target.backend == "cuda":
            self._read_cuda()
        else:
            self._read_amd()

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
        self.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        self.stack = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        self.local = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        self.accesses = Counter()
        sizes = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx4": 16}
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
        best = (0, 0)
        for index, instruction in enumerate(instructions):
            if found := re.search(r"BRA\S*\s+.*?(LBB\d+|\.L\S+)", instruction):
                begin = labels.get(found[1].rstrip("`)("), index)
                if begin < index and index - begin > best[1] - best[0]:
                    best = (begin, index)
        return instructions[best[0] : best[1] + 1]

    def per_state(self) -> float:
        """Return the number of instructions per state in the loop."""
        states = self.plan.chunks * self.plan.steps * self.plan.features / (self.target.warp_size * self.plan.warps)
        return len(self.loop()) / states

    def opcodes(self) -> Counter[str]:
        return Counter(re.sub(r"^@!?\w+\s+", "", line).split()[0].split(".")[0] for line in self.loop())


def main() -> None:
    """Print how long some kernels compile for sm_90, and how many instructions they have for each state."""
    many, few = (1024, 128, 512), (8, 4096, 256)
    with tempfile.TemporaryDirectory() as folder:
        # Kernels that were compiled before do not count.
        os.environ["TRITON_CACHE_DIR"] = folder
        Compiled(Case("forward_kernel", "mingru", "tanh", torch.float32, *few), "sm_90")
        print("seconds  instructions  registers  kernel")
        for cell in ("mingru", "minlstm", "mingru_rotation"):
            for dtype in (torch.float32, torch.bfloat16):
                for kernel in ("forward_kernel", "backward_kernel"):
                    for shape in (many, few):
                        case = Case(kernel, cell, "positive", dtype, *shape, has_bias=kernel == "backward_kernel")
                        begin = time.perf_counter()
                        found = Compiled(case, "sm_90")
                        seconds = time.perf_counter() - begin
                        print(f"{seconds:7.1f}  {found.per_state():12.1f}  {found.registers:9}  {case}", flush=True)


if __name__ == "__main__":
    main()
