"""PufferLib's interfaces: a rollout equals the training pass, whose gradients reach every parameter.

PufferLib 3.0.0 on PyPI downloads files while it installs, and version 4 is not on PyPI. The policies here have the
methods that the trainers of both call.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

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
        self.encoder, self.decoder, self.value = nn.Linear(4, H), nn.Linear(H, 2), nn.Linear(H, 1)
        self.network = network

    def forward_eval(self, x, state):
        h, state = self.network.forward_eval(self.encoder(x), state)
        return self.decoder(h), self.value(h), state

    def forward(self, x):
        h = self.network.forward_train(self.encoder(x))
        return self.decoder(h), self.value(h).squeeze(-1)


def make(num_layers=1, **options):
    return MinGRUWrapper(ENV, Policy(), IN, H, num_layers, **options)


def fresh():
    return {"lstm_h": None, "lstm_c": None}


def assert_trains(policy, logits, values):
    (values.sub(1.0).square().mean() + logits.square().mean()).backward()
    assert all(x.grad is not None and x.grad.any() for x in policy.parameters())


OF_MINGRU = {"cell": "mingru", "norm": "rms", "candidate": "linear", "residual": False}


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, OF_MINGRU])
def test_the_wrapper(options):
    policy, observations, whole = make(**options), torch.randn(B, S, 2, 2), fresh()
    logits, values = policy(observations, whole)
    assert logits.shape == (B * S, 2) and values.shape == (B, S)
    # As PufferLib's trainer: it creates the states, and stores what it finds in `state`.
    h, c = (torch.zeros(B, policy.hidden_size) for _ in range(2))
    for step in range(S):
        state = {"lstm_h": h, "lstm_c": c}
        step_logits, step_values = policy.forward_eval(observations[:, step], state)
        h, c = state["lstm_h"], state["lstm_c"]
        assert_close((step_logits, step_values), (logits.unflatten(0, (B, S))[:, step], values[:, step : step + 1]))
    assert not h.requires_grad
    assert_close(whole["lstm_h"], h)
    assert whole["hidden"].shape == (B, S, H)
    # One step is also a sequence without its dimension.
    assert_close(policy(observations[:, 0], fresh())[1], values[:, :1])
    assert_trains(policy, logits, values)


def test_the_wrapper_initializes_the_policy():
    policy = make().policy
    assert_close(policy.encoder.weight @ policy.encoder.weight.T, torch.eye(IN))
    assert not policy.encoder.bias.any() and (policy.layer_norm.weight == 0.5).all()


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"cell": "minlstm"}])
def test_the_network(options):
    policy, observations = Policy4(MinGRU(H, **options)), torch.randn(B, S, 4)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(torch.randn_like(weight) / 4)
    logits, values = policy(observations)
    state = policy.network.initial_state(B, "cpu")
    assert state[0].shape == (policy.network.num_layers, B, H)
    for step in range(S):
        step_logits, step_values, state = policy.forward_eval(observations[:, step], state)
        assert_close((step_logits, step_values.squeeze(-1)), (logits[:, step], values[:, step]))
    assert_trains(policy, logits, values)
