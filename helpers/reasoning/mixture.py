"""Python and Countdown in one vocabulary, for a base model that knows both.

The words of Countdown keep their ids, so that all of `helpers.reasoning` reads the same
ids in both kinds of model. The tokens of the Python corpus follow behind them; both
share END.
"""

import random

from helpers.checks import Share, check, need
from helpers.reasoning.countdown import END_TEXT, VOCABULARY
from helpers.training.corpus import END, Corpus
from helpers.training.runs import key

import torch
from tokenizers import Tokenizer, models
from torch import Tensor

SHIFT = len(VOCABULARY) - 1  # added to the id of a Python token; END stays END
CHUNK = 512  # tokens of Python that lie together


def python_ids(ids: Tensor) -> Tensor:
    """Ids of the Python corpus -> those of the mixture."""
    return torch.where(ids == END, ids, ids + SHIFT)


def mixed(words: Corpus, python: Corpus, share: float, seed: int) -> Corpus:
    """Countdown's documents with chunks of Python strewn among them.

    words: what `writers.corpus` gives. share: of Python among the training tokens, from
    0 to below 1; all of `words` is used. The validation text is that of `words`;
    Python's is `python_ids(python.valid)`. Raises InputError for a share that cannot be
    and for less Python than it takes.
    """
    check("share", share, Share)
    check("seed", seed, int)
    need(share < 1, "share", share, "leave room for Countdown")
    wanted = round(len(words.train) * share / (1 - share) / CHUNK)
    chunks = python_ids(python.train).split(CHUNK)[:-1]  # the last one is short
    need(
        wanted <= len(chunks),
        "share",
        share,
        f"that is {wanted} chunks of {CHUNK} tokens, and there are {len(chunks)}",
    )
    rng = random.Random(f"mixture {seed}")
    parts = [*_documents(words.train), *rng.sample(chunks, wanted)]
    rng.shuffle(parts)
    return Corpus(
        name=f"{words.name} and {python.name}",
        tokenizer=_tokenizer(python.tokenizer),
        train=torch.cat(parts).to(torch.int32),
        valid=words.valid,
        valid_bytes=words.valid_bytes,
        hash=key(words=words.hash, python=python.hash, share=share, seed=seed),
        files={},
    )


def _documents(ids: Tensor) -> list[Tensor]:
    """Each document with the END behind it."""
    behind = (ids == END).nonzero().flatten() + 1
    return [part for part in ids.tensor_split(behind) if len(part)]


def _tokenizer(python: Tokenizer) -> Tokenizer:
    """A name for each id of the mixture, to be kept with a model's files.

    It decodes; texts are encoded by the tokenizers of their own corpora.
    """
    names = {word: i for i, word in enumerate(VOCABULARY)}
    for token, i in python.get_vocab().items():
        if i != END:
            names[f"python {token}"] = i + SHIFT
    whole = Tokenizer(models.WordLevel(names))
    whole.add_special_tokens([END_TEXT])
    return whole


def python_windows(python: Corpus, n: int, length: int) -> Tensor:
    """n evenly spaced windows of unseen Python [n, length], as ids of the mixture."""
    return python_ids(python.valid_batch(n, length))
