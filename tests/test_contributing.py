"""Builds of copies of the sources, and the steps of CONTRIBUTING.md to add a cell type: Python, C++, Triton.

The new cell is a minGRU whose gate is doubled, so that a minGRU with doubled weights is the reference.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import needs_kernels

import mingru

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the sources")]

PYTHON, TRITON = "src/mingru/ops/cells.py", "src/mingru/ops/backends/triton/cells.py"
OF_PYTHON = """\
if spec.cell == "mingru_sharp":
        gate, candidate = _wide(inputs)
        return (-2.0 * gate).sigmoid(), (2.0 * gate).sigmoid() * activate(candidate, spec.activation)
    """
OF_CPP = """\
template <class Activation>
struct SharpMinGRU : RealCell {
  template <class A, class Memo>
  MINGRU_INLINE auto step(const A* x, const Untimed<A>& time, A h, A delta, Memo& memo) {
    const auto d = decay(A(2) * x[0], time, memo);
    const Value<A> c = Activation::of(x[1], memo);
    return Step{
        d.keep, d.update * c.value, A(2) * d.by_gate * (delta * (h - c.value)), d.update * c.slope * delta};
  }
};

"""
OF_TRITON = """\
@triton.jit
def sharp(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    a, z, by_gate, _ = decay(2.0 * x[0][0], (), EXACT)
    value, slope = activate(x[1][0], ACTIVATION, EXACT)
    return (a, ()), (z * value, ()), (of_decay(a, value, 2.0 * by_gate), of_b(z * slope, ()))


"""
CALLED = 'if CELL == "mingru_sharp":\n        return sharp(x, ACTIVATION, EXACT)\n    el'
# Step of CONTRIBUTING.md, file, what is added, and where: behind a pattern, which finds the first key of a dictionary
# or its end, the first `if` of a function, or a definition by its name.
STEPS = [
    (1, PYTHON, '"mingru_sharp": Cell(2, not_timed="a test needs no time"),\n    ', r"^CELLS\b.*{\s*"),
    (1, PYTHON, OF_PYTHON, r"^def coefficients\((?:.*\n)*?    (?=if )"),
    (2, "csrc/cells.h", OF_CPP, r"^(?=template.*\nstruct MinGRU\b)"),
    (2, "csrc/scan.h", " CELL(mingru_sharp, 2, false, SharpMinGRU)", r"MINGRU_CELLS\(CELL\)"),
    (3, TRITON, OF_TRITON, r"^(?=@triton.jit\ndef cell\()"),
    (3, TRITON, CALLED, r"^def cell\((?:.*\n)*?    (?=if )"),
    (3, "src/mingru/ops/backends/triton/device.py", '"mingru_sharp": (-inf, 0.0),\n    ', r"^CELLS\b.*{\s*"),
    (5, PYTHON, '    "sharp": "mingru_sharp",\n', r"^GATES\b(?:.*\n)*?(?=})"),
]

LEVEL, PUBLIC = (f"src/mingru/modules/{name}.py" for name in ("level", "mingru"))
BLOCK = "src/mingru/models/block.py"
FACTOR = "if self.output_factor != 1:\n            out = self.output_factor * out\n        "
# The same for the option of a layer.
OPTION = [
    (1, PUBLIC, "output_factor: float = 1.0,\n        ", r"^class MinGRU\b(?:.*\n)*?        (?=memory: Memory)"),
    (2, LEVEL, "output_factor = 1.0\n    ", r"^class RecurrentOptions\b(?:.*\n)*?    (?=proj_size)"),
    (2, LEVEL, "self.output_factor = options.output_factor\n        ", r"^        (?=self\.recompute = )"),
    (2, LEVEL, FACTOR, r"^    def forward\((?:.*\n)*?        (?=if self\.residual:)"),
    (3, "src/mingru/modules/saved.py", '    "output_factor": 1.0,\n', r"^MARKS\b(?:.*\n)*?(?=})"),
    (4, BLOCK, "output_factor: float\n    ", r"^class LayerOptions\b(?:.*\n)*?    (?=memory: Memory)"),
]
FORM = [(1, "src/mingru/check/forms.py", "expands to ", r'^_CELL = .*?"h": "')]
# Of a cell, by a plan or not, in training, and scripted.
EXPANDED = """
import torch
import mingru

cell, x, h = mingru.MinGRUCell(3, 4), torch.randn(2, 3), torch.rand(4)
for run in (cell, torch.no_grad()(cell)):
    torch.testing.assert_close(run(x, h), run(x, h.expand(2, 4)))
"""

ROUTE = "src/mingru/ops/route.py"
LOOP = "from ..backend import Backend\nfrom .sequential import scan\n\nBACKEND = Backend(scan=scan)\n"
BACKEND = [
    (1, "src/mingru/ops/backends/loop.py", LOOP, ""),
    (2, ROUTE, "loop, ", r"^from \.backends import "),
    (2, ROUTE, '"loop", ', r"^BackendName = Literal\["),
    (2, ROUTE, '    "loop": loop.BACKEND,\n', r"^BACKENDS\b(?:.*\n)*?(?=})"),
]

CALL, NATIVE = "src/mingru/ops/call.py", "src/mingru/ops/backends/native.py"
FLAG = [
    (1, CALL, "    refused: bool\n", r"^class Spec\b(?:.*\n)*?(?=\n\n)"),
    (1, CALL, ", bool", r"^SpecTuple = .*(?=\])"),
    (1, CALL, ", False", r"^def spec_of\b(?:.*\n)*?    return .*(?=\))"),
    (2, "csrc/call.h", " FLAG(refused)", r"FLAG\(keep_states\)"),
    (2, "csrc/call.h", '    STD_TORCH_CHECK(!has(Flag::refused), name, ": refused");\n', r'": unknown flags"\);\n'),
    (3, NATIVE, ', "refused"', r'^_ORDER .*"keep_states"'),
    (3, NATIVE, ", spec.refused", r"^    more = .*"),
]
REFUSED = """
import pytest
import torch
import mingru
from mingru import ops
from mingru.modules.level import LinearLevel
from mingru.ops.call import Context, spec_of

x, start, spec = torch.rand(2, 5, 3), Context(*torch.zeros(2, 2, 1, 3), None), spec_of("mingru", "linear", False, 0.0)
ops.recurrence(spec, [x, x], start)
LinearLevel.spec, rnn = lambda *_: spec._replace(cell="gru", activation="tanh", refused=True), mingru.GRU(3, 4)
own = [torch.no_grad()(run) if no_grad else run for no_grad in (True, False) for run in (rnn, lambda _: rnn(x[:, :1]))]
for run in (lambda x: ops.recurrence(spec._replace(refused=True), [x, x], start), *own):
    with pytest.raises(RuntimeError, match="forward: refused"):
        run(x)
"""

# Compares the layer with one without the factor: by a plan or not, in training, scripted, in a block, and loaded.
HALVED = """
import pytest
import torch
import mingru

half, plain = mingru.MinGRU(3, 4, output_factor=0.5), mingru.MinGRU(3, 4)
plain.load_state_dict({key: x for key, x in half.state_dict().items() if not key.endswith("_mark")})
x = torch.randn(2, 7, 3)
for run in (half, torch.no_grad()(half), torch.jit.script(half)):
    torch.testing.assert_close(run(x)[0], plain(x)[0] / 2)
mingru.models.Block(4, output_factor=0.5)(torch.randn(2, 7, 4))
with pytest.raises(RuntimeError, match="output_factor=0.5"):
    plain.load_state_dict(half.state_dict())
"""

# Compares the layer with a minGRU whose gate has doubled weights, on the backend that is the argument.
CHECK = """
import sys
import torch
import mingru

torch.manual_seed(0)
options = {"bidirectional": True, "candidate": "tanh", "dtype": torch.double}
sharp, plain = mingru.MinGRU(3, 4, gate="sharp", **options), mingru.MinGRU(3, 4, **options)
# Without the mark of the gate, which the plain layer would refuse.
plain.load_state_dict({key: x for key, x in sharp.state_dict().items() if not key.endswith(".gate")})
with torch.no_grad():
    for linear in (plain.layers[0].linear, plain.layers[0].linear_reverse):
        linear.weight[:4] *= 2
        linear.bias[:4] *= 2
x = torch.randn(2, 70, 3).double().requires_grad_()
reset = torch.rand(2, 70) < 0.1
h = torch.randn(2, 2, 1, 4).double()
expected, _ = plain(x, h, reset)
(expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
with mingru.use_backend(sys.argv[1]):
    out, _ = sharp(x, h, reset)
(grad,) = torch.autograd.grad(out.square().sum(), x)
torch.testing.assert_close(out, expected)
torch.testing.assert_close(grad, expected_grad)
"""

# Compares some calls of the backend that is the argument with the reference.
PLAIN = """
import sys
import calls
for row in calls.rows(sys.argv[1])[::4]:
    assert calls.share_of_allowed(sys.argv[1], row) <= 1, row
"""
CLANG = next(filter(None, map(shutil.which, ["clang++", *(f"clang++-{version}" for version in range(14, 25))])), None)


def added(root, *steps, of=STEPS):
    """Add what these steps add."""
    for step, file, text, where in of:
        if step in steps or not steps:
            before = (root / file).read_text(encoding="utf-8") if where else ""
            at = re.search(where, before, re.MULTILINE).end()
            (root / file).write_text(before[:at] + text + before[at:], encoding="utf-8")


def check(root, backend, code=CHECK, **variables):
    path = os.pathsep.join([str(root / "src"), str(ROOT / "tests" / "ops"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    subprocess.run([sys.executable, "-c", code, backend], check=True, env=environment, cwd=root)


def copied(root):
    """Copy the sources, whose kernels are built without optimizations."""
    for folder in ("src", "csrc"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "_kernels.*"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, root / file)
    replace(root / "setup.py", "-O3", "-O0")
    return root


def replace(path, before, after):
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")


def build(root, **variables):
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = {**os.environ, "MINGRU_REQUIRE_KERNELS": "1", **variables}
    subprocess.run(command, check=True, cwd=root, env=environment)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = copied(tmp_path_factory.mktemp("copy"))
    # One instruction set, because the others compile the same code: that of any processor, which has no assembly.
    replace(root / "csrc" / "scan.h", "defined(__x86_64__)", "false")
    replace(root / "setup.py", '"-O0"', '"-O0", "-Dasm=of_another_processor"')
    return root


def test_the_steps_name_these_files():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    recipes = {"a cell type": STEPS, "an option of a layer": OPTION, "a form": FORM, "a backend": BACKEND}
    recipes |= {"a function": [(1, "functional.py"), (2, "forms.py"), (3, "index.md")], "a flag of a kernel": FLAG}
    for heading, of in recipes.items():
        _, steps = text.split(f"## Add {heading}\n")
        steps = steps.split("\n## ")[0]
        numbered = dict(re.findall(r"^(\d)\. (.*?)(?=^\d\. |^## |\Z)", steps, re.MULTILINE | re.DOTALL))
        for step, file, *_ in of:
            assert Path(file).name.replace("loop", "NAME") in numbered[str(step)]


@pytest.mark.parametrize(
    ("steps", "backend", "code", "files", "lines"),
    [(OPTION, "native", HALVED, 4, 12), (FORM, "native", EXPANDED, 1, 1), (BACKEND, "loop", PLAIN, 2, 7)],
    ids=["option of a layer", "form", "backend"],
)
def test_what_is_added_in_python(steps, backend, code, files, lines, tmp_path):
    root = copied(tmp_path)
    for library in Path(mingru.__file__).parent.glob("_kernels.*"):
        shutil.copy(library, root / "src" / "mingru")
    with pytest.raises(subprocess.CalledProcessError):
        check(root, backend, code)
    added(root, of=steps)
    check(root, backend, code)
    added_lines = [line for _, _, text, _ in steps for line in text.strip().splitlines()]
    assert len({file for _, file, *_ in steps}) <= files and len(added_lines) <= lines


@needs_kernels
def test_a_library_is_kept_if_it_is_of_these_sources(tmp_path):
    root, own = copied(tmp_path), next(Path(mingru.__file__).parent.glob("_kernels.*"))
    shutil.copy(ROOT / "setup.py", root)
    library, whole, now = root / "src" / "mingru" / own.name, own.read_bytes(), time.time()
    for content, source_is_newer in ((whole, True), (whole[: len(whole) // 2], False)):
        library.write_bytes(content)
        os.utime(root / "csrc" / "scan.h", (now + 60 if source_is_newer else now - 60,) * 2)
        # Otherwise it is built, which fails here.
        build(root, MINGRU_REQUIRE_KERNELS="", CC="false", CXX="false")
        assert library.exists() == (content == whole)


@needs_kernels
@pytest.mark.skipif(CLANG is None, reason="needs clang")
def test_clang_builds_the_kernels(tmp_path):
    """Without warnings. Initializers of flat aggregates are meant."""
    root = copied(tmp_path)
    build(root, CC=CLANG, CXX=CLANG, CXXFLAGS="-Wall -Werror -Wno-missing-braces")
    for instruction_set in torch.ops.mingru.instruction_sets().split():
        check(root, "native", PLAIN, MINGRU_ISA=instruction_set)


@needs_kernels
def test_a_cell_of_python_then_cpp(root):
    added(root, 1, 5)
    for backend in ("torch", "sequential"):
        check(root, backend)
    added(root, 2)
    added(root, of=FLAG)
    build(root)
    check(root, "native")
    check(root, "native", REFUSED)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_a_cell_of_triton(root):
    added(root, *(() if "sharp" in (root / PYTHON).read_text(encoding="utf-8") else (1, 5)), 3)
    check(root, "triton", TRITON_INTERPRET="1")
