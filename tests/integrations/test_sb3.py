"""sb3-contrib's RecurrentPPO: training equals that by steps; saving and loading."""

import numpy as np
import pytest
import torch

pytest.importorskip("sb3_contrib", reason="pip install sb3-contrib")
import gymnasium
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

from mingru.integrations import sb3


class Images(gymnasium.Env):
    """Random images or dictionaries; an episode has 7 steps."""

    def __init__(self, space):
        self.observation_space, self.action_space, self.step_count = space, gymnasium.spaces.Discrete(2), 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.step_count = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.step_count += 1
        return self.observation_space.sample(), float(action), self.step_count == 7, False, {}


IMAGE = gymnasium.spaces.Box(0, 255, (36, 36, 3), np.uint8)
VECTOR = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
SPACES = {"Policy": VECTOR, "CnnPolicy": IMAGE, "MultiInputPolicy": gymnasium.spaces.Dict({"a": VECTOR, "b": VECTOR})}
SMALL = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"}
ALONE = {"enable_critic_lstm": False}


@pytest.fixture(autouse=True)
def _logs_are_in_the_folder_of_the_test(monkeypatch, tmp_path):
    monkeypatch.setenv("SB3_LOGDIR", str(tmp_path))


@pytest.mark.parametrize(
    "options", [{}, {"n_lstm_layers": 2, "lstm_kwargs": {"norm": "rms"}}, ALONE, ALONE | {"shared_lstm": True}]
)
@pytest.mark.parametrize("policy", [sb3.MinGRUPolicy, sb3.MinLSTMPolicy])
def test_training_equals_the_steps_of_sb3(policy, options):
    """Rollouts, minibatches, losses, gradients and updates are those of sb3's own loop with the same layers."""

    class Stepped(policy):
        _process_sequence = staticmethod(RecurrentActorCriticPolicy._process_sequence)

    trained = []
    for each in (policy, Stepped):
        VECTOR.seed(0)
        model = RecurrentPPO(each, Images(VECTOR), policy_kwargs={"lstm_hidden_size": 8, **options}, **SMALL)
        assert (model.policy.lstm_critic is None) == ("enable_critic_lstm" in options)
        gradients = []

        def hook(optimizer, *_, gradients=gradients):
            weights = (x for group in optimizer.param_groups for x in group["params"] if x.grad is not None)
            gradients.extend(x.grad.clone() for x in weights)

        model.policy.optimizer.register_step_pre_hook(hook)
        model.learn(64)
        trained.append((gradients, list(model.policy.parameters())))
    assert len(trained[0][0]) > 8 * 10
    torch.testing.assert_close(*trained)


@pytest.mark.parametrize("policy", [sb3.MinGRUPolicy, sb3.MinLSTMPolicy, sb3.MinGRUCnnPolicy])
def test_defaults(policy):
    kind = "CnnPolicy" if policy is sb3.MinGRUCnnPolicy else "Policy"
    model = RecurrentPPO(policy, Images(SPACES[kind]), policy_kwargs={"n_lstm_layers": 2}, **SMALL)
    for lstm in (model.policy.lstm_actor, model.policy.lstm_critic):
        assert (lstm.candidate, lstm.residual, lstm.norm) == ("tanh", True, None)
        first, second = lstm.layers
        gain = 3 if kind == "Policy" else 1
        for weight, bound in ((first.linear.weight, gain), (first.align.weight, gain), (second.linear.weight, 1)):
            # Uniform, as torch.nn.Linear initializes it.
            assert 0.9 * bound < weight.abs().max() * weight.shape[1] ** 0.5 <= 1.0001 * bound
    own = {"lstm_hidden_size": 8, "lstm_kwargs": {"candidate": "linear", "residual": False}}
    lstm = RecurrentPPO(policy, Images(SPACES[kind]), policy_kwargs=own, **SMALL).policy.lstm_actor
    assert (lstm.candidate, lstm.residual) == ("linear", False)


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("cell", ["MinGRU", "MinLSTM"])
def test_training_saving_and_loading(cell, kind, tmp_path):
    policy = getattr(sb3, cell + kind)
    options = {"lstm_hidden_size": 8, "n_lstm_layers": 2, "lstm_kwargs": {"norm": "rms"}}
    model = RecurrentPPO(policy, Images(SPACES[kind]), policy_kwargs=options, **SMALL)
    model.learn(64)
    lstm = model.policy.lstm_actor
    assert (lstm.cell, lstm.candidate, lstm.norm, lstm.num_layers) == (policy.cell, "tanh", "rms", 2)
    model.save(tmp_path / "model")
    loaded = RecurrentPPO.load(tmp_path / "model", device="cpu")
    model.policy.save(tmp_path / "policy")
    alone = policy.load(tmp_path / "policy", device="cpu")
    state = start = None
    for _ in range(4):
        observation = SPACES[kind].sample()
        actions = [each.predict(observation, state, start, deterministic=True) for each in (model, loaded, alone)]
        for found in actions[1:]:
            torch.testing.assert_close(found, actions[0], rtol=0, atol=0)
        state, start = actions[0][1], np.array([False])
