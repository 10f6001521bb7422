"""Balance a pole whose velocities are hidden: recurrent PPO with mingru.GRU, minGRU, nn.LSTM, and without memory.

    pip install ".[examples]"                    # in a clone of the repository
    python examples/memory_cartpole.py           # all policies, three seeds, with a plot in memory_cartpole.png
    python examples/memory_cartpole.py --policies mingru.GRU --seeds 0

The task is CartPole-v1 of Gymnasium with two of its four observations, the positions of the cart and of the pole. Both
velocities must be inferred from past positions. An episode ends when the pole falls, or after 500 time steps, and its
return is its number of time steps.

Each iteration steps through many environments side by side, and trains on these steps with PPO (Schulman et al. 2017,
"Proximal policy optimization algorithms"). Episodes begin anywhere in them. With `reset`, a layer of mingru computes
all these steps in one call. nn.LSTM has no resets: it is called for each part between two steps at which one begins.
"""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import LABELS, Parser, Run, at_least, drawing

# isort: split
import gymnasium
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.distributions import Categorical

import mingru

POLICIES = ("mingru.GRU", "minGRU", "nn.LSTM", "no memory")
# Index of each observed position, and the limit at which an episode ends: 2.4 m for the cart, 12° for the pole.
LIMITS = {0: 2.4, 2: 0.2095}
MAX_STEPS, NUM_TEST = 500, 100
# Of PPO. A rollout has 128 steps of each environment, and is used in 8 epochs of 4 minibatches.
DISCOUNT, GAE_LAMBDA, CLIP, MAX_GRAD_NORM = 0.99, 0.95, 0.2, 0.5
ROLLOUT, NUM_EPOCHS, NUM_MINIBATCHES = 128, 8, 4
QUICK = {"num_steps": 4096, "seeds": [0]}
Curve = list[tuple[int, float, float]]  # time steps, processor seconds, return


class Policy(nn.Module):
    """Map positions (S, B, 2) to the logits of the two actions (S, B, 2), the values (S, B), and the last state.

    The state is a list of tensors, empty before the first step. `reset` (S, B) is True at the first step of an episode.
    """

    def __init__(self, name: str, dims: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(len(LIMITS), dims)
        if name == "mingru.GRU":
            self.memory: nn.Module = mingru.GRU(dims, dims, 2, batch_first=False)
        elif name == "minGRU":
            # With `residual`, the output has the input beside its average in the state: a velocity is the difference.
            self.memory = mingru.MinGRU(dims, dims, batch_first=False, candidate="tanh", residual=True)
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

    def __init__(self, num_envs: int, seed: int, device: torch.device | None = None) -> None:
        self.envs = gymnasium.make_vec("CartPole-v1", num_envs, vectorization_mode="vector_entry_point").unwrapped
        self.x = positions(self.envs.reset(seed=seed)[0]).to(device)
        self.reset = torch.ones(num_envs, dtype=torch.bool, device=device)
        self.is_last, self.returns = torch.zeros_like(self.reset), torch.zeros(num_envs, device=device)
        self.state: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name != "envs"}
        envs = {name: torch.from_numpy(getattr(self.envs, name)) for name in ("state", "steps", "prev_done")}
        return {"own": own, "envs": envs, "generator": self.envs.np_random.bit_generator.state}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        vars(self).update(move_data_to_device(saved["own"], self.x.device))
        vars(self.envs).update({name: value.numpy() for name, value in saved["envs"].items()})
        self.envs.np_random.bit_generator.state = saved["generator"]

    @torch.no_grad()
    def play(self, policy: Policy, num_steps: int, is_greedy: bool = False) -> tuple[Rollout, Tensor, list[float]]:
        """Return the time steps, the value of the position after them (1, B), and the returns of finished episodes."""
        steps, finished = [], []
        for _ in range(num_steps):
            logits, value, self.state = policy(self.x[None], self.state, self.reset[None])
            actions = Categorical(logits=logits[0])
            action = logits[0].argmax(-1) if is_greedy else actions.sample()
            log_prob = actions.log_prob(action)
            observation, *results, _ = self.envs.step(action.cpu().numpy())
            reward, terminated, truncated = (torch.from_numpy(each).to(action.device) for each in results)
            steps.append((self.x, self.reset, self.is_last, action, log_prob, value[0], reward, terminated))
            # An environment returns the last position of an episode, and in the next step the first one of another.
            self.x, self.reset = positions(observation).to(action.device), self.is_last
            self.is_last = terminated | truncated
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


