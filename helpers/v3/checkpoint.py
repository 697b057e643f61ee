"""Save and load in the Hugging Face layout of DeepSeek-V3, safely.

Which of our tensors has which published name is in `helpers.v3.state_dict`; how a new
checkpoint takes the place of the old one is in `helpers.v3.latest`. `folder/latest` is
what transformers' `from_pretrained` takes. No pickle is read.

FP8 files have, as the published ones, `X.weight` in float8_e4m3fn and the scale of each
block of 128 x 128 in `X.weight_scale_inv`.
"""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from helpers.evidence.facts import V3_CONFIG
from helpers.v3 import fp8, state_dict
from helpers.v3.config import V3Config
from helpers.v3.latest import publish, read_newest, resolve, start_part
from helpers.v3.model import DeepSeekV3
from helpers.v3.rope import rope_frequencies
from helpers.v3.tensor_files import (
    INDEX,
    CheckpointError,
    TensorFiles,
    open_safetensors,
    read_json,
)

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "INDEX",
    "CheckpointError",
    "Training",
    "load",
    "load_training",
    "published_parameters",
    "resolve",
    "save",
]

FP8_FORMAT = V3_CONFIG["quantization_config"]
FP8_BLOCK = (128, 128)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Training(NamedTuple):
    """What a training keeps beside the weights: an optimizer's tensors, and JSON."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def published_parameters(model: DeepSeekV3) -> int:
    """Numbers in the published files of this model.

    That is the 685B of the Hugging Face page: embedding and head stand in them twice.
    """
    weights = model.state_dict()
    sizes = {}
    for name, tensor in state_dict.published(model.config, weights):
        sizes[name] = tensor.numel()
    copies = state_dict.copies(model.config)
    return sum(sizes.values()) + sum(sizes[source] for source in copies.values())


# ---------------------------------------------------------------------------- save


def save(
    model: DeepSeekV3,
    folder: str | Path,
    training: Training | None = None,
    files: Mapping[str, str] | None = None,
    in_fp8: bool = False,
    shard_bytes: int = 2_000_000_000,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint and switch `folder/latest` to it. -> its own folder.

    `training` comes back from `load_training`; `files` are more text files by name (a
    tokenizer). Weights keep their dtype; `in_fp8` rounds those that V3 rounds.
    `weights` are the whole tensors under our names, where `model` holds only parts of
    them (several processes). Raises ValueError for a folder that holds something else.
    """
    folder = Path(folder)
    if weights is None:
        weights = model.state_dict()
    tensors = _published_tensors(model.config, weights, in_fp8)
    part = start_part(folder)
    _write_shards(part, tensors, shard_bytes)
    dtype = str(weights["lm_head.weight"].dtype).removeprefix("torch.")
    config = model.config.to_hf() | {"torch_dtype": dtype}
    if in_fp8:
        config["quantization_config"] = FP8_FORMAT
    _write_json(part / "config.json", config)
    if training is not None:
        kept = {name: tensor.contiguous() for name, tensor in training.tensors.items()}
        save_file(kept, part / "training.safetensors")
        _write_json(part / "training.json", training.state)
    for name, text in (files or {}).items():
        (part / name).write_text(text, encoding="utf-8")
    return publish(part, folder)


def _published_tensors(
    config: V3Config, weights: Mapping[str, Tensor], in_fp8: bool
) -> dict[str, Tensor]:
    """All tensors of the files by their published names."""
    tensors = {}
    for name, tensor in state_dict.published(config, weights):
        tensor = tensor.detach().contiguous()
        if in_fp8 and state_dict.IN_FP8.fullmatch(name):
            tensor, scale = fp8.quantise(tensor, FP8_BLOCK)
            tensors[f"{name}_scale_inv"] = scale
        tensors[name] = tensor
    for name, source in state_dict.copies(config).items():
        tensors[name] = tensors[source]
    return tensors


