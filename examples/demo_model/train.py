"""Trains the demo model: ``python -m examples.demo_model.train --docs DIR``.

``DIR`` holds Python's documentation sources (``*.rst.txt``; README.md says where to get them). About 45 minutes on two
CPU cores. Stop it at any time: the same command goes on from the last checkpoint under ``--work``.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from examples.demo_model.dialogues import DialogueMaker
from examples.demo_model.evaluate import WINDOW, evaluate, loss_of
from examples.demo_model.model import build_model, count_parameters, save_model
from examples.demo_model.prepare import SYSTEM_PROMPTS, encode_all, prepare, read_topics

logger = logging.getLogger("demo_model.train")

BATCH = 4  # windows per step
MUON_LR, ADAM_LR = 0.02, 2e-3
WARMUP_STEPS, DECAY_FRACTION = 40, 0.65  # the learning rate falls linearly to zero over the last part of the time
CHECKPOINT_S, FIRST_EVALUATION_S, EVALUATION_S = 120.0, 60.0, 300.0
EVALUATION_WINDOWS = 16  # per kind of text
EARLY_MIXTURE = {"prose": 0.42, "code": 0.13, "dialogue": 0.45}
LATE_MIXTURE = {"prose": 0.16, "code": 0.04, "dialogue": 0.80}


@dataclass(kw_only=True, slots=True)
class Progress:
    """What a checkpoint remembers besides weights."""

    step: int = 0
    elapsed_s: float = 0.0  # training time only: without preparation, compilation and evaluation


class WindowSource:
    """Draws training windows of the three kinds of text."""

    def __init__(self, work: Path, seed: int) -> None:
        """Reads what ``prepare`` wrote under ``work``."""
        self._rng = np.random.default_rng(seed)
        self._tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
        self._dialogues = DialogueMaker(read_topics(work), SYSTEM_PROMPTS, random.Random(seed))
        self._arrays = {kind: np.load(work / f"tokens_{kind}_train.npy") for kind in ("prose", "code")}
        self._pending: list[str] = []

    def batch(self, progress: float) -> torch.Tensor:
        """[BATCH, WINDOW + 1] int64; ``progress`` in 0..1 moves the mixture from early to late."""
        kinds = list(EARLY_MIXTURE)
        weights = np.array([(1 - progress) * EARLY_MIXTURE[kind] + progress * LATE_MIXTURE[kind] for kind in kinds])
        chosen = self._rng.choice(len(kinds), size=BATCH, p=weights / weights.sum())
        rows = [self._row(kinds[index]) for index in chosen]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _row(self, kind: str) -> np.ndarray:
        if kind == "dialogue":
            return self._dialogue_row()
        array = self._arrays[kind]
        start = int(self._rng.integers(0, len(array) - WINDOW - 1))
        row: np.ndarray = array[start : start + WINDOW + 1]
        return row

    def _dialogue_row(self) -> np.ndarray:
        """Whole dialogues until the window is full; the last is cut."""
        pieces: list[np.ndarray] = []
        while sum(map(len, pieces)) <= WINDOW:
            if not self._pending:
                self._pending = self._dialogues.epoch()
            pieces.append(encode_all(self._tokenizer, [self._pending.pop()]))
        return np.concatenate(pieces)[: WINDOW + 1]


def make_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and "embed" not in name]
    others = [parameter for name, parameter in named if parameter.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.02, momentum=0.95)
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adam]


def learning_rate_factor(progress: float, step: int) -> float:
    """1 after warm-up, then down to 0 at ``progress`` 1."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return max(0.0, min(1.0, warmup, (1.0 - progress) / DECAY_FRACTION))


def save_checkpoint(
    path: Path, model: Qwen3ForCausalLM, optimizers: list[torch.optim.Optimizer], progress: Progress
) -> None:
    """Replaces the checkpoint in one move, so that a stop while writing loses nothing."""
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": progress.step,
        "elapsed_s": progress.elapsed_s,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load_checkpoint(path: Path, model: Qwen3ForCausalLM, optimizers: list[torch.optim.Optimizer]) -> Progress:
    """Restores model and optimizers in place; a fresh ``Progress`` where there is no checkpoint."""
    if not path.exists():
        return Progress()
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return Progress(step=state["step"], elapsed_s=state["elapsed_s"])


