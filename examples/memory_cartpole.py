"""Balance a pole whose velocities are hidden: recurrent PPO with minGRU, minLSTM, nn.LSTM, and without memory.

    pip install ".[examples]"                    # in a clone of the repository
    python examples/memory_cartpole.py           # all policies, three seeds, with a plot in memory_cartpole.png
    python examples/memory_cartpole.py --policies minGRU --seeds 0

The task is CartPole-v1 of Gymnasium with two of its four observations, the positions of the cart and of the pole. Both
velocities must be inferred from past positions. An episode ends when the pole falls, or after 500 time steps, and its
return is its number of time steps.

Each iteration steps through many environments side by side, and trains on these steps with PPO (Schulman et al. 2017,
"Proximal policy optimization algorithms"). Episodes begin anywhere in them. With `reset`, a minGRU computes all these
steps in one call. nn.LSTM has no resets: it is called for each part between two steps at which an episode begins.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import at_least
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Categorical
from tqdm import tqdm

import mingru

try:
    import gymnasium
except ModuleNotFoundError:
    sys.exit("the package gymnasium is not installed; run `pip install gymnasium`")

POLICIES = ("minGRU", "minLSTM", "nn.LSTM", "no memory")
# Index of each observed position, and the limit at which an episode ends: 2.4 m for the cart, 12° for the pole.
LIMITS = {0: 2.4, 2: 0.2095}
MAX_STEPS, NUM_TEST = 500, 100
# Of PPO. A rollout has 128 steps of each environment, and is used in 8 epochs of 4 minibatches.
DISCOUNT, GAE_LAMBDA, CLIP, MAX_GRAD_NORM = 0.99, 0.95, 0.2, 0.5
ROLLOUT, NUM_EPOCHS, NUM_MINIBATCHES = 128, 8, 4
Curve = list[tuple[int, float, float]]  # time steps, processor seconds, return


class Policy(nn.Module):
    """Map positions (S, B, 2) to the logits of the two actions (S, B, 2), the values (S, B), and the last state.

    The state is a list of tensors, empty before the first step. `reset` (S, B) is True at the first step of an episode.
    """

    def __init__(self, name: str, dims: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(len(LIMITS), dims)
        if name in ("minGRU", "minLSTM"):
            # With `residual`, the output has the input beside its average in the state: a velocity is the difference.
            layer = mingru.MinGRU if name == "minGRU" else mingru.MinLSTM
            self.memory: nn.Module = layer(dims, dims, batch_first=False, candidate="tanh", residual=True)
        else:
            self.memory = nn.LSTM(dims, dims) if name == "nn.LSTM" else nn.Sequential(nn.Linear(dims, dims), nn.Tanh())
        self.actor = nn.Sequential(nn.Linear(dims, dims), nn.Tanh(), nn.Linear(dims, 2))
        self.critic = nn.Sequential(nn.Linear(dims, dims), nn.Tanh(), nn.Linear(dims, 1))
        # At first, both actions have nearly equal probabilities.
        nn.init.orthogonal_(self.actor[-1].weight, 0.01)

    def forward(self, x: Tensor, state: list[Tensor], reset: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        x = self.encoder(x)
        if isinstance(self.memory, nn.Sequential):
            out = self.memory(x)
        elif isinstance(self.memory, nn.LSTM):
            out, state = lstm_with_resets(self.memory, x, state, reset)
        else:
            out, h = self.memory(x, state[0] if state else None, reset)
            state = [h]
        return self.actor(out), self.critic(out).squeeze(-1), state


def lstm_with_resets(lstm: nn.LSTM, x: Tensor, state: list[Tensor], reset: Tensor) -> tuple[Tensor, list[Tensor]]:
    starts = [0, *(reset[1:].any(1).nonzero().flatten() + 1).tolist()]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], len(x)], strict=True)]
    outputs = []
    for part, is_first in zip(x.split(lengths), reset[starts], strict=True):
        out, state = lstm(part, tuple(h * ~is_first.unsqueeze(-1) for h in state) or None)
        outputs.append(out)
    return torch.cat(outputs), list(state)


class Rollout(NamedTuple):
    """Time steps of all environments; `x` is (S, B, 2) and the other fields are (S, B)."""

    x: Tensor
    reset: Tensor  # first position of an episode
    is_last: Tensor  # last position of an episode; the environment ignores the action
    action: Tensor
    log_prob: Tensor
    value: Tensor
    reward: Tensor
    terminated: Tensor  # the pole fell after the action


class Player:
    """Environments, and the observation, flags and state with which a policy goes on in them."""

    def __init__(self, num_envs: int, seed: int) -> None:
        self.envs = gymnasium.make_vec("CartPole-v1", num_envs, vectorization_mode="vector_entry_point")
        self.x = positions(self.envs.reset(seed=seed)[0])
        self.reset, self.is_last = torch.ones(num_envs, dtype=torch.bool), torch.zeros(num_envs, dtype=torch.bool)
        self.state: list[Tensor] = []
        self.returns = torch.zeros(num_envs)

    @torch.no_grad()
    def play(self, policy: Policy, num_steps: int, is_greedy: bool = False) -> tuple[Rollout, Tensor, list[float]]:
        """Return the time steps, the value of the position after them (1, B), and the returns of finished episodes."""
        steps, finished = [], []
        for _ in range(num_steps):
            logits, value, self.state = policy(self.x[None], self.state, self.reset[None])
            actions = Categorical(logits=logits[0])
            action = logits[0].argmax(-1) if is_greedy else actions.sample()
            log_prob = actions.log_prob(action)
            observation, *results, _ = self.envs.step(action.numpy())
            reward, terminated, truncated = (torch.from_numpy(each) for each in results)
            steps.append((self.x, self.reset, self.is_last, action, log_prob, value[0], reward, terminated))
            # An environment returns the last position of an episode, and in the next step the first one of another.
            self.x, self.reset, self.is_last = positions(observation), self.is_last, terminated | truncated
            self.returns += reward
            finished += self.returns[self.is_last].tolist()
            self.returns[self.is_last] = 0.0
        _, last_value, _ = policy(self.x[None], self.state, self.reset[None])
        return Rollout(*(torch.stack(each) for each in zip(*steps, strict=True))), last_value, finished


def positions(observation: Any) -> Tensor:
    """Return positions (B, 2) between -1 and 1."""
    return torch.from_numpy(observation[:, list(LIMITS)]) / torch.tensor(list(LIMITS.values()))


def advantages(data: Rollout, last_value: Tensor) -> Tensor:
    """Return the generalized advantage estimates (S, B)."""
    # After the last action of an episode, the value counts only if the pole has not fallen. Values are at most 1.
    next_value = torch.cat([data.value[1:], last_value]).masked_fill(data.terminated, 0.0)
    delta = (1 - DISCOUNT) * data.reward + DISCOUNT * next_value - data.value
    result, advantage = [], torch.zeros_like(delta[0])
    for each, is_last in zip(delta.flip(0), data.is_last.flip(0), strict=True):
        advantage = (each + DISCOUNT * GAE_LAMBDA * advantage).masked_fill(is_last, 0.0)
        result.insert(0, advantage)
    return torch.stack(result)


def loss_of(policy: Policy, data: Rollout, state: list[Tensor], advantage: Tensor) -> Tensor:
    """Return the loss of PPO. One call of the policy computes all time steps, with their resets."""
    logits, value, _ = policy(data.x, state, data.reset)
    ratio = (Categorical(logits=logits).log_prob(data.action) - data.log_prob).exp()
    is_used = ~data.is_last
    scaled = (advantage - advantage[is_used].mean()) / (advantage[is_used].std() + 1e-8)
    surrogate = torch.min(ratio * scaled, ratio.clamp(1 - CLIP, 1 + CLIP) * scaled)
    return (0.25 * (value - data.value - advantage).square() - surrogate)[is_used].mean()


def train(name: str, seed: int, args: argparse.Namespace) -> tuple[Policy, Curve]:
    """Return a policy and the means of its last 100 returns, after each iteration."""
    torch.manual_seed(seed)
    policy, player = Policy(name, args.hidden_dims), Player(args.num_envs, seed)
    optimizer = torch.optim.Adam(policy.parameters(), args.learning_rate, eps=1e-5)
    num_iterations = -(-args.num_steps // (args.num_envs * ROLLOUT))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / num_iterations, num_iterations)
    curve, recent, start = [], [], time.process_time()
    progress = tqdm(range(1, num_iterations + 1), desc=f"{name}, seed {seed}", leave=False, disable=None)
    for iteration in progress:
        state = player.state  # before the rollout, for each epoch
        data, last_value, finished = player.play(policy, ROLLOUT)
        advantage = advantages(data, last_value)
        for _ in range(NUM_EPOCHS):
            for rows in torch.randperm(args.num_envs).chunk(NUM_MINIBATCHES):
                part, first = Rollout(*(each[:, rows] for each in data)), [h[:, rows] for h in state]
                optimizer.zero_grad()
                loss_of(policy, part, first, advantage[:, rows]).backward()
                nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
                optimizer.step()
        schedule.step()
        recent = (recent + finished)[-100:]
        curve.append((iteration * args.num_envs * ROLLOUT, time.process_time() - start, sum(recent) / len(recent)))
        progress.set_postfix({"return": f"{curve[-1][2]:.0f}"})
    return policy, curve


def evaluate(policy: Policy, seed: int) -> float:
    """Return the mean return of the first episodes in NUM_TEST environments, with the more probable actions."""
    data, *_ = Player(NUM_TEST, 10_000 + seed).play(policy, MAX_STEPS, is_greedy=True)
    return (data.reward * (data.reset.cumsum(0) == 1)).sum(0).mean().item()


def plot(path: Path, results: dict[str, list[Curve]]) -> None:
    """Save a plot of the returns in training against time steps and against processor seconds."""
    # Below one another and narrow, so that the text is readable on phones.
    figure = Figure(figsize=(5.5, 6.5), dpi=150, layout="constrained")
    by_steps, by_seconds = figure.subplots(2)
    for name, runs in results.items():
        for index, (steps, seconds, returns) in enumerate(zip(*run, strict=True) for run in runs):
            for axes, x in ((by_steps, [step / 1000 for step in steps]), (by_seconds, seconds)):
                axes.plot(x, returns, color=f"C{POLICIES.index(name)}", label=None if index else name)
    for axes, label in ((by_steps, "Thousands of time steps"), (by_seconds, "Processor seconds, one thread")):
        axes.set(xlabel=label, ylabel="Mean return of 100 episodes", ylim=(0, MAX_STEPS + 10))
        axes.grid(alpha=0.3)
    figure.legend(*by_steps.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES, help="default: all")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=(0, 1, 2), help="default: 0 1 2")
    parser.add_argument("--num-steps", type=at_least(1), default=150_000, help="time steps; default: 150000")
    parser.add_argument("--num-envs", type=at_least(NUM_MINIBATCHES), default=16, help="environments; default: 16")
    parser.add_argument("--hidden-dims", type=at_least(1), default=64, help="features of each layer; default: 64")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="highest learning rate; default: 0.002")
    parser.add_argument("--plot", type=Path, default=Path("memory_cartpole.png"), help="default: memory_cartpole.png")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        plot(args.plot, {})  # before the training
    except (OSError, ValueError) as error:
        parser.error(f"--plot must be a file that can be written, got {args.plot}: {error}")
    torch.set_num_threads(1)  # The layers are too small for more.
    print(f"{'policy':9} {'seed':>4} {'time':>6} {'processor':>10}  mean return of {NUM_TEST} new episodes")
    results: dict[str, list[Curve]] = {}
    for name in args.policies:
        for seed in args.seeds:
            start = time.perf_counter()
            policy, curve = train(name, seed, args)
            results.setdefault(name, []).append(curve)
            times = f"{time.perf_counter() - start:5.0f}s {curve[-1][1]:9.0f}s"
            print(f"{name:9} {seed:4} {times}  {evaluate(policy, seed):6.1f}", flush=True)
    plot(args.plot, results)
    print(f"saved {args.plot}", file=sys.stderr)


if __name__ == "__main__":
    main()
