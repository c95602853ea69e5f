"""`fusedstep.torch.AdamW` in Lightning: what ``configure_optimizers`` returns.

A small network predicts the next character of the help texts that come with Python (`pydoc_data`)
from the 16 before it. It is trained twice, from the same weights and with the same batches,
schedule and clipping: with `torch.optim.AdamW` (``fused=True``) and with ours. Needs
``pip install lightning``.

What to expect: the same loss with either.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedstep.torch

CONTEXT = 16
WIDTH = 32


class NextCharacter(lightning.LightningModule):
    def __init__(self, characters: int, make: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Embedding(characters, WIDTH),
            nn.Flatten(),
            nn.Linear(CONTEXT * WIDTH, 128),
            nn.GELU(),
            nn.Linear(128, characters),
        )
        self.make = make
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        text, following = batch
        loss = nn.functional.cross_entropy(self.network(text), following)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.make(self.parameters(), lr=3e-3, weight_decay=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def samples(text: str) -> tuple[TensorDataset, int]:
    """Return pieces of the text with the character that follows, and how many there are."""
    alphabet = sorted(set(text))
    places = {character: i for i, character in enumerate(alphabet)}
    pieces = torch.tensor([places[character] for character in text]).unfold(0, CONTEXT + 1, 1)
    return TensorDataset(pieces[:, :-1], pieces[:, -1]), len(alphabet)


def train(make: Callable[..., torch.optim.Optimizer], steps: int) -> float:
    """Return the mean loss of the last ten steps."""
    lightning.seed_everything(0, verbose=False)
    dataset, characters = samples("".join(topics.values()))
    model = NextCharacter(characters, make)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(dataset, batch_size=128, shuffle=True))
    return sum(model.losses[-10:]) / 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="100 steps instead of 1000")
    parser.add_argument("--json", action="store_true", help="print for machines")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    contenders = {
        "torch.optim.AdamW": lambda *a, **k: torch.optim.AdamW(*a, fused=True, **k),
        "fusedstep.torch.AdamW": fusedstep.torch.AdamW,
    }
    found = {}
    for name, make in contenders.items():
        found[name] = train(make, 100 if arguments.quick else 1000)
        if not arguments.json:
            print(f"{name:22} loss {found[name]:.4f}", flush=True)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
