"""Train two small models with common.py, all of whose kinds of objects the training changes."""

import os
import signal

import torch
from common import Parser, Run, positive, write
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR


def train(run, name):
    args = run.args
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, args.hidden_dims), nn.Dropout(0.5), nn.Linear(args.hidden_dims, 1))
    total, losses = torch.zeros(1), []

    def loss_of(model, step):
        loss = model(torch.randn(4, 2)).square().mean()
        total.add_(loss.detach())
        losses.append(loss.item())
        if f"{name} {step}" == args.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    trained = run.train(args.num_steps, loss_of, model, total, losses, schedule_of=CosineAnnealingLR, lr=args.lr)
    return {"total": total.item(), "losses": losses, "weights": trained.state_dict()}


def main(argv=None):
    parser = Parser(__file__, __doc__, {"num_steps": 2}, save_every=3, num_steps=8, hidden_dims=3, plot=None)
    parser.add_argument("--models", nargs="+", default=("first", "second"), help="names")
    parser.add_argument("--lr", type=positive, default=0.1, help="learning rate")
    parser.add_argument("--kill", help="model and step")
    parser.add_output("--results", "file")
    args = parser.parse_args(argv)
    run = Run(parser, args, free=["kill"])
    results = {name: run.once(name, train, name) for name in args.models}
    for name, result in results.items():
        run.print(f"{name} {result['total']!r} {result['losses']!r}")
    if args.results:
        write(args.results, repr(results).encode())
    return run, results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