def _write_shards(part: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    """The weights in files of at most `shard_bytes` (or one tensor), with an index."""
    # planned without the data: the experts of a layer are views of one stack, and what
    # shares its storage would be kept in one file whatever its size
    sizes = {name: torch.empty_like(tensors[name], device="meta") for name in tensors}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=shard_bytes)
    for file, names in plan.filename_to_tensors.items():
        # cloned, since safetensors refuses tensors that share memory
        shard = {name: tensors[name].clone() for name in names}
        save_file(shard, part / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(part / INDEX, index)


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------- load


def load(folder: str | Path, like: DeepSeekV3 | None = None) -> DeepSeekV3:
    """Read a checkpoint of ours or of transformers: float32, CPU, eval mode.

    `folder` holds `latest`, or is the one with config.json itself. A file whose config
    promises MTP but which holds no MTP weights (transformers writes such) loads as a
    model without MTP. A missing, extra, misshapen, truncated or non-float tensor is one
    CheckpointError that names it; nothing is returned half-read. FP8 is scaled back.
    like: a model whose modules are those of the file, where some were exchanged for
    others (another attention); it stays as it is. None: DeepSeekV3 as config.json says.
    """
    return read_newest(folder, lambda found: _read_model(found, like))


def load_training(folder: str | Path) -> Training:
    """What was saved as `training` with the newest checkpoint.

    Raises CheckpointError when there is nothing.
    """
    return read_newest(folder, _read_training)


def _read_model(folder: Path, like: DeepSeekV3 | None) -> DeepSeekV3:
    raw = read_json(folder / "config.json")
    try:
        config = V3Config.from_hf(raw)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    _check_quantisation(raw)
    files = TensorFiles(folder)
    mtp_layer = f"model.layers.{config.num_hidden_layers}."
    if not any(name.startswith(mtp_layer) for name in files.names):
        config = config.with_(num_nextn_predict_layers=0)

    # names and shapes first: nothing is allocated for files that do not fit
    if like is not None:
        model = copy.deepcopy(like).to("meta")
    else:
        with torch.device("meta"):
            model = DeepSeekV3(config)
    shapes = {}
    for name, target in state_dict.published(config, model.state_dict()):
        shapes[name] = target.shape
    scales = raw.get("quantization_config") is not None
    _check_names(files, config, shapes, scales)
    tensors = {name: _read_weight(files, name, shape) for name, shape in shapes.items()}
    _check_copies(files, config, tensors)

    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        model.inv_freq.copy_(rope_frequencies(config)[0])
        for name, target in state_dict.published(config, model.state_dict()):
            target.copy_(tensors[name])
    return model


def _read_training(folder: Path) -> Training:
    state = read_json(folder / "training.json")
    with open_safetensors(folder / "training.safetensors") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Training(tensors, state)


def _check_quantisation(raw: Mapping[str, Any]) -> None:
    """Only FP8 in the published form is read."""
    asked = raw.get("quantization_config")
    if asked is None:
        return
    if not isinstance(asked, dict) or asked | FP8_FORMAT != asked:
        raise CheckpointError(
            f"config.json: quantization_config={asked!r} is not read: it must be "
            f"{FP8_FORMAT}, or absent"
        )


def _check_names(
    files: TensorFiles, config: V3Config, shapes: Mapping[str, Any], scales: bool
) -> None:
    """The files hold what the config asks for, and nothing that it has no place for."""
    for name in sorted(shapes):
        if name not in files.names:
            raise CheckpointError(
                f"tensor {name} is missing: the files do not fit their config.json"
            )
    allowed = set(shapes) | set(state_dict.copies(config))
    if scales:
        allowed |= {f"{name}_scale_inv" for name in shapes}
    for name in sorted(files.names):
        if name in allowed or state_dict.RECOMPUTED.fullmatch(name):
            continue
        reason = "config.json has no place for it"
        if name.removesuffix("_scale_inv") in shapes:
            reason = "config.json has no quantization_config that asks for scales"
        raise CheckpointError(f"tensor {name} is extra: {reason}")


def _read_weight(files: TensorFiles, name: str, shape: torch.Size) -> Tensor:
    """A tensor of the files, checked; an FP8 one times the scales of its blocks.

    At the edge blocks may be ragged: kv_a_proj_with_mqa has 576 rows.
    """
    tensor = files.read(name, shape)
    scale_name = f"{name}_scale_inv"
    scaled = scale_name in files.names
    readable = (torch.float8_e4m3fn,) if scaled else FLOATS
    if tensor.dtype not in readable:
        raise CheckpointError(
            f"tensor {name} is {tensor.dtype} and {scale_name} is "
            f"{'there' if scaled else 'missing'}: weights are read in float8_e4m3fn "
            "with it, in float32, bfloat16, float16 and float64 without"
        )
    if name.endswith("e_score_correction_bias") and not tensor.isfinite().all():
        raise CheckpointError(
            f"tensor {name} holds a bias that is not a finite number: take another copy"
        )
    if not scaled:
        return tensor

    grid = torch.Size(math.ceil(size / 128) for size in shape)
    scale = _read_weight(files, scale_name, grid)
    if not (scale.isfinite() & (scale > 0)).all():
        raise CheckpointError(
            f"tensor {scale_name} holds a scale that is not a finite number above 0: "
            "take another copy"
        )
    return fp8.dequantise(tensor, scale, FP8_BLOCK)


def _check_copies(
    files: TensorFiles, config: V3Config, tensors: Mapping[str, Tensor]
) -> None:
    """MTP's copies of embedding and head, where the files have them, must be copies."""
    for name, source in state_dict.copies(config).items():
        if name not in files.names:
            continue
        copy = _read_weight(files, name, tensors[source].shape)
        if not torch.equal(copy, tensors[source]):
            raise CheckpointError(
                f"tensor {name} differs from {source}: MTP shares its embedding and "
                "head with the model"
            )
