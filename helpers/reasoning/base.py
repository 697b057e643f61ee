"""The base model of all reasoning notebooks, and how it is pre-trained."""

from dataclasses import replace

from helpers.reasoning.countdown import VOCABULARY
from helpers.training import pretrain, runs
from helpers.training.corpus import Corpus
from helpers.training.loop import History
from helpers.v3 import DeepSeekV3, V3Config

# A V3 of a size for two cores, with one token for each word of Countdown.
BASE = V3Config.tiny(
    vocab_size=len(VOCABULARY),
    num_hidden_layers=3,
    intermediate_size=256,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    q_lora_rank=None,
    kv_lora_rank=32,
    max_position_embeddings=512,
)
# Short windows first, then long ones, as V3 did (section 4.3). At positions that no
# window reached a model writes nothing of use.
PRETRAINING = pretrain.Settings(
    steps=1750, batch_size=16, length=128, lr=3e-3, valid_every=250
)
EXTENSION = pretrain.Settings(
    steps=350, batch_size=8, length=256, lr=1.5e-3, valid_every=50
)


def base(
    corpus: Corpus, config: V3Config = BASE, steps: int | None = None
) -> tuple[DeepSeekV3, list[History]]:
    """The base model, and the histories of both phases of its pre-training.

    Or the finished or half-finished one of exactly this corpus and config. `steps`, for
    tests: steps of the first phase; the second takes a fifth of them. Raises ValueError
    for a vocabulary that is too small, TrainingDiverged.
    """
    first = PRETRAINING
    second = EXTENSION
    if steps is not None:
        first = replace(PRETRAINING, steps=steps)
        second = replace(EXTENSION, steps=max(1, steps // 5))

    model, short = pretrain.run(config, corpus, first, "countdown base")
    folder = runs.run_dir(
        "countdown-base-longer",
        base=runs.fingerprint(model),
        settings=second,
        corpus=corpus.hash,
    )
    label = "countdown base, longer"
    long = pretrain.train(model, corpus, second, folder, label=label)
    return model, [short, long]