def export(model: Qwen3ForCausalLM, work: Path, out: Path) -> None:
    """Model and tokenizer in one directory, as the cluster loads it."""
    save_model(model, out)
    for file in (work / "tokenizer").iterdir():
        shutil.copy(file, out / file.name)


def append_row(path: Path, row: dict[str, float]) -> None:
    """One line of the loss curve."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def report(model: Qwen3ForCausalLM, work: Path, progress: Progress, train_loss: float) -> None:
    """Evaluates, logs, and appends to the loss curve."""
    held_out = {kind: evaluate(model, work, kind, EVALUATION_WINDOWS) for kind in EARLY_MIXTURE}
    row = {
        "step": progress.step,
        "tokens": progress.step * BATCH * WINDOW,
        "elapsed_s": round(progress.elapsed_s, 1),
        "train_loss": round(train_loss, 4),
        **{f"held_out_{kind}": round(loss, 4) for kind, loss in held_out.items()},
    }
    append_row(work / "loss_curve.csv", row)
    logger.info("evaluation: %s", row)


class Trainer:
    """Model, optimizers and progress: what one training step changes and a checkpoint keeps."""

    def __init__(self, work: Path, minutes: float) -> None:
        """Goes on from ``work / "checkpoint.pt"`` where there is one."""
        self._work = work
        self._budget_s = minutes * 60.0
        self.model = build_model()
        self._optimizers = make_optimizers(self.model)
        self._base_rates = [optimizer.param_groups[0]["lr"] for optimizer in self._optimizers]
        self.progress = load_checkpoint(work / "checkpoint.pt", self.model, self._optimizers)
        self._source = WindowSource(work, seed=self.progress.step)
        self._compiled_loss = torch.compile(loss_of)
        self._mean_loss = math.nan
        logger.info("%d parameters, starting at step %d", count_parameters(self.model), self.progress.step)

    def run(self) -> None:
        """Steps until the time is used; checkpoints and evaluates on the way and at the end."""
        torch.autograd.backward(self._compiled_loss(self.model, self._source.batch(0.0)))  # compiles, off the clock
        checkpoint_at = self.progress.elapsed_s + CHECKPOINT_S
        evaluation_at = self.progress.elapsed_s + FIRST_EVALUATION_S
        while self.progress.elapsed_s < self._budget_s:
            started = time.monotonic()
            self._step(self.progress.elapsed_s / self._budget_s)
            self.progress.step += 1
            self.progress.elapsed_s += time.monotonic() - started
            if self.progress.step % 20 == 0:
                logger.info("step %d  %.0f s  loss %.3f", self.progress.step, self.progress.elapsed_s, self._mean_loss)
            if self.progress.elapsed_s > checkpoint_at:
                self._save()
                checkpoint_at += CHECKPOINT_S
            if self.progress.elapsed_s > evaluation_at:
                report(self.model, self._work, self.progress, self._mean_loss)
                evaluation_at += EVALUATION_S
        self._save()
        report(self.model, self._work, self.progress, self._mean_loss)

    def _step(self, done: float) -> None:
        for optimizer, rate in zip(self._optimizers, self._base_rates, strict=True):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(done, self.progress.step)
        loss = self._compiled_loss(self.model, self._source.batch(done))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        self._mean_loss = loss.item() if math.isnan(self._mean_loss) else 0.97 * self._mean_loss + 0.03 * loss.item()

    def _save(self) -> None:
        save_checkpoint(self._work / "checkpoint.pt", self.model, self._optimizers, self.progress)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, required=True, help="directory of Python's documentation sources")
    parser.add_argument("--work", type=Path, default=Path("demo_model_work"), help="token arrays and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("deploy/demo_model"), help="where the model is written")
    parser.add_argument("--minutes", type=float, default=42.0, help="training time, without preparation")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    prepare(arguments.docs, arguments.work)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    trainer = Trainer(arguments.work, arguments.minutes)
    trainer.run()
    export(trainer.model, arguments.work, arguments.out)


if __name__ == "__main__":
    main()
