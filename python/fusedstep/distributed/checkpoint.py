"""Checkpoints of sharded optimizers: a folder with one file for each rank, and an index.

A checkpoint is written in a hidden folder, which is renamed once everything in it is on disk, so
that what bears the name of a checkpoint was complete. Its index has the length and SHA-256 of every
file, and its own. Tensors are named by the elements of the parameters that they hold, not by rank,
so any number of ranks can read what any number has written.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import __version__
from ..checkpoint import _plain_number, _safetensors, restored_groups, sync, write_synced
from ..gpu import to_host
from .engine import agree, gather_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .sharded import ShardedOptimizer

FORMAT = "fusedstep-sharded"
VERSION = 1
INDEX = "index.json"
_NAME = re.compile(r"checkpoint-(\d{6,})")
_PARTIAL = re.compile(r"\.checkpoint-(\d{6,})\.(?:partial|deleted)")


class Loaded(NamedTuple):
    """Where a checkpoint was loaded from.

    Attributes
    ----------
    path : pathlib.Path
        Its folder.
    extra : object
        What was saved with it.
    skipped : tuple of str
        The newer checkpoints that are damaged, and how.
    """

    path: Path
    extra: Any
    skipped: tuple[str, ...]


def save(optimizer: ShardedOptimizer, path: str | PathLike[str], extra: Any, keep: int) -> Path:
    """Do what `ShardedOptimizer.save` says."""
    engine, folder = optimizer._engine, Path(path)
    name, text = "", ""
    with _raised_together(engine, "a save"):
        optimizer._refuse_unfinished()
        if not (isinstance(keep, int) and keep >= 1):
            raise ValueError(f"keep: expected an integer >= 1, got {keep!r}")
        if engine.rank == 0:
            text = _extra_text(extra)
            name = _begin(folder)
    name = gather_text(engine, name)[0]
    partial, final = folder / f".{name}.partial", folder / name
    try:
        entry = ""
        with _raised_together(engine):
            entry = json.dumps(_write_shard(optimizer, partial))
        entries = [json.loads(entry) for entry in gather_text(engine, entry)]
        with _raised_together(engine):
            if engine.rank == 0:
                _write_index(_description(optimizer, text, entries), partial / INDEX)
                sync(partial)
                partial.rename(final)
                sync(folder)
    except BaseException:
        if engine.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if engine.rank == 0:
        _prune(folder, keep)
    return final


def load(optimizer: ShardedOptimizer, path: str | PathLike[str]) -> Loaded | None:
    """Do what `ShardedOptimizer.load` says."""
    engine, folder = optimizer._engine, Path(path)
    names = ""
    with _raised_together(engine, "a load"):
        _safetensors()
        if engine.rank == 0:
            names = json.dumps([str(candidate) for candidate in _candidates(folder)])
    candidates = [Path(name) for name in json.loads(gather_text(engine, names)[0])]
    if not candidates:
        return None
    skipped: list[str] = []
    for candidate in candidates:
        problem, index = _verified(engine, candidate)
        if index is not None:
            _take_over(optimizer, candidate, index)
            if skipped and engine.rank == 0:
                warnings.warn("; ".join(skipped), RuntimeWarning, stacklevel=3)
            return Loaded(candidate, index["extra"], tuple(skipped))
        skipped.append(f"skipped {candidate}: {problem}")
    raise ValueError(f"{folder}: no complete checkpoint: {'; '.join(skipped)}")


@contextmanager
def _raised_together(engine: Any, call: str = "") -> Iterator[None]:
    """Raise the error of one rank's block on all ranks, or that they make different calls."""
    error = None
    try:
        yield
    except Exception as failure:
        error = failure
    agree(engine, error, call, "the step")


# Writing


def _extra_text(extra: Any) -> str:
    def plain(value: Any) -> Any:
        return value.item() if isinstance(value, np.generic) else _plain_number(value)

    try:
        return json.dumps(extra, default=plain)
    except (TypeError, ValueError) as error:
        raise TypeError(f"extra: expected what JSON can hold ({error})") from error


