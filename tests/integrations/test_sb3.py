"""sb3-contrib's RecurrentPPO: training equals that by steps; saving and loading."""

import numpy as np
import pytest
import torch

pytest.importorskip("sb3_contrib", reason="pip install sb3-contrib")
import gymnasium
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

import mingru
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
    "options",
    [
        {},
        {"n_lstm_layers": 2, "lstm_kwargs": {"norm": "rms"}},
        ALONE | {"lstm_kwargs": {"cell": "mingru"}},
        ALONE | {"shared_lstm": True, "lstm_kwargs": {"cell": "minlstm"}},
    ],
)
def test_training_equals_the_steps_of_sb3(options):
    """Rollouts, minibatches, losses, gradients and updates are those of sb3's own loop with the same layers."""

    class Stepped(sb3.MinGRUPolicy):
        _process_sequence = staticmethod(RecurrentActorCriticPolicy._process_sequence)

    trained = []
    for each in (sb3.MinGRUPolicy, Stepped):
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


@pytest.mark.parametrize("policy", [sb3.MinGRUPolicy, sb3.MinGRUCnnPolicy])
def test_defaults(policy):
    kind = "CnnPolicy" if policy is sb3.MinGRUCnnPolicy else "Policy"
    for cell, layer in (("gru", mingru.GRU), ("mingru", mingru.MinGRU)):
        gain = 3 if kind == "Policy" and cell == "mingru" else 1
        options = {"lstm_hidden_size": 64, "n_lstm_layers": 2, "lstm_kwargs": {} if cell == "gru" else {"cell": cell}}
        model = RecurrentPPO(policy, Images(SPACES[kind]), policy_kwargs=options, **SMALL)
        for lstm in (model.policy.lstm_actor.layer, model.policy.lstm_critic.layer):
            assert type(lstm) is layer and lstm.residual == (cell == "mingru") and lstm.norm is None
            weights = [each.linear.weight.abs().max() for each in lstm.layers]
            # Uniform: of a GRU up to 1 / sqrt(H), otherwise as torch.nn.Linear initializes it.
            sizes = [64, 64] if cell == "gru" else [lstm.input_dims, 64]
            for found, size, factor in zip(weights, sizes, (gain, 1), strict=True):
                assert 0.9 * factor < found * size**0.5 <= 1.0001 * factor
    own = {"lstm_hidden_size": 8, "lstm_kwargs": {"cell": "mingru", "candidate": "linear", "residual": False}}
    lstm = RecurrentPPO(policy, Images(SPACES[kind]), policy_kwargs=own, **SMALL).policy.lstm_actor.layer
    assert (lstm.candidate, lstm.residual) == ("linear", False)


@pytest.mark.parametrize("kind", SPACES)
def test_training_saving_and_loading(kind, tmp_path):
    policy = getattr(sb3, f"MinGRU{kind}")
    options = {"lstm_hidden_size": 8, "n_lstm_layers": 2, "lstm_kwargs": {"norm": "rms"}}
    model = RecurrentPPO(policy, Images(SPACES[kind]), policy_kwargs=options, **SMALL)
    model.learn(64)
    lstm = model.policy.lstm_actor.layer
    assert (lstm.cell, lstm.norm, lstm.num_layers) == ("gru", "rms", 2)
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
