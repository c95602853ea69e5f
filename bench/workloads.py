"""What is stepped: lists of array shapes, filled with the same numbers for every contender."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LR, BETAS, EPS, MOMENTUM = 1e-3, (0.9, 0.999), 1e-8, 0.9

# Bytes moved per parameter and element size: every stream read, and those that are written.
ACCESSES = {"gd": 3, "momentum": 5, "adam": 7}


@dataclass(frozen=True)
class Workload:
    """The parameters of a model, and the rule that updates them."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    rule: str = "adam"
    dtype: str = "float32"

    @property
    def elements(self) -> int:
        return sum(prod(shape) for shape in self.shapes)

    @property
    def bytes_moved(self) -> int:
        return self.elements * ACCESSES[self.rule] * np.dtype(self.dtype).itemsize

    def arrays(self, seed: int) -> list[Array]:
        rng = np.random.default_rng(seed)
        dtype = np.dtype(self.dtype)
        return [rng.standard_normal(shape, dtype=dtype.type) for shape in self.shapes]

    def params(self) -> list[Array]:
        return self.arrays(0)

    def grads(self) -> list[Array]:
        return self.arrays(1)


def one_array(elements: int, rule: str = "adam", dtype: str = "float32") -> Workload:
    return Workload(f"{rule} {dtype} {elements:,}", ((elements,),), rule, dtype)


MANY_SMALL = Workload("1000 arrays of 64", ((64,),) * 1000)
MLP = Workload("MLP, 6 arrays", ((784, 20), (20,), (20, 64), (64,), (64, 3), (3,)))


def _gpt2_small() -> Workload:
    width, vocabulary, positions, layers = 768, 50257, 1024, 12
    block = (
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    )  # fmt: skip
    shapes = ((vocabulary, width), (positions, width), *block * layers, (width,), (width,))
    return Workload("GPT-2 small, 148 arrays", shapes)


GPT2_SMALL = _gpt2_small()
