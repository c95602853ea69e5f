"""Networks that are trained by Adam with moments that are kept in an emulated format."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .emulated_formats import (
    BITSANDBYTES,
    BY_NAME,
    EXACT,
    F32,
    FLASHOPTIM,
    NEAREST,
    OURS,
    Array,
    Contender,
    Moments,
)

TRAINED = (EXACT, OURS, NEAREST.name, BITSANDBYTES, FLASHOPTIM)


def digits_loss(contender: Contender, seed: int, steps: int) -> float:
    """Train the network of `python -m fusedstep demo` and return its loss on unseen digits."""
    from fusedstep.commands import digits

    data = digits.load_digits()
    rng = np.random.default_rng(seed)
    params = digits.init_params(rng)
    flat = Flat({name: p.size for name, p in params.items()})
    moments = Moments(contender, flat.elements)
    for step in range(steps):
        batch = rng.integers(len(data.train_labels), size=64)
        _, grads = digits.loss_and_grads(params, data.train_images[batch], data.train_labels[batch])
        u = moments.update(flat.join(grads))
        for name, part in flat.split(u):
            params[name] -= F32(learning_rate(1e-3, step, steps)) * part.reshape(params[name].shape)
    loss, _ = digits.loss_and_grads(params, data.test_images, data.test_labels)
    return loss


def transformer_loss(contender: Contender, seed: int, steps: int) -> float:
    return train_transformer(contender, seed, steps)[0]


def train_transformer(contender: Contender, seed: int, steps: int) -> tuple[float, Moments]:
    """Train a small transformer on the prose of Python's help; return its loss on unseen text."""
    import torch

    context, batch_size, width = 64, 16, 72
    data, letters = help_text()
    split = len(data) * 9 // 10
    torch.manual_seed(seed)
    model = transformer(letters, context, width)
    params = dict(model.named_parameters())
    flat = Flat({name: p.numel() for name, p in params.items()})
    moments = Moments(contender, flat.elements)

    def loss_at(starts: Array) -> Any:
        text = torch.from_numpy(data[starts[:, np.newaxis] + np.arange(context + 1)])
        scores = model(text[:, :-1])
        return torch.nn.functional.cross_entropy(scores.flatten(0, 1), text[:, 1:].flatten())

    rng = np.random.default_rng(seed)
    for step in range(steps):
        model.zero_grad()
        loss_at(rng.integers(split - context - 1, size=batch_size)).backward()
        u = moments.update(flat.join({name: p.grad.numpy() for name, p in params.items()}))
        rate = F32(learning_rate(3e-3, step, steps))
        for name, part in flat.split(u):
            values = params[name].detach().numpy()
            values -= rate * part.reshape(values.shape)
    with torch.no_grad():
        unseen = np.arange(split, len(data) - context - 1, context)
        loss = np.mean([float(loss_at(part)) for part in np.array_split(unseen, 8)])
    return float(loss), moments


def help_text() -> tuple[Array, int]:
    """Return the topics of Python's `help()` as numbers of letters, and how many there are."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics.values())
    letters, data = np.unique(list(text), return_inverse=True)
    return data.astype(np.int64), len(letters)


def transformer(letters: int, context: int, width: int) -> Any:
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.letter, self.place = nn.Embedding(letters, width), nn.Embedding(context, width)
            layer = nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), False)
            self.scores = nn.Linear(width, letters)
            self.mask = nn.Transformer.generate_square_subsequent_mask(context)

        def forward(self, text: torch.Tensor) -> torch.Tensor:
            x = self.letter(text) + self.place.weight
            scores: torch.Tensor = self.scores(self.layers(x, mask=self.mask, is_causal=True))
            return scores

    return Model()


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Return a rate that rises over the first twentieth and falls as a cosine."""
    return peak * min(1.0, 20 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Flat:
    """Many arrays in one, each beginning a block of its own in every format that is trained."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.places: dict[str, slice] = {}
        self.elements = 0
        for name, size in sizes.items():
            self.places[name] = slice(self.elements, self.elements + size)
            self.elements += -(-size // 256) * 256

    def join(self, arrays: dict[str, Array]) -> Array:
        flat = np.zeros(self.elements, F32)
        for name, place in self.places.items():
            flat[place] = arrays[name].ravel()
        return flat

    def split(self, flat: Array) -> Iterator[tuple[str, Array]]:
        return ((name, flat[place]) for name, place in self.places.items())


TASKS: dict[str, Callable[[Contender, int, int], float]] = {
    "digits": digits_loss,
    "transformer": transformer_loss,
}


def measure_training(task: str, seed: int, steps: int) -> dict[str, float | None]:
    """Return the last loss of every contender that is trained with, None where it diverged."""
    losses = {}
    with np.errstate(all="ignore"):
        for name in TRAINED:
            loss = TASKS[task](BY_NAME[name], seed, steps)
            losses[name] = loss if math.isfinite(loss) else None
    return losses
