"""Real text without a download, its tokenizer and its batches.

The text is Python's own standard library, or any folder of text files. A byte-level BPE
is trained on it. The tokens are cached by the content of the text.
"""

import hashlib
import io
import json
import keyword
import os
import re
import shutil
import sys
import sysconfig
import tokenize
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.checks import need
from helpers.training import runs

import tokenizers
import torch
from safetensors import torch as safetensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END = 0  # the id of <|end|>, the one special token; it follows each document
VALID_SHARE = 0.08  # of the files, by a hash of the path
# No token crosses the border of a piece. A piece is: line breaks with the indentation
# that follows | a word | up to three digits, as in DeepSeek-V3 | a run of other signs |
# other white space. A word or a run of signs takes one space before it along.
PIECES = r"\n+[ \t]*| ?[\p{L}\p{M}_]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}_]+|[^\S\n]+"
BOM = "\ufeff"  # byte order mark, with which some editors begin a file
CLASSES = ("keyword", "name", "operator", "number", "string", "comment", "space")
# of the standard library: what is no source that people wrote for others to read.
# pydoc_data is one generated file, as large as all other validation files together
SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",
}


# ------------------------------------------------------------------------------ files


def stdlib_files() -> list[Path]:
    """The running interpreter's own library, 11 MB, sorted.

    No tests, no installed packages, no file with this machine's paths.
    """
    paths = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = set(folders) - SKIPPED
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                paths.append(Path(folder, name))
    return sorted(filter(_is_text, paths), key=Path.as_posix)


def text_files(folder: str | Path) -> list[Path]:
    """Every file under `folder` that is UTF-8 without NUL, sorted.

    Hidden and empty ones are left out. Raises ValueError when that leaves none.
    """
    paths = sorted(filter(_is_text, _visible_files(Path(folder))), key=Path.as_posix)
    if not paths:
        raise ValueError(
            f"no text in {str(folder)!r}: name a folder that holds UTF-8 text files, "
            "or None for Python's standard library"
        )
    return paths


def _visible_files(folder: Path) -> list[Path]:
    paths = []
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            paths.append(path)
    return paths


def _is_text(path: Path) -> bool:
    """Whether all of the file is UTF-8 text."""
    content = path.read_bytes()
    if content == b"" or b"\0" in content:
        return False
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def is_valid(path: str) -> bool:
    """Whether the file at this relative posix path is for validation.

    No other file has a say in it.
    """
    digest = hashlib.sha256(_path_bytes(path)).hexdigest()
    return int(digest[:8], 16) < VALID_SHARE * 2**32


def _path_bytes(path: str) -> bytes:
    """UTF-8. Python reads a name in another encoding as surrogates: they may pass."""
    return path.encode("utf-8", "surrogatepass")


# ----------------------------------------------------------------------------- corpus


