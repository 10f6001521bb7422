"""The servers of docs/serving.md: the program for LitServe, and the files for Triton Inference Server."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
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
    model = mingru.GRU(3, 16, num_layers=2).requires_grad_(False)
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
        out = torch.cat([torch.tensor([each["y"] for each in two]) for two in answers], 1)
        torch.testing.assert_close(out, model(x)[0])
        assert sorted(steps) == [*range(13, 21)]
        # "c" takes the slot of "a", which has paused longest, and ends. "a" begins again in its slot.
        assert [post(name, x[0], end=name == "c")["steps"] for name in "cab"] == [12, 12, 32]
        # A number that is not finite is refused, and a session goes on after it.
        with pytest.raises(urllib.error.HTTPError):
            post("b", x[0] * float("nan"))
        assert post("b", x[0])["steps"] == 44
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_fastapi(tmp_path, monkeypatch):
    """A connection is as the model, beside others that end with an error."""
    client = pytest.importorskip("fastapi.testclient", reason="pip install fastapi httpx")
    monkeypatch.chdir(tmp_path)
    model = mingru.GRU(3, 16, num_layers=2).requires_grad_(False)
    torch.save(model.state_dict(), "model.pt")
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r'```py title="app.py"\n(.*?)```', text, re.DOTALL)[1].replace("slots=1000", "slots=2"), names)
    x = torch.randn(3, 12, 3)

    def send(socket, chunk):
        socket.send_json(chunk.tolist())
        return torch.tensor(socket.receive_json())

    def fail(app, chunk, wrong):
        with app.websocket_connect("/stream") as socket:
            torch.testing.assert_close(send(socket, chunk), model(chunk.unsqueeze(0))[0][0])
            send(socket, wrong)

    with client.TestClient(names["app"]) as app, app.websocket_connect("/stream") as a:
        out = send(a, x[0, :5])
        for chunk, wrong in ((x[1], x[1, :, :1]), (x[2], x[2] * float("nan"))):  # in the second slot
            with pytest.raises(ValueError, match=r"x must be|NaN"):
                fail(app, chunk, wrong)
        torch.testing.assert_close(torch.cat([out, send(a, x[0, 5:])]), model(x[:1])[0][0])


def test_triton(tmp_path, monkeypatch):
    """The schema takes the configuration of the page, and its names and sizes are those of the file."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason='pip install "tritonclient[grpc]"')
    pytest.importorskip("onnxruntime")
    from google.protobuf import text_format

    section = (ROOT / "docs/serving.md").read_text(encoding="utf-8").split("## Triton Inference Server")[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(code, names)
    config = text_format.Parse(re.search(r"```text\n(.*?)```", section, re.DOTALL)[1], schema.ModelConfig())
    (state,) = config.sequence_batching.state
    (initial,) = state.initial_state
    given, found = names["step"].get_inputs(), names["step"].get_outputs()
    names_and_dims = [(each.name, [*each.dims]) for each in (*config.input, *config.output)]
    names_and_dims += [(name, [*state.dims]) for name in (state.input_name, state.output_name)]
    values = (given[0], found[0], given[1], found[1])
    assert [(each.name, each.shape[1:]) for each in values] == names_and_dims
    assert initial.dims == state.dims and initial.data_type == state.data_type == schema.TYPE_FP32
    assert (names["folder"] / "initial_state" / initial.data_file).stat().st_size == 4 * np.prod(state.dims)
