"""A small transformer, trained with `fusedstep.torch.AdamW` and with `torch.optim.AdamW`.

The model predicts the next character of the help texts that come with Python (`pydoc_data`), from
the same first weights and the same batches for each optimizer: PyTorch's own with ``fused=True``,
ours, and ours with 8-bit state. It prints the loss at the end, the time of an optimizer's step
(the median) and the memory of its state.

What to expect: the same loss with ours as with PyTorch's, a shorter step, and close to the same
loss with a state of about a quarter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn

import fusedstep.torch

CONTEXT = 64
BATCH = 16
WIDTH = 128
LAYERS = 2


class Transformer(nn.Module):
    def __init__(self, characters: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        hidden = self.characters(text) + self.places.weight
        for block in self.blocks:
            hidden = block(hidden, src_mask=self.mask)
        return self.head(self.norm(hidden))


def train(make: Any, text: torch.Tensor, characters: int, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = Transformer(characters)
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    losses, times = [], []
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (BATCH, 1))
        batch = text[starts + torch.arange(CONTEXT + 1)]
        optimizer.zero_grad()
        predicted = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(predicted.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
        schedule.step()
        losses.append(loss.item())
    state = sum(
        value.nbytes
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    )
    return {
        "loss": statistics.fmean(losses[-10:]),
        "step_us": statistics.median(times) * 1e6,
        "state_bytes": state,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="40 steps instead of 400")
    parser.add_argument("--json", action="store_true", help="print for machines")
    arguments = parser.parse_args()
    words = "".join(topics.values())
    alphabet = sorted(set(words))
    places = {character: i for i, character in enumerate(alphabet)}
    text = torch.tensor([places[character] for character in words])
    options = {"weight_decay": 0.1}
    contenders = {
        "torch.optim.AdamW": lambda p: torch.optim.AdamW(p, fused=True, **options),
        "fusedstep.torch.AdamW": lambda p: fusedstep.torch.AdamW(p, **options),
        "the same, 8-bit state": lambda p: fusedstep.torch.AdamW(p, state_dtype="8bit", **options),
    }
    found = {}
    for name, make in contenders.items():
        found[name] = train(make, text, len(alphabet), 40 if arguments.quick else 400)
        if not arguments.json:
            result = found[name]
            print(
                f"{name:22} loss {result['loss']:.4f}, a step {result['step_us']:7.0f} us, "
                f"state {result['state_bytes'] / 2**20:.2f} MiB",
                flush=True,
            )
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
