"""Compare layers in the recurrent forecasters of four libraries: errors of forecasts of AirPassengers.

    python benchmarks/forecasters.py darts                   # pip install "darts[torch]"
    python benchmarks/forecasters.py gluonts                 # pip install "gluonts[torch]"
    python benchmarks/forecasters.py neuralforecast          # pip install neuralforecast
    python benchmarks/forecasters.py pytorch_forecasting     # pip install pytorch-forecasting

The last months are forecast from those before. The options of Darts are those of its example: month and year are known,
and RNNModel feeds its output back. With `--alone`, the forecast depends on the series only.
"""

import argparse
import logging
import tempfile
import time
import warnings

import numpy as np
import pandas as pd
import torch

from mingru.bench import print_table, where

# International airline passengers in thousands, 1949 to 1960. Box and Jenkins, Time Series Analysis, 1970, series G.
PASSENGERS = """
112 118 132 129 121 135 148 148 136 119 104 118 115 126 141 135 125 149 170 170 158 133 114 140 145 150 178 163 172
178 199 199 184 162 146 166 171 180 193 181 183 218 230 242 209 191 172 194 196 196 236 235 229 243 264 272 237 211
180 201 204 188 235 227 234 264 302 293 259 229 203 229 242 233 267 269 270 315 364 347 312 274 237 278 284 277 317
313 318 374 413 405 355 306 271 306 315 301 356 348 355 422 465 467 404 347 305 336 340 318 362 348 363 435 491 505
404 359 310 337 360 342 406 396 420 472 548 559 463 407 362 405 417 391 419 461 472 535 622 606 508 461 390 432
"""
VALUES = np.array(PASSENGERS.split(), np.float32)
MONTHS = pd.date_range("1949-01", periods=len(VALUES), freq="MS")
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
QUIET |= {"enable_model_summary": False}
FORECASTER = {"residual": True, "candidate": "tanh"}


def percent(found, expected):
    return 100 * float(np.mean(np.abs(found / expected - 1)))


def darts_rows(args, end):
    from darts import TimeSeries
    from darts.models import RNNModel

    from mingru.integrations.darts import MinGRUModule, MinLSTMModule

    kinds = {"nn.GRU": "GRU", "nn.LSTM": "LSTM", "MinGRUModule": MinGRUModule, "MinLSTMModule": MinLSTMModule}
    kinds["BlockGRU"] = type("Blocks", (MinGRUModule,), {"options": {"cell": "blockgru"}})
    cells = {f"{name}, layers: {count}": (kind, count) for name, kind in kinds.items() for count in (1, 2)}
    year = (MONTHS.year.to_numpy() - 1949) / 12
    known = np.column_stack([year, np.eye(12)[MONTHS.month.to_numpy() - 1]]).astype(np.float32)
    covariates = {} if args.alone else {"future_covariates": TimeSeries.from_times_and_values(MONTHS, known)}
    scale = VALUES[:end].max()
    series = TimeSeries.from_times_and_values(MONTHS[:end], VALUES[:end] / scale)
    lengths = {"input_chunk_length": 24 if args.alone else 14, "training_length": 36 if args.alone else 20}

    def forecast(kind, num_layers, seed):
        options = {"hidden_dim": args.size, "batch_size": 16, "n_epochs": args.epochs, "n_rnn_layers": num_layers}
        options |= {"optimizer_kwargs": {"lr": args.lr}, "random_state": seed, "pl_trainer_kwargs": QUIET}
        model = RNNModel(model=kind, **options, **lengths)
        model.fit(series, **covariates)
        return model.predict(args.months, **covariates).values()[:, 0] * scale

    return cells, forecast


def neuralforecast_rows(args, end):
    from neuralforecast import NeuralForecast, models

    from mingru.integrations import neuralforecast as ours

    cells = {}
    for name in ("GRU", "LSTM", "DeepAR"):
        cells |= {name: (getattr(models, name),), f"Min{name}": (getattr(ours, f"Min{name}"),)}
    frame = pd.DataFrame({"unique_id": "passengers", "ds": MONTHS[:end], "y": VALUES[:end]})

    def forecast(kind, seed):
        given = {"h": args.months, "input_size": 24, "max_steps": args.epochs, "random_seed": seed}
        forecaster = NeuralForecast([kind(scaler_type="standard", **given, **QUIET)], freq="MS")
        forecaster.fit(frame)
        return forecaster.predict()[kind.__name__].to_numpy()

    return cells, forecast


