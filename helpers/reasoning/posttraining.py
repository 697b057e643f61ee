"""What GRPO and fine-tuning share: the copy that is trained, and where it is kept."""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helpers.checks import need
from helpers.reasoning.rollout import LanguageModel
from helpers.training import runs
from helpers.v3 import DeepSeekV3


@dataclass
class Run:
    """A post-training before its first step.

    model: the copy that will learn. identity: what makes it this run and no other.
    folder: where it is saved; None for a transformers model, which has a
    `save_pretrained` of its own.
    """

    model: Any
    identity: dict[str, Any]
    folder: Path | None


def begin(
    base: LanguageModel,
    settings: Any,
    label: str,
    folder: str | Path | None,
    **parts: object,
) -> Run:
    """A run that starts from `base`, which stays as it is.

    `settings` (a dataclass), the weights of `base` and `parts` (JSON) decide the
    folder where none is named. Raises InputError for a folder that cannot be used.
    """
    identity = {"base": runs.fingerprint(base), "settings": asdict(settings)} | parts
    if isinstance(base, DeepSeekV3):
        name = label.replace(" ", "-").lower()
        folder = folder or runs.run_dir(name, **identity)
    else:
        need(
            folder is None,
            "folder",
            str(folder),
            "checkpoints hold a DeepSeekV3; save a transformers model with its own "
            "save_pretrained",
        )
    return Run(copy.deepcopy(base), identity, Path(folder) if folder else None)
