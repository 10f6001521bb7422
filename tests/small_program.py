"""Train two small models with common.py, all of whose kinds of objects the training changes."""

import os
import random
import signal

import torch
from common import Parser, Run, at_least, positive, write
from torch import nn


def train(run, name, args):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, args.hidden_dims), nn.Dropout(0.5), nn.Linear(args.hidden_dims, 1))
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.num_steps)
    model, optimizer = run.fabric.setup(model, optimizer)
    drawn, choice, total, losses = torch.Generator().manual_seed(1), random.Random(2), torch.zeros(()), []
    for step in run.steps(args.num_steps, model, optimizer, schedule, drawn, choice, total, losses):
        x = torch.randn(4, 2, generator=drawn) * choice.random()
        loss = model(x).square().mean()
        optimizer.zero_grad()
        run.fabric.backward(loss)
        optimizer.step()
        schedule.step()
        total += loss.detach()
        losses.append(loss.item())
        run.log(loss=loss)
        if f"{name} {step}" == args.kill:
            os.kill(os.getpid(), signal.SIGKILL)
    return {"total": total.item(), "losses": losses, "weights": model.state_dict()}


def make_parser():
    parser = Parser(__file__, __doc__, quick={"num_steps": 2}, save_every=3)
    parser.add_argument("--models", nargs="+", default=("first", "second"), help="names")
    parser.add_argument("--num-steps", type=at_least(1), default=8, help="training steps")
    parser.add_argument("--hidden-dims", type=at_least(1), default=3, help="features")
    parser.add_argument("--lr", type=positive, default=0.1, help="learning rate")
    parser.add_argument("--kill", help="model and step")
    parser.add_output("--plot", help="picture")
    parser.add_output("--results", help="file")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    run = Run(parser, args, free=["models", "kill"])
    results = {name: run.once(name, train, run, name, args) for name in args.models}
    for name, result in results.items():
        run.print(f"{name} {result['total']!r} {result['losses']!r}")
    if args.results:
        write(args.results, repr(results).encode())
    return run, results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