def _begin(folder: Path) -> str:
    """Make the hidden folder of a new checkpoint; return the checkpoint's name."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [0]
    for child in folder.iterdir():
        if match := _NAME.fullmatch(child.name):
            numbers.append(int(match[1]))
        elif _PARTIAL.fullmatch(child.name):  # left by a job that was killed
            shutil.rmtree(child)
    name = f"checkpoint-{max(numbers) + 1:06}"
    (folder / f".{name}.partial").mkdir()
    return name


def _write_shard(optimizer: ShardedOptimizer, folder: Path) -> dict[str, Any]:
    """Write this rank's file; return its line of the index."""
    tensors = {
        f"{param}.{start}.{key}": to_host(array)
        for param, start, entry in optimizer._shard()
        for key, array in entry.items()
    }
    path = folder / f"rank-{optimizer.rank:05}-of-{optimizer.size:05}.safetensors"
    try:
        write_synced(path, tensors, {"format": FORMAT, "version": str(VERSION)})
    except _safetensors().SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": _file_digest(path)}


def _description(
    optimizer: ShardedOptimizer, extra: str, entries: list[dict[str, Any]]
) -> dict[str, Any]:
    params = optimizer._params
    groups = []
    for group, members in zip(optimizer.param_groups, params.members, strict=True):
        hyper = optimizer._hyper(group).items()
        groups.append(
            {
                "params": members,
                "state": optimizer._state_keys(group),
                "hyper": {key: None if callable(value) else value for key, value in hyper},
            }
        )
    return {
        "format": FORMAT,
        "version": VERSION,
        "library": __version__,
        "optimizer": optimizer.name,
        "ranks": optimizer.size,
        "params": [
            {"name": name, "shape": array.shape, "dtype": str(array.dtype), "step": step}
            for name, array, step in zip(params.names, params.arrays, optimizer._steps, strict=True)
        ],
        "param_groups": groups,
        "extra": json.loads(extra),
        "files": entries,
    }


def _write_index(description: dict[str, Any], path: Path) -> None:
    plain = json.loads(json.dumps(description, default=_plain_number))
    path.write_text(json.dumps({"sha256": _json_digest(plain), **plain}, indent=1))
    sync(path)


