"""The servers of docs/serving.md: the program for LitServe, and the files for Triton Inference Server."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import mingru

ROOT = Path(__file__).parents[2]


def test_litserve(tmp_path):
    """Two sessions are as the model, and a client that does not wait for answers loses no chunk."""
    pytest.importorskip("litserve", reason="pip install litserve")
    port = 20_000 + os.getpid() % 10_000
    model = mingru.MinGRU(3, 16, num_layers=2).requires_grad_(False)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    code = re.search(r"```py\n(.*?)```", (ROOT / "docs/serving.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    (tmp_path / "server.py").write_text(code.replace("8000", str(port)).replace("slots=1000", "slots=2"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, "server.py"], cwd=tmp_path, env=environment, start_new_session=True)

    def post(session, x, **more):
        body = json.dumps({"session": session, "x": x.tolist(), **more}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    try:
        with socket.socket() as trial:
            while trial.connect_ex(("127.0.0.1", port)) != 0:
                assert server.poll() is None
                time.sleep(0.2)
        x = torch.randn(2, 12, 3)
        with ThreadPoolExecutor(8) as pool:
            answers = [[*pool.map(post, "ab", part)] for part in x.split([5, 1, 6], 1)]
            steps = [answer["steps"] for answer in pool.map(post, "b" * 8, x[0, :8, None])]
        torch.testing.assert_close(
            torch.cat([torch.tensor([each["y"] for each in two]) for two in answers], 1), model(x)[0]
        )
        assert sorted(steps) == [*range(13, 21)]
        # "c" takes the slot of "a", which has paused longest, and ends. "a" begins again in its slot.
        assert [post(name, x[0], end=name == "c")["steps"] for name in "cab"] == [12, 12, 32]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


# Models, and the same with the batch first and resets.
MODELS = {
    "MinGRU": (mingru.MinGRU(3, 8, 2, batch_first=False), mingru.MinGRU(3, 8, 2)),
    "LanguageModel": [mingru.models.LanguageModel(11, 8, 2, conv=3) for _ in range(2)],
    "MinLSTMCell": (mingru.MinLSTMCell(3, 8), mingru.MinLSTM(3, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_triton(name, tmp_path):
    """The schema takes the configuration, and sequences that begin at any step are those of the model."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason='pip install "tritonclient[grpc]"')
    onnxruntime = pytest.importorskip("onnxruntime")
    from google.protobuf import text_format

    model, reference = (each.eval().requires_grad_(False) for each in MODELS[name])
    reference.load_state_dict(model.state_dict())
    x = torch.randint(11, (3, 9)) if name == "LanguageModel" else torch.randn(3, 9, 3)
    example, folder = x[:, 0] if name == "MinLSTMCell" else x[:1, :1], tmp_path / "model"
    mingru.export.triton(model, example, folder, max_batch_size=4, max_sequences=7, max_idle_seconds=9)
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    batching, (given,), (output,) = config.sequence_batching, config.input, config.output
    limits = (batching.oldest.max_candidate_sequences, batching.max_sequence_idle_microseconds)
    assert (config.backend, config.max_batch_size, *limits) == ("onnxruntime", 4, 7, 9_000_000)
    assert output.data_type == schema.TYPE_FP32
    assert given.data_type == (schema.TYPE_INT64 if name == "LanguageModel" else output.data_type)
    first = {}
    for state in batching.state:
        (initial,) = state.initial_state
        assert (initial.dims, initial.data_type) == (state.dims, state.data_type) == (state.dims, output.data_type)
        data = np.fromfile(folder / "initial_state" / initial.data_file, np.float32)
        first[state.input_name] = data.reshape(1, *state.dims)
    step = onnxruntime.InferenceSession(folder / "1/model.onnx", providers=["CPUExecutionProvider"])
    starts, kept, outs = torch.rand(3, 9) < 0.3, [first] * 3, []
    for t in range(9):
        kept = [first if start else states for start, states in zip(starts[:, t], kept, strict=True)]
        feed = {each: np.concatenate([states[each] for states in kept]) for each in first}
        feed[given.name] = x[:, t].numpy().reshape(3, *given.dims)
        found = dict(zip([each.name for each in step.get_outputs()], step.run(None, feed), strict=True))
        after = {state.input_name: found[state.output_name] for state in batching.state}
        kept = [{each: after[each][[row]] for each in after} for row in range(3)]
        outs.append(torch.from_numpy(found[output.name].reshape(3, *output.dims)).flatten(1))
    torch.testing.assert_close(torch.stack(outs, 1), reference(x, None, starts)[0], rtol=1e-5, atol=1e-5)
