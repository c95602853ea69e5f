"""How parameters and gradients are given: one array, a list, a dict by name, or groups of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Params = Array | Sequence[Array] | Mapping[str, Array] | Sequence[Mapping[str, Any]]
    Grads = Array | Sequence[Any] | Mapping[str, Array | None]


def are_groups(params: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    return (
        isinstance(params, list | tuple)
        and len(params) > 0
        and all(isinstance(group, Mapping) for group in params)
    )


def structure_of(params: Any) -> tuple[str, list[str | None], list[Any]]:
    """Return how a group's parameters were given, their names and the arrays."""
    if isinstance(params, Mapping):
        for name in params:
            if not isinstance(name, str):
                raise TypeError(f"params: names must be strings, got {name!r}")
        structure, names, arrays = "dict", list(params), list(params.values())
    elif isinstance(params, list | tuple):
        structure, names, arrays = "list", [None] * len(params), list(params)
    else:
        return "array", [None], [params]
    if not arrays:
        raise ValueError("params: no arrays")
    return structure, names, arrays


def suffixes_of(structure: str, names: Sequence[str | None], where: str) -> list[str]:
    """Return what follows "params" or "grads" where an error names one of the arrays."""
    if structure == "array":
        return [where]
    return [f"{where}[{i if name is None else name!r}]" for i, name in enumerate(names)]