def _json_digest(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _prune(folder: Path, keep: int) -> None:
    """Delete all that is older than the newest `keep` complete checkpoints."""
    complete = 0
    for path in _candidates(folder):
        if complete >= keep:
            hidden = folder / f".{path.name}.deleted"
            with suppress(OSError):  # the next save tries again
                path.rename(hidden)  # half of a checkpoint must not bear its name
                shutil.rmtree(hidden)
        else:
            complete += _looks_complete(path)


def _looks_complete(path: Path) -> bool:
    try:
        files = _read_index(path)["files"]
        return all((path / f["name"]).stat().st_size == f["bytes"] for f in files)
    except (OSError, _Damaged):
        return False


# Reading


class _Damaged(Exception):
    pass


def _candidates(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first; or the folder, where it is one."""
    if _NAME.fullmatch(folder.name):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such checkpoint")
        return [folder]
    if not folder.exists():
        return []
    found = [(int(match[1]), p) for p in folder.iterdir() if (match := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((path / INDEX).read_text())
        fits = index.pop("sha256") == _json_digest(index)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise _Damaged(f"no {INDEX}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _Damaged(f"{INDEX} is truncated or altered") from error
    if not fits:
        raise _Damaged(f"{INDEX} is altered: its checksum does not fit")
    return index


def _verified(engine: Any, path: Path) -> tuple[str, dict[str, Any] | None]:
    """Return the index of a checkpoint, or what is wrong with it; the ranks share the work."""
    index, problem = None, ""
    with _raised_together(engine):
        try:
            index = _read_index(path)
            if index["format"] != FORMAT or index["version"] > VERSION:
                raise ValueError(
                    f"{path}: written in format {index['format']} {index['version']} by fusedstep "
                    f"{index['library']}, but this is {__version__}, which reads {FORMAT} up to "
                    f"{VERSION}; update fusedstep"
                )
            for entry in index["files"][engine.rank :: engine.size]:
                _verify_file(path / entry["name"], entry)
        except _Damaged as damage:
            problem = str(damage)
    problems = [text for text in gather_text(engine, problem) if text]
    return "; ".join(dict.fromkeys(problems)), None if problems else index


def _verify_file(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        length = path.stat().st_size
    except FileNotFoundError as error:
        raise _Damaged(f"{path.name} is missing") from error
    if length != entry["bytes"]:
        raise _Damaged(f"{path.name} has {length} bytes instead of {entry['bytes']}")
    if _file_digest(path) != entry["sha256"]:
        raise _Damaged(f"{path.name} is altered: its checksum does not fit")


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _take_over(optimizer: ShardedOptimizer, path: Path, index: dict[str, Any]) -> None:
    """Read this rank's elements, and write them once all ranks have theirs."""
    engine = optimizer._engine
    shard: list[dict[str, NDArray[Any]]] = []
    with _raised_together(engine):
        _check_fit(optimizer, path, index)
        with ExitStack() as stack:
            reader = _Reader(stack, path, index)
            for param, start, entry in optimizer._shard():
                shard.append(
                    {key: reader.read(param, start, key, own) for key, own in entry.items()}
                )
        groups = restored_groups([group["hyper"] for group in index["param_groups"]])
        optimizer._load_state([p["step"] for p in index["params"]], groups, shard)
    optimizer._load_params([entry["param"] for entry in shard])


def _check_fit(optimizer: ShardedOptimizer, path: Path, index: dict[str, Any]) -> None:
    """Compare with what this optimizer would save, without looking at any values."""
    wanted = json.loads(json.dumps(_description(optimizer, "null", []), default=_plain_number))
    if index["optimizer"] != wanted["optimizer"]:
        raise ValueError(
            f"{path}: of an optimizer {index['optimizer']}, but this one is {wanted['optimizer']}"
        )
    for what in ("params", "param_groups"):
        if len(index[what]) != len(wanted[what]):
            raise ValueError(
                f"{path}: {len(index[what])} {what}, but this optimizer has {len(wanted[what])}"
            )
    for saved, own, suffix in zip(
        index["params"], wanted["params"], optimizer._params.suffixes, strict=True
    ):
        for key in ("name", "shape", "dtype"):
            if saved[key] != own[key]:
                raise ValueError(
                    f"{path}: params{suffix} has {key} {saved[key]}, but this optimizer's has "
                    f"{own[key]}"
                )
    for number, (saved, own) in enumerate(
        zip(index["param_groups"], wanted["param_groups"], strict=True)
    ):
        for key in ("params", "state"):
            if saved[key] != own[key]:
                raise ValueError(
                    f"{path}: param_groups[{number}] has {key} {saved[key]}, but this optimizer's "
                    f"has {own[key]}"
                )


class _Reader:
    """The tensors of all files of a checkpoint, by the elements that they hold."""

    def __init__(self, stack: ExitStack, path: Path, index: Mapping[str, Any]) -> None:
        self._path = path
        self._tensors: dict[tuple[int, str], list[tuple[int, Any]]] = {}
        for entry in index["files"]:
            file = stack.enter_context(
                _safetensors().safe_open(str(path / entry["name"]), framework="numpy")
            )
            for name in file.keys():  # noqa: SIM118
                param, start, key = name.split(".")
                found = self._tensors.setdefault((int(param), key), [])
                found.append((int(start), file.get_slice(name)))

    def read(self, param: int, start: int, key: str, own: Any) -> NDArray[Any]:
        """Return elements from `start` of a parameter or its state, as many as `own` has."""
        result = np.empty(own.size, own.dtype)
        stop, missing = start + own.size, own.size
        for first, tensor in self._tensors.get((param, key), []):
            low, high = max(start, first), min(stop, first + tensor.get_shape()[0])
            if low < high:
                result[low - start : high - start] = tensor[low - first : high - first]
                missing -= high - low
        if missing:
            raise ValueError(f"{self._path}: {missing} elements of {key} {param} are missing")
        return result
