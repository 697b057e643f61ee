"""Save and load in the Hugging Face layout of DeepSeek-V3: config.json, sharded *.safetensors with an index, the published names.

`folder/` holds numbered checkpoints and `latest`, which points to the newest whole one and is switched by one atomic rename, so a kill at
any moment leaves the old checkpoint or the new one. `folder/latest` is what transformers' `from_pretrained` takes. No pickle is read.
FP8 files have, as the published ones, `X.weight` in float8_e4m3fn and a factor for each block of 128 x 128 in `X.weight_scale_inv`.
"""
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers import facts, fp8, parallel
from helpers.model import DeepSeekV3, V3Config, rope_frequencies

INDEX = "model.safetensors.index.json"
FP8 = facts.V3_CONFIG["quantization_config"]
IN_FP8 = re.compile(r".*\.(q|q_a|q_b|kv_b|o|gate|up|down)_proj\.weight|.*\.kv_a_proj_with_mqa\.weight")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file or tensor and what would help."""


def _parts(model: DeepSeekV3) -> Iterator[tuple[str, Tensor]]:
    """(published name, the tensor or slice of it in our model), writable in place, for every tensor of the files."""
    N = model.config.num_hidden_layers
    for ours, tensor in model.state_dict(keep_vars=True).items():
        tensor = parallel.whole(tensor.detach())
        name = ours if ours.startswith("lm_head") else f"model.{ours}"
        if ours.startswith("mtp."):  # MTP module k is layer N + k in the files
            _, k, rest = ours.split(".", 2)
            name = f"model.layers.{N + int(k)}." + ("shared_head.norm.weight" if rest == "norm.weight" else rest.removeprefix("block."))
        if ".experts." not in name:
            yield name, tensor
            continue
        stem, kind = name.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        for e in range(tensor.shape[0]):
            yield from zip((f"{stem}.{e}.{part}.weight" for part in parts), tensor[e].chunk(len(parts)), strict=True)


def _copies(model: DeepSeekV3) -> dict[str, str]:
    """The embedding and head that the files repeat in each MTP layer: published name -> the name that it equals."""
    N, depth = model.config.num_hidden_layers, model.config.num_nextn_predict_layers
    sources = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    return {f"model.layers.{N + k}.{copy}": source for copy, source in sources.items() for k in range(depth)}


def published_parameters(model: DeepSeekV3) -> int:
    """Numbers in the published files of this model (the 685B of the Hugging Face page: embedding and head stand in them twice)."""
    sizes = {name: tensor.numel() for name, tensor in _parts(model)}
    return sum(sizes.values()) + sum(sizes[source] for source in _copies(model).values())


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save(model: DeepSeekV3, folder: str | Path, extra: dict[str, Tensor] | None = None, state: dict[str, Any] | None = None,
         shard_bytes: int = 2_000_000_000, files: dict[str, str] | None = None, in_fp8: bool = False) -> Path:
    """Write a checkpoint and switch `folder/latest` to it. Returns the new checkpoint's own folder. Of several processes the first writes.

    `extra` tensors (an optimizer's) and `state` (JSON) come back from `load_training`; `files` are more text files by name (a
    tokenizer). Weights keep their dtype; `in_fp8` rounds those that V3 rounds. A folder that holds something else is a ValueError.
    """
    folder, tensors = Path(folder), {name: tensor.contiguous() for name, tensor in _parts(model)}
    if parallel.RANK:  # it took part in putting the tensors together
        return folder
    inside = [p.name for p in folder.iterdir() if p.name[0] != "."] if folder.is_dir() else [folder.name] * folder.exists()
    if foreign := [name for name in inside if not re.fullmatch(r"latest|checkpoint-\d{6,}", name)]:
        raise ValueError(f"{folder} holds {foreign[0]}, which is no checkpoint of ours: choose a new or empty folder")
    number = max((int(name[11:]) for name in inside if name != "latest"), default=0) + 1
    new, part, pointer = folder / f"checkpoint-{number:06d}", folder / f".part-{os.getpid()}", folder / f".latest-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in filter(IN_FP8.fullmatch, list(tensors) if in_fp8 else ()):
        tensors[name], tensors[f"{name}_scale_inv"] = fp8.quantise(tensors[name], (128, 128))
    tensors |= {name: tensors[source] for name, source in _copies(model).items()}
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: t.clone() for name, t in shard.items()}, part / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    _write_json(part / INDEX, {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map})
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    _write_json(part / "config.json", model.config.to_hf() | {"torch_dtype": dtype} | ({"quantization_config": FP8} if in_fp8 else {}))
    if extra is not None:
        save_file({name: t.contiguous() for name, t in extra.items()}, part / "training.safetensors")
    if state is not None:
        _write_json(part / "training.json", state)
    for name, text in (files or {}).items():
        (part / name).write_text(text, encoding="utf-8")
    for path in part.iterdir():  # on the disk before the pointer says so
        with open(path, "rb+") as f:
            os.fsync(f.fileno())
    os.replace(part, new)
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(new.name, target_is_directory=True)
    except OSError:  # no links on this file system: a file with the name in it
        pointer.write_text(new.name, encoding="utf-8")
    os.replace(pointer, folder / "latest")
    for old in [*folder.glob("checkpoint-*"), *folder.glob(".part-*"), *folder.glob(".latest-*")]:
        if old != new:
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    return new


def resolve(folder: str | Path) -> Path:
    """The folder with the files: what `latest` points to, or `folder` itself when it holds a config.json. CheckpointError if neither."""
    folder, pointer = Path(folder), Path(folder, "latest")
    if pointer.is_file():
        pointer = folder / pointer.read_text(encoding="utf-8").strip()
    for place in (pointer, folder):
        if (place / "config.json").is_file():
            return place.resolve()
    raise CheckpointError(f"no checkpoint in {folder}: neither config.json nor a `latest` that leads to one")


def _read(path: Path) -> Any:
    """What a JSON file holds, or an open safetensors file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing in {path.parent}: the checkpoint is not whole, take another copy") from None
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path.name} is damaged or truncated ({error}): take another copy") from None