def gluonts_rows(args, end):
    from gluonts.dataset.common import ListDataset
    from gluonts.torch.model.deepar import DeepAREstimator
    from lightning.pytorch import seed_everything

    from mingru.integrations import gluonts as ours

    kinds = {"nn.LSTM": DeepAREstimator, 'minGRU, gate="mixed"': ours.DeepAREstimator}
    kinds['minLSTM, candidate="tanh"'] = type("Tanh", (ours.DeepAREstimator,), {"options": FORECASTER})
    series = ListDataset([{"start": "1949-01", "target": VALUES[:end]}], freq="M")

    def forecast(kind, seed):
        seed_everything(seed, verbose=False)
        lengths = {"prediction_length": args.months, "context_length": 24, "num_batches_per_epoch": 4}
        # It takes the weights of the epoch with the lowest loss from a file.
        with tempfile.TemporaryDirectory() as folder:
            trainer = QUIET | {"max_epochs": args.epochs, "enable_checkpointing": True, "default_root_dir": folder}
            predictor = kind(freq="M", lr=args.lr, trainer_kwargs=trainer, **lengths).train(series)
        return next(iter(predictor.predict(series))).mean

    return {name: (kind,) for name, kind in kinds.items()}, forecast


def pytorch_forecasting_rows(args, end):
    from lightning.pytorch import Trainer, seed_everything
    from pytorch_forecasting import TimeSeriesDataSet, models

    from mingru.integrations import pytorch_forecasting as ours

    plain = type("Plain", (ours.RecurrentNetwork,), {"options": FORECASTER})
    mixed = type("Mixed", (ours.RecurrentNetwork,), {"options": {"residual": True, "norm": "rms", "gate": "mixed"}})
    kinds = {"nn.GRU": models.RecurrentNetwork, "BlockGRU": ours.RecurrentNetwork, "minGRU": plain}
    kinds['minGRU, gate="mixed"'] = mixed
    frame = pd.DataFrame({"time": range(len(VALUES)), "series": "0", "y": VALUES, "month": MONTHS.month.astype(str)})
    known = {"time_varying_known_categoricals": ["month"], "time_varying_known_reals": ["time"]}
    lengths = {"max_encoder_length": 24, "max_prediction_length": args.months, "time_varying_unknown_reals": ["y"]}
    training = TimeSeriesDataSet(frame[:end], "time", "y", ["series"], **lengths, **known)
    last = TimeSeriesDataSet.from_dataset(training, frame, predict=True, stop_randomization=True)

    def forecast(kind, seed):
        seed_everything(seed, verbose=False)
        options = {"cell_type": "GRU", "rnn_layers": 2, "hidden_size": 24, "learning_rate": args.lr}
        model = kind.from_dataset(training, **options)
        Trainer(max_epochs=args.epochs, **QUIET).fit(model, training.to_dataloader(batch_size=16))
        return model.predict(last.to_dataloader(train=False), trainer_kwargs={**QUIET})[0].numpy()

    return {name: (kind,) for name, kind in kinds.items()}, forecast


ROWS = {"darts": darts_rows, "gluonts": gluonts_rows, "neuralforecast": neuralforecast_rows}
ROWS["pytorch_forecasting"] = pytorch_forecasting_rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=ROWS)
    parser.add_argument("--alone", action="store_true", help="Darts forecasts without month and year")
    parser.add_argument("--epochs", type=int, default=300, help="epochs; in NeuralForecast, batches (default: 300)")
    parser.add_argument("--size", type=int, default=20, help="features of layers, only of Darts (default: %(default)s)")
    parser.add_argument("--layers", nargs="*", help="rows of the table (default: all)")
    parser.add_argument("--lr", type=float, default=1e-3, help="not of NeuralForecast (default: %(default)s)")
    parser.add_argument("--months", type=int, default=36, help="months to forecast (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="(default: 0 1 2)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # of Lightning
    torch.set_num_threads(1)
    print(where())
    end = len(VALUES) - args.months
    cells, forecast = ROWS[args.library](args, end)
    last_year = np.tile(VALUES[end - 12 : end], 1 + args.months // 12)[: args.months]
    rows = [["the last year again", f"{percent(last_year, VALUES[end:]):.1f}", ""]]
    for name, cell in [each for each in cells.items() if each[0] in (args.layers or cells)]:
        start = time.perf_counter()
        errors = [f"{percent(forecast(*cell, seed), VALUES[end:]):.1f}" for seed in args.seeds]
        seconds = (time.perf_counter() - start) / max(1, len(args.seeds))
        rows.append([name, ", ".join(errors), f"{seconds:.0f}"])
        print(*rows[-1], sep="; ", flush=True)
    title = f"{args.library}, {args.months} months, {args.epochs} epochs{', series alone' if args.alone else ''}"
    print_table(title, ["layer", "mean absolute percentage error, by seed", "seconds"], rows)


if __name__ == "__main__":
    main()
