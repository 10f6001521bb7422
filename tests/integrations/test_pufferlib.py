"""PufferLib's interfaces: a rollout equals the training pass, training, saving and loading.

PufferLib 3.0.0 on PyPI downloads files while it installs, and version 4 is not on PyPI. The policies here have the
methods that the trainers of both call. If PufferLib 3 is installed, its `LSTMWrapper` is compared.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mingru.integrations.pufferlib import MinGRU, MinGRUWrapper

B, S, IN, H = 3, 6, 4, 5
ENV = SimpleNamespace(single_observation_space=SimpleNamespace(shape=(2, 2)))


class Policy(nn.Module):
    """The methods of PufferLib 3."""

    is_continuous = False

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.value = nn.Linear(4, IN), nn.Linear(H, 2), nn.Linear(H, 1)
        self.layer_norm = nn.LayerNorm(IN)
        nn.init.constant_(self.layer_norm.weight, 0.5)

    def encode_observations(self, observations, state=None):
        return self.layer_norm(self.encoder(observations.flatten(1)))

    def decode_actions(self, hidden):
        return self.decoder(hidden), self.value(hidden)


class Policy4(nn.Module):
    """The policy of PufferLib 4: a network between encoder and decoder."""

    def __init__(self, network):
        super().__init__()
        self.encoder, self.decoder, self.value, self.network = (
            nn.Linear(4, H),
            nn.Linear(H, 2),
            nn.Linear(H, 1),
            network,
        )

    def forward_eval(self, x, state):
        h, state = self.network.forward_eval(self.encoder(x), state)
        return self.decoder(h), self.value(h), state

    def forward(self, x):
        h = self.network.forward_train(self.encoder(x))
        return self.decoder(h), self.value(h).squeeze(-1)


def make(num_layers=1, **options):
    return MinGRUWrapper(ENV, Policy(), IN, H, num_layers, **options)


def train(policy, call):
    optimizer = torch.optim.Adam(policy.parameters(), 0.05)
    losses = []
    for _ in range(20):
        logits, values = call(policy)
        loss = values.sub(1.0).square().mean() + logits.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(x.grad is not None for x in policy.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2}, {"norm": "rms", "candidate": "positive", "residual": False}]
)
def test_the_wrapper(options, tmp_path):
    torch.manual_seed(0)
    policy = make(**options)
    observations = torch.randn(B, S, 2, 2)
    train(policy, lambda policy: policy(observations, {"lstm_h": None, "lstm_c": None}))
    torch.save(policy.state_dict(), tmp_path / "model.pt")
    loaded = make(**options)
    loaded.load_state_dict(torch.load(tmp_path / "model.pt"))
    whole = {"lstm_h": None, "lstm_c": None}
    logits, values = loaded(observations, whole)
    assert logits.shape == (B * S, 2)
    assert values.shape == (B, S)
    # As PufferLib's trainer: it creates the states, and stores what it finds in `state`.
    h, c = (torch.zeros(B, policy.hidden_size) for _ in range(2))
    for step in range(S):
        state = {"lstm_h": h, "lstm_c": c}
        with torch.no_grad():
            step_logits, step_values = policy.forward_eval(observations[:, step], state)
        h, c = state["lstm_h"], state["lstm_c"]
        torch.testing.assert_close(step_logits, logits.unflatten(0, (B, S))[:, step])
        torch.testing.assert_close(step_values, values[:, step : step + 1])
    torch.testing.assert_close(whole["lstm_h"], h)
    assert whole["hidden"].shape == (B, S, H)
    assert not h.requires_grad
    # One step is also a sequence without its dimension.
    torch.testing.assert_close(policy(observations[:, 0], {"lstm_h": None, "lstm_c": None})[1], values[:, :1])


def test_the_wrapper_initializes_the_policy():
    policy = make().policy
    assert not policy.encoder.bias.any()
    torch.testing.assert_close(policy.encoder.weight @ policy.encoder.weight.T, torch.eye(IN))
    assert (policy.layer_norm.weight == 0.5).all()


@pytest.mark.parametrize("shape", [(B, S, 2, 3), (2, 2), (B, S, S, 2, 2)])
def test_wrong_observations(shape):
    with pytest.raises(ValueError, match=r"MinGRUWrapper: observations must be \(B, S, \*\) or \(B, \*\)"):
        make()(torch.randn(*shape), {"lstm_h": None, "lstm_c": None})


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"learn_initial_state": True, "residual": False}])
def test_the_network(options, tmp_path):
    torch.manual_seed(0)
    policy = Policy4(MinGRU(H, **options))
    observations = torch.randn(B, S, 4)
    train(policy, lambda policy: policy(observations))
    torch.save(policy.state_dict(), tmp_path / "model.pt")
    loaded = Policy4(MinGRU(H, **options))
    loaded.load_state_dict(torch.load(tmp_path / "model.pt"))
    logits, values = loaded(observations)
    state = policy.network.initial_state(B, "cpu")
    assert state[0].shape == (policy.network.num_layers, B, H)
    for step in range(S):
        with torch.no_grad():
            step_logits, step_values, state = policy.forward_eval(observations[:, step], state)
        torch.testing.assert_close(step_logits, logits[:, step])
        torch.testing.assert_close(step_values.squeeze(-1), values[:, step])


def test_shapes_are_those_of_pufferlib():
    models = pytest.importorskip("pufferlib.models", reason="pip install pufferlib-core==3.0.23")
    observations = torch.randn(B, S, 2, 2)
    shapes = []
    for wrapper in (make(), models.LSTMWrapper(ENV, Policy(), IN, H)):
        state = {"lstm_h": None, "lstm_c": None}
        results = [*wrapper(observations, state), state["hidden"]]
        state = {"lstm_h": torch.zeros(B, H), "lstm_c": torch.zeros(B, H)}
        results += [*wrapper.forward_eval(observations[:, 0], state), state["lstm_h"], state["lstm_c"]]
        shapes.append([x.shape for x in results])
    assert shapes[0] == shapes[1]
