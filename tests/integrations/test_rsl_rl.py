"""rsl_rl's PPO: training equals that with padded trajectories; saving, loading and exports in another process."""

import os
import sys

import numpy as np
import pytest
import torch
from cases import in_a_process, refuses
from torch.testing import assert_close

pytest.importorskip("rsl_rl", reason="pip install rsl-rl-lib")
from rsl_rl.env import VecEnv
from rsl_rl.modules import RNN
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict

from mingru.integrations import rsl_rl

B, S, IN = 6, 16, 3
OPTIONS = [{}, {"rnn_options": {"cell": "minlstm"}}]
OPTIONS += [{"rnn_num_layers": 2, "rnn_options": {"cell": "mingru", "norm": "rms", "candidate": "linear"}}]


class Environment(VecEnv):
    """Random observations; an episode has 7 steps."""

    num_envs, num_actions, max_episode_length, device, cfg = B, 2, 7, "cpu", None

    def __init__(self):
        self.episode_length_buf = torch.arange(B)

    def get_observations(self):
        return TensorDict({"policy": torch.randn(B, IN)}, [B])

    def step(self, actions):
        self.episode_length_buf = (self.episode_length_buf + 1) % self.max_episode_length
        return self.get_observations(), actions.sum(1), (self.episode_length_buf == 0).long(), {}


def make(**options):
    torch.manual_seed(0)
    model = {"class_name": "mingru.integrations.rsl_rl:MinGRUModel", "hidden_dims": [8], "rnn_hidden_dim": 5, **options}
    actor = {**model, "distribution_cfg": {"class_name": "GaussianDistribution"}}
    groups = {"actor": ["policy"], "critic": ["policy"]}
    common = {"num_steps_per_env": S, "algorithm": {"class_name": "PPO", "num_mini_batches": 2}, "obs_groups": groups}
    return OnPolicyRunner(Environment(), {**common, "actor": actor, "critic": model})


@pytest.mark.parametrize("options", OPTIONS)
def test_training_equals_padded_trajectories(options, monkeypatch):
    trained = []
    for forward in (rsl_rl._OnePass.forward, RNN.forward):
        monkeypatch.setattr(rsl_rl._OnePass, "forward", forward)
        runner = make(**options)
        before = [x.clone() for x in runner.alg.actor.rnn.parameters()]
        runner.learn(2)
        assert not any(map(torch.equal, before, runner.alg.actor.rnn.parameters()))
        trained.append([dict(model.state_dict()) for model in (runner.alg.actor, runner.alg.critic)])
    assert_close(*trained)


def outputs(step):
    torch.manual_seed(1)
    return torch.cat([step(torch.randn(1, IN)) for _ in range(3)]).detach()


def of_policy(runner):
    policy = runner.get_inference_policy()
    policy.reset()
    return outputs(lambda x: policy(TensorDict({"policy": x}, [1])))


def load(index, folder):
    """Load a model, save what it returns, and export it."""
    runner = make(**OPTIONS[index])
    runner.load(f"{folder}/model.pt")
    torch.save(of_policy(runner), f"{folder}/found.pt")
    runner.export_policy_to_jit(folder)
    runner.export_policy_to_onnx(folder)


@pytest.mark.parametrize("index", range(len(OPTIONS)))
def test_saving_loading_and_exports(index, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    runner = make(**OPTIONS[index])
    runner.learn(1)
    runner.save(f"{tmp_path}/model.pt")
    code = f"import test_rsl_rl; test_rsl_rl.load({index}, {str(tmp_path)!r})"
    in_a_process(code, PYTHONPATH=os.pathsep.join(sys.path))
    expected = of_policy(runner)
    assert torch.equal(torch.load(tmp_path / "found.pt"), expected)
    assert_close(outputs(torch.jit.load(tmp_path / "policy.pt")), expected)
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    start = {each.name: np.zeros(each.shape, np.float32) for each in session.get_inputs()[1:]}
    found = outputs(lambda x: torch.from_numpy(session.run(None, {"obs": x.numpy(), **start})[0]))
    assert_close(found[0], expected[0])  # The others do not begin with 0.


@pytest.mark.parametrize("options", [{"learn_initial_state": True}, {"cell": "mingru", "candidate": "positive"}])
def test_states_that_do_not_begin_at_0_are_refused(options):
    message = "MinGRUModel: options must be such that states begin at 0, as in the library"
    refuses(ValueError, message, make, rnn_options=options)
