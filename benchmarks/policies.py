"""Compare recurrent policies in TorchRL and sb3-contrib: seconds of a pass, and returns on CartPole without velocities.

    python benchmarks/policies.py
    python benchmarks/policies.py --normalize --steps 30720 --seeds 0 1 2

Needs the extra `integrations`. The observation has only the positions of cart and pole, so that a policy must remember.
With `--normalize`, it is normalized by `VecNormalize` of Stable-Baselines3.
"""

import argparse
import statistics
import time
from functools import partial

import gymnasium
import numpy as np
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize
from tensordict import TensorDict
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

from mingru.bench import medians_ms, print_table, where
from mingru.integrations.sb3 import MinGRUPolicy, MinLSTMPolicy
from mingru.integrations.torchrl import MinGRUModule, MinLSTMModule

SHAPES = [(16, 64, 64), (32, 256, 128)]
MODULES = {kind.__name__: kind for kind in (GRUModule, LSTMModule, MinGRUModule, MinLSTMModule)}
MODULES['GRUModule, "scan"'] = partial(GRUModule, recurrent_backend="scan")
MODULES['MinGRUModule, cell="blockgru"'] = partial(MinGRUModule, cell="blockgru")
POLICIES = {"minGRU": MinGRUPolicy, "minLSTM": MinLSTMPolicy, "nn.LSTM": "MlpLstmPolicy"}
POLICIES["BlockGRU"] = type("BlockGRUPolicy", (MinGRUPolicy,), {"cell": "blockgru"})


def make_environment():
    """Return CartPole without velocities."""
    positions = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    return gymnasium.wrappers.TransformObservation(gymnasium.make("CartPole-v1"), lambda x: x[[0, 2]], positions)


def passes(batch, steps, features, seconds):
    """Return the milliseconds of forward and backward over a batch in which episodes begin anywhere."""
    calls = {}
    for name, kind in MODULES.items():
        states = ["h"] if "GRU" in name else ["h", "c"]
        module = kind(features, features, in_keys=["x", *states], out_keys=["y", *(("next", each) for each in states)])
        data = {"x": torch.randn(batch, steps, features), "is_init": torch.rand(batch, steps, 1) < 0.02}
        data = TensorDict(data | dict.fromkeys(states, torch.zeros(batch, steps, 1, features)), [batch, steps])

        def call(module=module, data=data):
            module.zero_grad()
            with set_recurrent_mode(True):
                module(data.clone(recurse=False))["y"].sum().backward()

        calls[name] = call
    return medians_ms(calls, seconds, 3)


def train(policy, steps, seed, normalize):
    """Return the processor seconds of training, and the mean return of its last 100 episodes.

    All options have their defaults.
    """
    environments = make_vec_env(make_environment, 8, seed=seed)
    if normalize:
        environments = VecNormalize(environments, norm_reward=False)
    model = RecurrentPPO(policy, environments, seed=seed, device="cpu")
    start = time.process_time()
    model.learn(steps)
    return time.process_time() - start, statistics.mean(episode["r"] for episode in model.ep_info_buffer)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30720, help="steps of training (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--normalize", action="store_true", help="normalize the observations")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds for each shape (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(where())
    for shape in SHAPES:
        taken = passes(*shape, args.seconds)
        rows = [[name, f"{ms:.1f}", f"{taken['GRUModule'] / ms:.1f}"] for name, ms in taken.items()]
        print_table(f"(B, S, H) = {shape}", ["TorchRL", "ms", "speed-up over GRUModule"], rows)
    rows = []
    for name, policy in POLICIES.items():
        found = [train(policy, args.steps, seed, args.normalize) for seed in args.seeds]
        returns = ", ".join(f"{mean:.0f}" for _, mean in found)
        rows.append([name, f"{statistics.median(seconds for seconds, _ in found):.0f}" if found else "", returns])
    print_table(f"RecurrentPPO, {args.steps} steps", ["policy", "processor seconds", "mean return, by seed"], rows)


if __name__ == "__main__":
    main()