@dataclass
class Corpus:
    """Tokenized text, split by files.

    train, valid: int32 [tokens], documents one after another, END after each.
    valid_bytes: UTF-8 bytes of the validation documents. hash: hex sha256 of paths,
    contents, vocabulary size and tokenizer, for a resumed run to compare. files: how
    many are in "train" and "valid", and how many were "skipped" (not text, empty,
    beyond max_bytes).
    """

    name: str
    tokenizer: Tokenizer
    train: Tensor
    valid: Tensor
    valid_bytes: int
    hash: str
    files: dict[str, int]

    @property
    def vocab_size(self) -> int:
        """Token ids, END included; a small text may have fewer than asked for."""
        return self.tokenizer.get_vocab_size()

    @property
    def bytes_per_token(self) -> float:
        """Validation bytes per token, END counted as a token.

        bits per byte = nats per token / ln 2 / bytes_per_token.
        """
        return self.valid_bytes / len(self.valid)

    def batch(self, step: int, seed: int, batch_size: int, length: int) -> Tensor:
        """Random windows of train, int64 [batch_size, length], by (seed, step) alone.

        Raises ValueError for a window longer than the text.
        """
        windows = _windows(self.train, length, "training")
        digest = hashlib.sha256(f"{seed} {step}".encode()).hexdigest()
        generator = torch.Generator().manual_seed(int(digest[:16], 16) >> 1)
        starts = torch.randint(len(windows), (batch_size,), generator=generator)
        return windows[starts].long()

    def valid_batch(self, n: int, length: int) -> Tensor:
        """n evenly spaced windows of valid, int64 [n, length].

        They overlap where n * length > tokens. Raises ValueError as `batch` does.
        """
        windows = _windows(self.valid, length, "validation")
        starts = torch.arange(n) * (len(windows) - 1) // max(n - 1, 1)
        return windows[starts].long()

    def valid_documents(self) -> Iterator[str]:
        """The text of each validation file, in the order of their paths."""
        behind_ends = (self.valid == END).nonzero().flatten() + 1
        for document in self.valid.tensor_split(behind_ends)[:-1]:
            yield self.decode(document[:-1])

    def encode(self, text: str) -> list[int]:
        """Ids of any text, without END; `decode` gives exactly the same text back."""
        return self.tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of a list or 1-D tensor of ids.

        END shows as <|end|>, a character cut in two as U+FFFD.
        """
        plain = torch.as_tensor(ids).tolist()
        return self.tokenizer.decode(plain, skip_special_tokens=False)


def _windows(tokens: Tensor, length: int, which: str) -> Tensor:
    """All windows of `length` tokens as a view [windows, length]."""
    if not 1 <= length <= len(tokens):
        raise ValueError(
            f"a window of {length} tokens does not fit the {which} text, which has "
            f"{len(tokens)}: shorten it, or add text"
        )
    return tokens.unfold(0, length, 1)


def load(
    folder: str | Path | None = None,
    vocab_size: int = 2048,
    max_bytes: int | None = None,
) -> Corpus:
    """The corpus of `folder` (None: the standard library), cached by content.

    Its tokenizer is trained on the training files. max_bytes: take files in the order
    of a hash of their paths, without those that no longer fit. Raises ValueError for no
    text in the folder, no file for one of the splits, or a vocab_size under 257 (256
    bytes and END).
    """
    enough = vocab_size >= 257
    need(enough, "vocab_size", vocab_size, "256 bytes and the end token need 257")
    root = Path(sysconfig.get_path("stdlib") if folder is None else folder)
    paths = stdlib_files() if folder is None else text_files(root)
    content = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
    if max_bytes is not None:
        _drop_beyond(content, max_bytes)

    documents = _split(content)
    for split, texts in documents.items():
        if not texts:
            raise ValueError(
                f"no {split} file among the {len(content)} of {str(root)!r}: 1 in 12 "
                "is for validation, so give a few dozen"
            )
    fingerprint = hashlib.sha256()
    for path, text in content.items():
        fingerprint.update(_path_bytes(path) + f"\0{len(text)}\0".encode() + text)
    cache = runs.run_dir(
        "corpus",
        contents=fingerprint.hexdigest(),
        vocab_size=vocab_size,
        pieces=PIECES,
        share=VALID_SHARE,
        tokenizers=tokenizers.__version__,
    )
    tokenizer, tokens = _tokenized(documents, vocab_size, cache)
    fingerprint.update(f"{vocab_size}\0{tokenizer.to_str()}".encode())

    files = {split: len(texts) for split, texts in documents.items()}
    seen = paths if folder is None else _visible_files(root)
    files["skipped"] = len(seen) - len(content)
    name = _path_bytes(root.resolve().name).decode("utf-8", "replace")
    if folder is None:
        name = "Python {}.{} standard library".format(*sys.version_info)
    return Corpus(
        name,
        tokenizer,
        tokens["train"],
        tokens["valid"],
        sum(len(text.encode()) for text in documents["valid"]),
        fingerprint.hexdigest(),
        files,
    )


def _drop_beyond(content: dict[str, bytes], max_bytes: int) -> None:
    """Change `content`: files go that do not fit, in the order of a hash."""
    left = max_bytes
    for path in sorted(content, key=lambda path: runs.key(order=path)):
        if len(content[path]) > left:
            del content[path]
        else:
            left -= len(content[path])


def _split(content: dict[str, bytes]) -> dict[str, list[str]]:
    """The texts of both splits."""
    documents: dict[str, list[str]] = {"train": [], "valid": []}
    for path, text in content.items():
        split = "valid" if is_valid(path) else "train"
        documents[split].append(text.decode("utf-8"))
    return documents


# -------------------------------------------------------------------------- tokenizer


def _tokenized(
    documents: dict[str, list[str]], vocab_size: int, cache: Path
) -> tuple[Tokenizer, dict[str, Tensor]]:
    """Tokenizer and tokens of both splits from `cache`.

    It is first made, in one step, where it is missing or damaged.
    """
    content = _read_cache(cache)
    if content is None:
        tokenizer = _train_tokenizer(documents["train"], vocab_size)
        ids = {split: _encode(tokenizer, texts) for split, texts in documents.items()}
        content = {
            "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
            "tokens.safetensors": safetensors.save(ids),
        }
        _write_cache(cache, content)
    tokenizer = Tokenizer.from_str(content["tokenizer.json"].decode())
    tokenizer.encode_special_tokens = True  # the json does not keep it
    return tokenizer, safetensors.load(content["tokens.safetensors"])


def _train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.encode_special_tokens = True  # <|end|> written out in a text is text
    pieces = pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """int32 ids of all texts, END after each."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text).ids
        ids.append(END)
    return torch.tensor(ids, dtype=torch.int32)


