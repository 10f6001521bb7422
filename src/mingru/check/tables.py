"""The forms of the arguments of all layers and functions; see `forms.py`."""

from .forms import Forms

_H = "expands to L*D B 1 H"
_STEPS = {"reset": "B S", "lengths": "B", "dt": "B S"}
_PACKED = {"reset": "P", "dt": "P"}

LAYER = Forms({"x": "B S I", "h": _H, **_STEPS}, packed={"x": "P I", "h": _H, **_PACKED})
CELL = Forms(
    {"x": "B I", "h": "B H", "reset": "B", "dt": "B"},
    {"x": "I", "h": "H", "reset": "", "dt": ""},
)
OF_IMAGES = Forms({"x": "B S I *space", "h": "expands to B 1 H *space", "reset": "B S"})
CELL_OF_IMAGES = Forms(
    {"x": "B I *space", "h": "expands to B H *space", "reset": "B"},
    {"x": "I *space", "h": "expands to H *space", "reset": ""},
)
PER_STEP = Forms({"x": "B S I *space", "lengths": "B"}, packed={"x": "P I"})
# With the state of the convolution, the last K inputs of C features.
_SIZES_OF_CONV = {"K": "conv.kernel_size - 1", "C": "input_dims"}
BLOCK = Forms({"x": "B S I", "h": "D B 1 H", "past": "1 B K C", **_STEPS}, sizes=_SIZES_OF_CONV, I="dims", past="h")
_OF_MODEL = {"x": "ids", "h": "state", "past": "state", "like": "the weights"}
LANGUAGE_MODEL = Forms({"x": "B S", "h": "D B 1 H", "reset": "B S", "lengths": "B"}, **_OF_MODEL)

_OF_TORCH = {"x": "input", "h": "hx", "I": "input_size", "exact": "h"}
LAYER_OF_TORCH = Forms(
    {"x": "B S I", "h": "L*D B H", "mask": "B S", **_STEPS},
    {"x": "S I", "h": "L*D H", "reset": "S", "dt": "S"},
    packed={"x": "P I", "h": "L*D B H", **_PACKED},
    **_OF_TORCH,
)
CELL_OF_TORCH = Forms(
    {"x": "B I", "h": "B H", "reset": "B", "dt": "B"}, {"x": "I", "h": "H", "reset": "", "dt": ""}, **_OF_TORCH
)

_STATES = {"h": "expands to B 1 *", "initial_state": "expands to B 1 *", **_STEPS}
MINGRU = Forms({"x": "B S *", "candidate": "B S *", **_STATES}, name="mingru", x="gate")
_OF_PAIRS = {"h": "expands to B 1 2*H *", "initial_state": "expands to B 1 2*H *"}
ROTATION = Forms(
    {"x": "B S H *", "angle": "B S H *", "candidate": "B S 2*H *", **_STEPS, **_OF_PAIRS}, name="mingru", x="gate"
)
MINLSTM = Forms({"x": "B S *", "input": "B S *", "candidate": "B S *", **_STATES}, name="minlstm", x="forget")
LINEAR_SCAN = Forms({"x": "B S *", "b": "B S *", **_STATES}, name="linear_scan", x="a")
PARALLEL_SCAN_LOG = Forms({"x": "B S *", "log_b": "B S+1 *"}, name="parallel_scan_log", x="log_a")
ELAPSED_TIMES = Forms({"x": "B S", "first": "B", "reset": "B S", "lengths": "B"}, name="elapsed_times", x="t")
CHECK_RESETS = Forms({"x": "B S *", "reset": "B S"}, name="check_resets")
RESET_FROM_LENGTHS = Forms({"x": "N", "lengths": "N"}, name="reset_from_lengths")
