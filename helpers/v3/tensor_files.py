"""Reading safetensors files and JSON so that damage is named, not met later."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: which file or tensor, and what would help."""


def read_json(path: Path) -> Any:
    """What a JSON file holds; CheckpointError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(path) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None


def open_safetensors(path: Path) -> Any:
    """An open safetensors file; CheckpointError when it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise _missing(path) from None
    except RuntimeError as error:
        # safetensors opens a file twice, the second time through torch, which has an
        # error of its own for one that a newer save has removed in between
        if path.exists():
            raise _damaged(path, error) from None
        raise _missing(path) from None
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise _damaged(path, error) from None


def _missing(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path.name} is missing in {path.parent}: the checkpoint is not whole, take "
        "another copy"
    )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path.name} is damaged or truncated ({error}): take another copy"
    )


class TensorFiles:
    """The weight files of a folder: `model.safetensors`, or shards and their index.

    `names` are the tensors in them. Raises CheckpointError when index and shards do
    not agree or the index leads outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        if (folder / INDEX).exists():
            self._by_name = self._open_indexed(folder)
        else:
            single = open_safetensors(folder / "model.safetensors")
            self._by_name = dict.fromkeys(single.keys(), single)
        self.names = frozenset(self._by_name)

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """The tensor `name`; CheckpointError unless it has this shape."""
        try:
            tensor: Tensor = self._by_name[name].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"tensor {name} cannot be read ({error}): take another copy"
            ) from None
        if tensor.shape != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(tensor.shape)}, config.json asks for "
                f"{list(shape)}"
            )
        return tensor

    @staticmethod
    def _open_indexed(folder: Path) -> dict[str, Any]:
        weight_map = _weight_map(folder / INDEX)
        files = {}
        for file in sorted(set(weight_map.values())):
            files[file] = open_safetensors(folder / file)
        inside: dict[str, str] = {}
        for file, handle in files.items():
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                if name in inside:
                    raise CheckpointError(
                        f"tensor {name} is in two files, {inside[name]} and {file}: "
                        "take another copy"
                    )
                inside[name] = file
        for name, file in weight_map.items():
            if inside.get(name) != file:
                raise CheckpointError(
                    f"tensor {name} is missing in {file}, where {INDEX} has it"
                )
        for name in sorted(set(inside) - set(weight_map)):
            raise CheckpointError(
                f"tensor {name} in {inside[name]} is not in {INDEX}: an extra tensor"
            )
        return {name: files[file] for name, file in weight_map.items()}


def _weight_map(path: Path) -> dict[str, str]:
    """The index's map of tensor names to file names, all of them in its folder."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{INDEX} has no weight_map of names to files: take another copy"
        )
    for file in weight_map.values():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{INDEX} has no weight_map of names to files: take another copy"
            )
        if Path(file).name != file or file in ("", ".."):
            raise CheckpointError(f"{INDEX} points outside its folder: {file!r}")
    return weight_map
