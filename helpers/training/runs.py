"""Where runs are kept, how each is named, and which code made it.

What can be made again lies in `cache_dir()`, which git ignores; it may be removed at
any time. A run's folder is named by a hash of all that decides its numbers:
configuration, settings, corpus, seed. The code decides them too, but a hash of it in
the name would throw runs away for a reworded error message. So a run keeps, when it is
made, the hash of the code and a witness: the losses of its first three steps. Other
code with the same witness computes the same numbers.
"""

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from helpers.training.source import REPOSITORY, Sources

if TYPE_CHECKING:
    from torch import nn

WITNESS_STEPS = 3
# Losses agree within this share of their size: other processors round otherwise.
WITNESS_TOLERANCE = 1e-5

Verdict = Literal["same code", "code changed, numbers same", "stale"]


def home() -> Path:
    """The repository, or the folder that the environment variable V3LAB_HOME names."""
    named = os.environ.get("V3LAB_HOME")
    return Path(os.path.expanduser(named)) if named else REPOSITORY


def cache_dir() -> Path:
    """`home()/.lab`: checkpoints and the tokenized corpus."""
    return home() / ".lab"


def writable(folder: Path) -> Path:
    """Create `folder` and those above it where they are missing; -> the folder.

    OSError that names V3LAB_HOME where nothing can be written, as in a read-only
    checkout.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "no permission to write"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise OSError(
            f"nothing can be written to {str(folder)!r} ({reason}): set the "
            "environment variable V3LAB_HOME to a folder that you may write to"
        )
    return folder


def as_json(value: object) -> dict[str, Any]:
    """What `json.dumps` cannot write itself: a dataclass as the dict of its fields.

    TypeError for anything else.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(
        f"{type(value).__name__} cannot be written as JSON; use numbers, strings, "
        "lists, dicts or a dataclass of these"
    )


def key(**parts: object) -> str:
    """16 hex digits, the same for the same parts in any order, on any machine.

    TypeError with the part's name for a part that is neither JSON (NaN is not) nor a
    dataclass of it.
    """
    for name, part in parts.items():
        try:
            json.dumps(part, sort_keys=True, default=as_json, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"key part {name!r}: {error}") from error
    text = json.dumps(parts, sort_keys=True, default=as_json, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_dir(label: str, /, **parts: object) -> Path:
    """The folder for what `label` makes from exactly these parts; not created here.

    TypeError as in `key`.
    """
    return cache_dir() / f"{label}-{key(**parts)}"


def fingerprint(model: "nn.Module") -> str:
    """16 hex digits of a model's config and weights, to name what is made from them."""
    # Here, since whoever only reads recorded results should not wait for torch.
    import torch

    digest = hashlib.sha256(str(model.config).encode())
    for name, tensor in model.state_dict().items():
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + data.numpy().tobytes())
    return digest.hexdigest()[:16]


def code_hash(module: str, root: Path = REPOSITORY) -> str:
    """12 hex digits of the code that `module` rests on, itself included.

    Over all modules of `helpers.v3`, `helpers.training` and `helpers.reasoning` that it
    imports, directly or not (`Sources.modules_of`). Formatting, comments and docstrings
    do not count. Nothing is imported. InputError where there is no such module.
    """
    return Sources(root).code_hash(module)


@dataclass(frozen=True)
class Provenance:
    """The code that made a run, and what the run looked like at its start.

    code: `code_hash` of the module that trains. witness: what `Trainer.witness` gave in
    the first `WITNESS_STEPS` steps (mostly their losses); fewer only where the run has
    fewer. compared: the code that the witness was last compared with and agreed; ""
    before. A run's state keeps them as `dataclasses.asdict(provenance)`;
    `Provenance(**kept)` is the way back.
    """

    code: str
    witness: list[float]
    compared: str = ""

    def verdict(self, now: "Provenance") -> Verdict:
        """What a run made by `self` is worth under the code of `now`.

        Witnesses of different lengths disagree, and so do empty ones: nothing was
        compared.
        """
        if self.code == now.code:
            return "same code"
        if self.compared == now.code:
            return "code changed, numbers same"
        if not self.witness or len(self.witness) != len(now.witness):
            return "stale"
        for mine, theirs in zip(self.witness, now.witness, strict=True):
            if not math.isclose(mine, theirs, rel_tol=WITNESS_TOLERANCE):
                return "stale"
        return "code changed, numbers same"
