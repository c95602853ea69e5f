"""How a bucket is stepped: the native optimizer of its pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import narrow
from .layout import Piece
from .storage import in_memory_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..optimizer import Optimizer
    from .boundary import Parameters
    from .device import Bytes


class BucketStep(NamedTuple):
    """The native optimizer of a bucket's pieces.

    Attributes
    ----------
    native : object
        Of `_core`.
    groups : list of int
        The optimizer's group that each of its groups is of.
    params : list of list of numpy.ndarray
        The pieces of each group, in host memory.
    order : list of list of int
        The pieces by their number in the bucket.
    """

    native: Any
    groups: list[int]
    params: list[list[NDArray[Any]]]
    order: list[list[int]]


def bucket_step(
    inner: Optimizer, params: Parameters, host: Bytes, pieces: Sequence[Piece]
) -> BucketStep:
    """Make the native optimizer of the pieces of a bucket."""
    step = BucketStep(inner._make_native(), [], [], [])
    for g in sorted({params.group_of[piece.param] for piece in pieces}):
        order = [i for i, piece in enumerate(pieces) if params.group_of[piece.param] == g]
        keys = inner._state_keys(inner.param_groups[g])
        arrays, state, extras, suffixes = [], [], [], []
        for i in order:
            piece = pieces[i]
            param, own = params.arrays[piece.param], inner._arrays[piece.param]
            cut_out = {
                key: in_memory_order(param, array)[_part(array, key, piece)]
                for key, array in own.items()
            }
            end = piece.offset + (piece.stop - piece.start) * params.dtypes[piece.param].itemsize
            arrays.append(host[piece.offset : end].view(params.dtypes[piece.param]))
            state.append([cut_out[key] for key in keys])
            beside = cut_out.get("master", cut_out.get("correction"))
            extras.append([beside, None, *(cut_out.get(key + narrow.UNITS) for key in keys)])
            suffixes.append(params.suffixes[piece.param])
        step.native.add_group(
            "list",
            arrays,
            [None] * len(arrays),
            [list(of_key) for of_key in zip(*state, strict=True)],
            suffixes,
            None,
            [list(of_stream) for of_stream in zip(*extras, strict=True)],
            inner._storage.master_weights == "stochastic",
        )
        step.groups.append(g)
        step.params.append(arrays)
        step.order.append(order)
    return step


def _part(array: NDArray[Any], key: str, piece: Piece) -> slice:
    """Return where a piece's elements of a state array are; units belong to whole parameters."""
    return slice(None) if key.endswith(narrow.UNITS) else slice(piece.start, piece.stop)