def train(run: Run, name: str, seed: int) -> tuple[Curve, float, float]:
    """Return the means of the last 100 returns after each iteration, the return in the test, and the seconds."""
    args = run.args
    torch.manual_seed(seed)
    policy, player = Policy(name, args.hidden_dims), Player(args.num_envs, seed, run.fabric.device)
    optimizer = torch.optim.Adam(policy.parameters(), args.learning_rate, eps=1e-5)
    num_iterations = -(-args.num_steps // (args.num_envs * ROLLOUT))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / num_iterations, num_iterations)
    policy, optimizer = run.fabric.setup(policy, optimizer)
    curve: Curve = []
    recent: list[float] = []
    for iteration in run.steps(num_iterations, policy, optimizer, schedule, player, curve, recent):
        state = player.state  # before the rollout, for each epoch
        data, last_value, finished = player.play(policy, ROLLOUT)
        advantage = advantages(data, last_value)
        for _ in range(NUM_EPOCHS):
            for rows in torch.randperm(args.num_envs).chunk(NUM_MINIBATCHES):
                part, first = Rollout(*(each[:, rows] for each in data)), [h[:, rows] for h in state]
                optimizer.zero_grad()
                run.fabric.backward(loss_of(policy, part, first, advantage[:, rows]))
                run.fabric.clip_gradients(policy, optimizer, max_norm=MAX_GRAD_NORM)
                optimizer.step()
        schedule.step()
        recent[:] = (recent + finished)[-100:]
        mean = sum(recent) / len(recent)
        run.log(**{"return": mean})
        curve.append(((iteration + 1) * args.num_envs * ROLLOUT, run.processor_seconds, mean))
    return curve, evaluate(policy, seed, run.fabric.device), run.seconds


def evaluate(policy: Policy, seed: int, device: torch.device | None = None) -> float:
    """Return the mean return of the first episodes in NUM_TEST environments, with the more probable actions."""
    data, *_ = Player(NUM_TEST, 10_000 + seed, device).play(policy, MAX_STEPS, is_greedy=True)
    return (data.reward * (data.reset.cumsum(0) == 1)).sum(0).mean().item()


def plot(path: Path, results: dict[str, list[Curve]]) -> None:
    """Save a plot of the returns in training against time steps and against processor seconds."""
    # Below one another and narrow, so that the text is readable on phones.
    with drawing(path, 5.5, 6.5) as figure:
        by_steps, by_seconds = figure.subplots(2)
        for name, runs in results.items():
            label = LABELS.get(name, name)
            for index, (steps, seconds, returns) in enumerate(zip(*run, strict=True) for run in runs):
                for axes, x in ((by_steps, [step / 1000 for step in steps]), (by_seconds, seconds)):
                    axes.plot(x, returns, color=f"C{POLICIES.index(name)}", label=None if index else label)
        for axes, text in ((by_steps, "Thousands of time steps"), (by_seconds, "Processor seconds, one thread")):
            axes.set(xlabel=text, ylabel="Time steps until the pole falls", ylim=(0, MAX_STEPS + 10))
        figure.legend(*by_steps.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


def main(argv: list[str] | None = None) -> None:
    defaults = {"hidden_dims": 64, "learning_rate": 2e-3, "save_every": 10, "accelerator": "cpu"}
    parser = Parser(__file__, __doc__, QUICK, seeds=(0, 1, 2), plot=Path("memory_cartpole.png"), **defaults)
    parser.add("--policies", nargs="+", choices=POLICIES, default=POLICIES, help="policies to train")
    parser.add("--num-steps", type=at_least(1), default=150_000, help="time steps of each policy")
    parser.add("--num-envs", type=at_least(NUM_MINIBATCHES), default=16, help="number of environments")
    args = parser.parse_args(argv)
    run = Run(parser, args, free=["policies"])
    torch.set_num_threads(1)  # The layers are too small for more.
    run.print(f"{'policy':9} {'seed':>4} {'time':>6} {'processor':>10}  mean return of {NUM_TEST} new episodes")
    results: dict[str, list[Curve]] = {}
    for name, seed in itertools.product(args.policies, args.seeds):
        curve, mean, seconds = run.once(f"{name}, seed {seed}", train, name, seed)
        results.setdefault(name, []).append(curve)
        run.print(f"{name:9} {seed:4} {seconds:5.0f}s {curve[-1][1]:9.0f}s  {mean:6.1f}")
    plot(args.plot, results)


if __name__ == "__main__":
    main()
