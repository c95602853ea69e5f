"""What several test modules share."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

from numpy.typing import NDArray


@contextmanager
def assert_unchanged(*arrays: NDArray[Any]) -> Iterator[None]:
    """Fail unless the block leaves every byte of `arrays` as it is, also where it raises."""
    before = [array.tobytes() for array in arrays]
    try:
        yield
    finally:
        for i, (array, old) in enumerate(zip(arrays, before, strict=True)):
            assert array.tobytes() == old, f"array {i} was written"


def combinations(**choices: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Every combination of options, less those of GD that are refused."""
    options = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
    return [o for o in options if not o.get("nesterov") or (o["momentum"] and not o["dampening"])]


# What plain and momentum GD may be asked for.
GD_CHOICES: dict[str, tuple[Any, ...]] = {
    "momentum": (0.0, 0.9),
    "dampening": (0.0, 0.3),
    "nesterov": (False, True),
    "weight_decay": (0.0, 0.1),
    "maximize": (False, True),
}


def describe(value: Any) -> str | None:
    """Name a dict of options in a test's id; anything else keeps pytest's own id."""
    if not isinstance(value, dict):
        return None
    return ",".join(f"{key}={getattr(v, '__name__', v)}" for key, v in value.items())