def _read_cache(cache: Path) -> dict[str, bytes] | None:
    """The cached files, None where one is missing or not as it was written."""
    try:
        content = {
            name: (cache / name).read_bytes()
            for name in ("tokenizer.json", "tokens.safetensors")
        }
        meta = json.loads((cache / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if meta == _digests(content) else None


def _write_cache(cache: Path, content: dict[str, bytes]) -> None:
    """Write beside `cache` and move there, so that no half is ever seen."""
    # a process id does not do: another container may have the same
    temporary = runs.writable(cache.with_name(f"{cache.name}.{uuid.uuid4().hex}"))
    for name, value in content.items():
        (temporary / name).write_bytes(value)
    meta = json.dumps(_digests(content), indent=1)
    (temporary / "meta.json").write_text(meta, encoding="utf-8")
    shutil.rmtree(cache, ignore_errors=True)
    try:
        os.rename(temporary, cache)
    except OSError:  # another process has just put the same there
        shutil.rmtree(temporary, ignore_errors=True)


def _digests(content: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(value).hexdigest() for name, value in content.items()}


# ----------------------------------------------------------------------- token classes


def token_classes(tokenizer: Tokenizer, source: str) -> tuple[Tensor, Tensor]:
    """Ids of Python source and, for each, an index into CLASSES; both int64 [n].

    It is the class of the Python token around the first visible character. White space
    alone is "space"; a backslash that continues a line is "operator". Raises
    ValueError, with the line, for what is not Python.
    """
    class_at = _class_of_each_character(source)
    encoding = tokenizer.encode(source)
    # offsets count characters; both parts of a character cut in two have its own
    places = []
    for start, end in encoding.offsets:
        visible = [i for i in range(start, end) if not source[i].isspace()]
        places.append(visible[0] if visible else -1)
    ids = torch.tensor(encoding.ids, dtype=torch.long)
    return ids, class_at[torch.tensor(places, dtype=torch.long)]


def _class_of_each_character(source: str) -> Tensor:
    """int64 [characters + 1]; the last entry, index -1, is "space"."""
    # a lone CR ends a line, and a BOM is no part of the first one
    readable = re.sub(r"\r(?!\n)", "\n", source)
    skipped = 1 if readable.startswith(BOM) else 0
    starts = [skipped]
    for match in re.finditer("\n", readable):
        starts.append(match.end())
    readable = readable[skipped:]
    class_at = torch.full((len(source) + 1,), CLASSES.index("operator"))
    class_at[:skipped] = CLASSES.index("space")
    class_at[-1] = CLASSES.index("space")
    try:
        for token in tokenize.generate_tokens(io.StringIO(readable).readline):
            kind = _class_of(token)
            if kind in CLASSES:
                first = starts[token.start[0] - 1] + token.start[1]
                last = starts[token.end[0] - 1] + token.end[1]
                class_at[first:last] = CLASSES.index(kind)
    except (tokenize.TokenError, SyntaxError) as error:
        line = getattr(error, "lineno", None) or error.args[1][0]
        raise ValueError(f"not Python, line {line}: {error.args[0]}") from error
    return class_at


def _class_of(token: tokenize.TokenInfo) -> str:
    kind = tokenize.tok_name[token.type].lower()
    if kind == "errortoken":
        message = f"cannot read {token.line.strip()!r}"
        raise tokenize.TokenError(message, token.start)
    # since Python 3.12 and 3.14 the parts of such a string are tokens
    if kind.startswith(("fstring", "tstring")):
        return "string"
    if kind == "name" and keyword.iskeyword(token.string):
        return "keyword"
    return kind
