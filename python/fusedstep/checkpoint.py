"""Optimizer state on disk: one safetensors file, complete, checked, and only data."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import gpu, narrow

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = "fusedstep-optimizer-1"


def save_state(optimizer: str, state_dict: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a `state_dict` to a file, which takes its name only once it is complete on disk."""
    tensors = {}
    steps = {}
    bfloat16: list[str] = []  # which safetensors does not take from NumPy
    for index, entry in state_dict["state"].items():
        steps[str(index)] = entry["step"]
        for key, value in entry.items():
            if key != "step":
                name = f"{index}.{key}"
                array = gpu.to_host(value)
                if array.dtype.name == "bfloat16":
                    bfloat16.append(name)
                    array = array.view(np.uint16)
                tensors[name] = np.ascontiguousarray(array).reshape(array.shape)
    description = json.dumps(
        {
            "optimizer": optimizer,
            "steps": steps,
            "param_groups": state_dict["param_groups"],
            "bfloat16": bfloat16,
        },
        default=_plain_number,
    )
    metadata = {
        "format": FORMAT,
        "description": description,
        "sha256": _digest(description, tensors),
    }
    path = Path(os.path.realpath(path))  # through a link, as open() would write
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        os.close(handle)
        write_synced(temporary, tensors, metadata)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def load_state(optimizer: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_state` wrote, or raise ValueError."""
    safetensors = _safetensors()
    open(path, "rb").close()  # a file that cannot be read is told apart from a damaged one
    try:
        with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: not a file that an optimizer of fusedstep saved")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: truncated or altered ({error})") from error
    description = metadata.get("description", "")
    if metadata.get("sha256") != _digest(description, tensors):
        raise ValueError(f"{path}: altered since it was saved (its checksum does not fit)")
    saved = json.loads(description)
    if saved["optimizer"] != optimizer:
        raise ValueError(
            f"{path}: the state of an optimizer {saved['optimizer']}, but this one is {optimizer}"
        )
    state: dict[int, dict[str, Any]] = {
        int(index): {"step": step} for index, step in saved["steps"].items()
    }
    for name, tensor in tensors.items():
        index, key = name.split(".")
        is_bfloat16 = name in saved["bfloat16"]
        state[int(index)][key] = tensor.view(narrow.bfloat16()) if is_bfloat16 else tensor
    return {"state": state, "param_groups": restored_groups(saved["param_groups"])}


def write_synced(
    path: str | os.PathLike[str], tensors: Mapping[str, NDArray[Any]], metadata: dict[str, str]
) -> None:
    """Write a safetensors file, and return once it is on disk."""
    _safetensors().numpy.save_file(tensors, os.fspath(path), metadata)
    sync(path)


def sync(path: str | os.PathLike[str]) -> None:
    """Return once a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def restored_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return hyper-parameters with the tuples that JSON has made lists of."""
    return [{**g, "betas": tuple(g["betas"])} if "betas" in g else g for g in groups]


def _digest(description: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype.str} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _plain_number(value: Any) -> bool | float:
    """Return what JSON can hold of a hyper-parameter: a NumPy scalar, a Fraction, lr on a GPU."""
    if gpu.is_gpu_array(value):
        return gpu.to_number(value)
    return bool(value) if isinstance(value, np.bool_) else float(value)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "saving and loading need safetensors: pip install 'fusedstep[checkpoint]'"
        ) from error
    return safetensors