def _weight_files(folder: Path) -> dict[str, Any]:
    """Published name -> the open file that holds it, checked against the index when there is one."""
    if not (folder / INDEX).exists():
        single = _read(folder / "model.safetensors")
        return dict.fromkeys(single.keys(), single)
    index = _read(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{INDEX} has no weight_map of names to files: take another copy")
    if outside := [f for f in weight_map.values() if Path(f).name != f or f in ("", "..")]:
        raise CheckpointError(f"{INDEX} points outside its folder: {outside[0]!r}")
    handles = {file: _read(folder / file) for file in sorted(set(weight_map.values()))}
    inside = {name: file for file, handle in handles.items() for name in handle.keys()}
    for name, file in weight_map.items():
        if inside.get(name) != file:
            raise CheckpointError(f"tensor {name} is missing in {file}, where {INDEX} has it")
    if extra := sorted(set(inside) - set(weight_map)):
        raise CheckpointError(f"tensor {extra[0]} in {inside[extra[0]]} is not in {INDEX}: an extra tensor")
    return {name: handles[file] for name, file in weight_map.items()}


def load(folder: str | Path) -> DeepSeekV3:
    """Read a checkpoint of ours or of transformers (a folder with `latest`, or with config.json itself): float32, CPU, eval mode.

    A file whose config promises MTP but which holds no MTP weights (transformers writes such) loads as a model without MTP. A missing,
    extra, misshapen, truncated or non-float tensor is one CheckpointError that names it; nothing is returned half-read. FP8 is scaled back.
    """
    folder = resolve(folder)
    raw = _read(folder / "config.json")
    try:
        config = V3Config.from_hf(raw)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    files = _weight_files(folder)
    N = config.num_hidden_layers
    if not isinstance(asked := raw.get("quantization_config", FP8), dict) or asked | FP8 != asked:
        raise CheckpointError(f"config.json: quantization_config={asked!r} is not read: it must be {FP8}, or absent")
    if config.num_nextn_predict_layers and not any(name.startswith(f"model.layers.{N}.") for name in files):
        config = config.with_(num_nextn_predict_layers=0)
    with torch.device("meta"):  # names and shapes first: nothing is allocated for files that do not fit
        model = DeepSeekV3(config)
    shapes, copies = {name: target.shape for name, target in _parts(model)}, _copies(model)
    scales = {f"{name}_scale_inv" for name in shapes} if "quantization_config" in raw else set()
    for missing in sorted(set(shapes) - set(files))[:1]:
        raise CheckpointError(f"tensor {missing} is missing: the files do not fit their config.json")
    for extra in sorted(set(files) - set(shapes) - set(copies) - scales)[:1]:
        raise CheckpointError(f"tensor {extra} is extra: config.json has no place for it")
    tensors = {name: _tensor(files, name, shape) for name, shape in shapes.items()}
    for name, source in copies.items():
        if name in files and not torch.equal(_tensor(files, name, shapes[source]), tensors[source]):
            raise CheckpointError(f"tensor {name} differs from {source}: MTP shares its embedding and head with the model")
    model = model.to_empty(device="cpu").eval()
    model.inv_freq.copy_(rope_frequencies(config)[0])
    for router in model.routers():
        router.load.zero_()
    for name, target in _parts(model):
        target.copy_(tensors[name])
    return model


def _tensor(files: dict[str, Any], name: str, shape: torch.Size) -> Tensor:
    """A tensor of the files, checked; an FP8 one times its blocks' scales (at the edge blocks may be ragged: kv_a_proj_with_mqa has 576 rows)."""
    try:
        tensor = files[name].get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"tensor {name} cannot be read ({error}): take another copy") from None
    if tensor.shape != shape:
        raise CheckpointError(f"tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}")
    scaled = f"{name}_scale_inv" in files
    if tensor.dtype not in ((torch.float8_e4m3fn,) if scaled else (torch.float32, torch.bfloat16, torch.float16, torch.float64)):
        raise CheckpointError(f"tensor {name} is {tensor.dtype} and {name}_scale_inv is {'there' if scaled else 'missing'}: weights are read in "
                              "float8_e4m3fn with it, in float32, bfloat16, float16 and float64 without")
    if not scaled:
        return tensor
    scale = _tensor(files, f"{name}_scale_inv", torch.Size(-(-n // 128) for n in shape))
    if not (scale.isfinite() & (scale > 0)).all():
        raise CheckpointError(f"tensor {name}_scale_inv holds a scale that is not a finite number above 0: take another copy")
    return fp8.dequantise(tensor, scale, (128, 128))


def load_training(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The `extra` tensors and the `state` that were saved with the newest checkpoint. CheckpointError when there are none."""
    folder = resolve(folder)
    state = _read(folder / "training.json")
    with _read(folder / "training.safetensors") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, state
