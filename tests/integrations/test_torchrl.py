"""TorchRL's modules: a rollout stepped with resets equals one pass over the stored batch."""

import pytest
import torch
from cases import grid, refuses

pytest.importorskip("torchrl", reason="pip install torchrl")
from tensordict import TensorDict
from torchrl.envs.utils import step_mdp
from torchrl.modules import GRUModule, set_recurrent_mode

from mingru.integrations.torchrl import MinGRUModule, MinLSTMModule

B, S, IN, H = 3, 12, 4, 5
KEYS = {MinGRUModule: ["h"], MinLSTMModule: ["h", "c"]}


def make(kind, **options):
    states = KEYS[kind]
    return kind(IN, H, in_keys=["obs", *states], out_keys=["y", *(("next", name) for name in states)], **options)


def rollout(module, obs, is_init, states):
    """Step through the observations, as a collector does, and return the stored batch."""
    stored = []
    for t in range(obs.shape[1]):
        data = TensorDict({"obs": obs[:, t], "is_init": is_init[:, t], **states}, [len(obs)])
        data = module(data)
        stored.append(data)
        states = {name: data["next", name] for name in states}
    return torch.stack(stored, 1)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "residual": True, "norm": "rms"}, {"num_layers": 2, "cell": "mingru"}, {"cell": "minlstm"}],
)
@grid(kind=KEYS, seed=range(4))
def test_a_rollout_equals_one_pass(kind, options, seed):
    torch.manual_seed(seed)
    module = make(kind, **options).double()
    torch.nn.init.normal_(next(module.parameters()))
    obs, is_init = torch.randn(B, S, IN).double(), torch.rand(B, S, 1) < 0.3
    state = torch.randn(B, options.get("num_layers", 1), H).double()
    stored = rollout(module, obs, is_init, dict.fromkeys(KEYS[kind], state))
    # The states before an episode are those that a primer writes.
    batch = stored.detach().clone()
    for name in KEYS[kind]:
        batch[name] = batch[name].masked_fill(is_init.unsqueeze(-1), 0.0)
    with set_recurrent_mode(True):
        found = module(batch.clone())
    torch.testing.assert_close(found["y"], stored["y"])
    is_end = torch.cat([is_init[:, 1:], torch.ones(B, 1, 1, dtype=torch.bool)], 1).unsqueeze(-1)
    for name in KEYS[kind]:
        expected = stored["next", name].masked_fill(~is_end, 0.0)
        torch.testing.assert_close(found["next", name], expected)
    weight, parameters = torch.randn_like(stored["y"]), list(module.parameters())
    losses = ((each["y"] * weight).sum() for each in (stored, found))
    torch.testing.assert_close(*(torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses))


def test_states_have_the_places_of_torchrl():
    obs, is_init = torch.randn(B, S, IN), torch.rand(B, S, 1) < 0.3
    batch = TensorDict({"obs": obs, "is_init": is_init, "h": torch.zeros(B, S, 1, H)}, [B, S])
    theirs = GRUModule(IN, H, in_keys=["obs", "h"], out_keys=["y", ("next", "h")])
    with set_recurrent_mode(True):
        places = [(module(batch.clone())["next", "h"] != 0).all(-1) for module in (theirs, make(MinGRUModule))]
    assert torch.equal(*places)


@pytest.mark.parametrize("kind", KEYS)
def test_primer_and_single_trajectory(kind):
    module = make(kind)
    primer = module.make_tensordict_primer()
    assert {tuple(primer.primers[name].shape) for name in KEYS[kind]} == {(1, H)}
    with set_recurrent_mode(True):
        found = module(TensorDict({"obs": torch.randn(S, IN), "is_init": torch.zeros(S, 1).bool()}, [S]))
    assert found["y"].shape == (S, H) and step_mdp(found)["h"].shape == (S, 1, H)


def test_backends_of_torchrl():
    """There is one computation, whichever is asked for."""
    data = TensorDict({"obs": torch.randn(B, S, IN), "is_init": torch.rand(B, S, 1) < 0.3}, [B, S])
    modules = [make(MinGRUModule), make(MinGRUModule, recurrent_backend="auto", recurrent_compute_dtype=torch.half)]
    modules[1].load_state_dict(modules[0].state_dict())
    with set_recurrent_mode(True):
        assert torch.equal(*(module(data.clone())["y"] for module in modules))


@pytest.mark.parametrize("kind", [*KEYS, GRUModule])
def test_batch_first(kind):
    """An argument of TorchRL's modules, with one valid value."""
    keys = {"in_key": "obs", "out_key": "y"}
    assert kind(IN, H, batch_first=True, **keys).out_keys[0] == "y"
    with pytest.raises(ValueError, match="must have batch_first=True"):
        kind(IN, H, batch_first=False, **keys)


@pytest.mark.parametrize("option", ["dropout", "bidirectional"])
def test_options_that_a_scan_cannot_have(option):
    refuses(ValueError, f"MinGRUModule: {option} must be left out", make, MinGRUModule, **{option: True})
