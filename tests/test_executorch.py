"""Programs for ExecuTorch: sequences of any length, and single steps. They need `pip install ".[executorch]"`."""

import pytest
import torch
from torch.export import Dim

import mingru

pytest.importorskip("executorch")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of ExecuTorch and of packages that it loads

LAYERS = {
    "MinGRU": lambda: mingru.MinGRU(3, 8, num_layers=2, residual=True, norm="rms"),
    "bidirectional": lambda: mingru.MinGRU(3, 8, bidirectional=True),
    "rotation": lambda: mingru.MinGRU(3, 8, gate="rotation", candidate="tanh"),
    "MinLSTM": lambda: mingru.MinLSTM(3, 8),
    "GRU": lambda: mingru.GRU(3, 8, num_layers=2, block_size=4, norm="rms"),
}


def method_of(module, args, shapes, fast, folder):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = torch.export.export(module, args, dynamic_shapes=shapes)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()] if fast else [])
    # In a file, because a method of a program in memory reads that memory after the program is gone.
    lowered.to_executorch().save(str(folder / "model.pte"))
    return Runtime.get().load_program(folder / "model.pte").load_method("forward")


portable_and_fast = pytest.mark.parametrize("fast", [False, True], ids=["portable", "XNNPACK"])


@portable_and_fast
@pytest.mark.parametrize("name", LAYERS)
def test_a_sequence_of_any_length(name, fast, tmp_path):
    layer = LAYERS[name]().eval()
    method = method_of(layer, (torch.randn(1, 20, 3),), ({1: Dim("steps", max=4096)},), fast, tmp_path)
    for steps in (1, 2, 15, 16, 17, 300):
        x = torch.randn(1, steps, 3)
        torch.testing.assert_close(list(method.execute([x])), list(layer(x)), rtol=1e-5, atol=1e-5)


@portable_and_fast
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "bidirectional"])
def test_a_step_with_its_state(name, fast, tmp_path):
    layer, x = LAYERS[name]().eval(), torch.randn(1, 5, 3)
    out, last = layer(x)
    state = layer.default_states(x, 1)[0]
    method = method_of(layer, (x[:, :1], state), None, fast, tmp_path)
    for step in range(5):
        found, state = method.execute([x[:, step : step + 1].contiguous(), state])
        torch.testing.assert_close(found, out[:, step : step + 1], rtol=1e-5, atol=1e-5)
        state = state.clone()
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)
