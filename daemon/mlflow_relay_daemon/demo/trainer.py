"""One rank of the demo: softmax regression on handwritten digits, trained by all ranks together.

This is the code to look at. With the relay, a rank needs `start_run` and `log_metrics` and nothing
else: no check for rank 0, no credentials, no retries, no try around logging. `Witness` and `Pace`
belong to the demo alone.

    RANK=0 WORLD_SIZE=4 python -m mlflow_relay_daemon.demo.trainer FOLDER STEPS
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import mlflow_relay

from .all_reduce import AllReduce
from .witness import Witness

EXPERIMENT, RUN_NAME = "mlflow-relay demo", "digits"
LEARNING_RATE, MOMENTUM, BATCH = 0.02, 0.9, 32
#: So that there is time to watch: without a pause, this training takes a second.
STEP_S = 0.016

Array = np.ndarray[Any, np.dtype[np.float64]]
Labels = np.ndarray[Any, np.dtype[np.int64]]


def train(rank: int, world_size: int, steps: int, folder: Path) -> None:
    """Train on this rank's share of the data, in step with the other ranks."""
    digits = np.load(folder / "digits.npz")
    images, labels = digits["images"][rank::world_size], digits["labels"][rank::world_size]
    test_images, test_labels = digits["test_images"], digits["test_labels"]
    weights, velocity = np.zeros((2, images.shape[1], 10))
    random = np.random.default_rng(rank)
    all_reduce = AllReduce(rank, world_size, folder / "all_reduce")
    pace, witness = Pace(STEP_S), Witness(rank)

    params = {"lr": LEARNING_RATE, "momentum": MOMENTUM, "batch": BATCH, "ranks": world_size}
    with mlflow_relay.start_run(EXPERIMENT, RUN_NAME, params=params) as run:
        log_metrics = witness.watch(run.log_metrics)
        for step in range(steps):
            pace.wait()
            started_s = time.perf_counter()
            batch = random.choice(len(images), BATCH, replace=False)
            loss, gradient = loss_and_gradient(weights, images[batch], labels[batch])
            computed_s = time.perf_counter()
            mean = all_reduce.mean(np.append(gradient, loss))
            reduced_s = time.perf_counter()
            lr = LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
            velocity = MOMENTUM * velocity - lr * mean[:-1].reshape(weights.shape)
            weights += velocity
            test_accuracy = accuracy(weights, test_images, test_labels)
            log_metrics(
                {
                    "train/loss": loss,
                    "train/mean_loss": mean[-1],
                    "train/accuracy": accuracy(weights, images[batch], labels[batch]),
                    "test/accuracy": test_accuracy,
                    "lr": lr,
                    "norm/gradient": np.linalg.norm(gradient),
                    "norm/mean_gradient": np.linalg.norm(mean[:-1]),
                    "norm/weights": np.linalg.norm(weights),
                    "ms/compute": 1000 * (computed_s - started_s),
                    "ms/all_reduce": 1000 * (reduced_s - computed_s),
                },
                step=step,
            )
            if rank == 0:
                print(step + 1, mean[-1], test_accuracy, flush=True)
    witness.write(folder)


def loss_and_gradient(weights: Array, images: Array, labels: Labels) -> tuple[float, Array]:
    """Return the mean cross entropy of softmax regression, and its gradient.

    Args: weights: (features, classes); images: (n, features); labels: (n,).
    """
    logits = images @ weights
    guesses = np.exp(logits - logits.max(axis=1, keepdims=True))
    guesses /= guesses.sum(axis=1, keepdims=True)
    here = np.arange(len(labels))
    loss = -np.log(guesses[here, labels]).mean()
    guesses[here, labels] -= 1
    return float(loss), images.T @ guesses / len(labels)


def accuracy(weights: Array, images: Array, labels: Labels) -> float:
    """Return the share of images that are told rightly."""
    return float(((images @ weights).argmax(axis=1) == labels).mean())


class Pace:
    """Lets one step begin every so many seconds."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._next_s = 0.0

    def wait(self) -> None:
        now_s = time.monotonic()
        self._next_s = max(self._next_s, now_s - self._step_s)  # a late step is not made up for
        time.sleep(max(0.0, self._next_s - now_s))
        self._next_s += self._step_s


if __name__ == "__main__":
    train(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        folder=Path(sys.argv[1]),
        steps=int(sys.argv[2]),
    )
