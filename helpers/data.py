"""Real text without a download: Python's own standard library (or any folder of text), a byte-level BPE trained on it, token batches."""
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from safetensors import torch as safetensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from . import store

END = 0  # the id of <|end|>, the one special token; it follows each document
VALID_SHARE = 0.08  # of the files, by a hash of the path
# No token crosses the border of a piece: line breaks with the indentation that follows | a word | up to three digits, as in DeepSeek-V3 |
# a run of other signs | other white space. A word or a run of signs takes one space before it along.
PIECES = r"\n+[ \t]*| ?[\p{L}\p{M}_]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}_]+|[^\S\n]+"
CLASSES = ("keyword", "name", "operator", "number", "string", "comment", "space")


def _is_text(path: Path) -> bool:
    content = path.read_bytes()
    return content != b"" and b"\0" not in content and content.decode(errors="ignore").encode() == content  # all of it is UTF-8


def stdlib_files() -> list[Path]:
    """The running interpreter's own library, 11 MB, sorted; no tests, no installed packages, no file with this machine's paths."""
    # pydoc_data is one generated file of prose, as large as all other validation files together
    skip, paths = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}, []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = set(folders) - skip
        paths += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    return sorted(filter(_is_text, paths), key=Path.as_posix)


def _visible_files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)]


def text_files(folder: str | Path) -> list[Path]:
    """Every file under `folder` that is UTF-8 without NUL, sorted; no hidden or empty ones. ValueError when that leaves none."""
    if paths := sorted(filter(_is_text, _visible_files(Path(folder))), key=Path.as_posix):
        return paths
    raise ValueError(f"no text in {str(folder)!r}: name a folder that holds UTF-8 text files, or None for Python's standard library")


@dataclass
class Corpus:
    """Tokenized text, split by files. train, valid: int32 [tokens], documents one after another, END after each.
    valid_bytes: UTF-8 bytes of the validation documents. hash: hex sha256 of paths, contents, vocabulary size and tokenizer, for a resumed
    run to compare. files: how many are in "train" and "valid", and how many were "skipped" (not text, empty, beyond max_bytes)."""
    name: str
    tokenizer: Tokenizer
    train: torch.Tensor
    valid: torch.Tensor
    valid_bytes: int
    hash: str
    files: dict[str, int]

    @property
    def vocab_size(self) -> int:
        """Number of token ids, END included; a small text may not have as many as were asked for."""
        return self.tokenizer.get_vocab_size()

    @property
    def bytes_per_token(self) -> float:
        """Validation bytes per token, END counted as a token: bits per byte = nats per token / ln 2 / bytes_per_token."""
        return self.valid_bytes / len(self.valid)

    def batch(self, step: int, seed: int, batch_size: int, length: int) -> torch.Tensor:
        """Random windows of train, int64 [batch_size, length], by (seed, step) alone. ValueError for a window longer than the text."""
        windows = _windows(self.train, length, "training")
        generator = torch.Generator().manual_seed(int(hashlib.sha256(f"{seed} {step}".encode()).hexdigest()[:16], 16) >> 1)
        return windows[torch.randint(len(windows), (batch_size,), generator=generator)].long()

    def valid_batch(self, n: int, length: int) -> torch.Tensor:
        """n evenly spaced windows of valid, int64 [n, length]; they overlap where n * length > tokens. ValueError as in `batch`."""
        windows = _windows(self.valid, length, "validation")
        return windows[torch.arange(n) * (len(windows) - 1) // max(n - 1, 1)].long()

    def valid_documents(self) -> Iterator[str]:
        """The text of each validation file, in the order of their paths."""
        for document in self.valid.tensor_split((self.valid == END).nonzero().flatten() + 1)[:-1]:
            yield self.decode(document[:-1])

    def encode(self, text: str) -> list[int]:
        """Ids of any text, without END; `decode` gives exactly the same text back."""
        return self.tokenizer.encode(text).ids

    def decode(self, ids) -> str:
        """Text of a list or 1-D tensor of ids; END shows as <|end|>, a character cut in two as U+FFFD."""
        return self.tokenizer.decode(torch.as_tensor(ids).tolist(), skip_special_tokens=False)


def _windows(tokens: torch.Tensor, length: int, which: str) -> torch.Tensor:
    if not 1 <= length <= len(tokens):
        raise ValueError(f"a window of {length} tokens does not fit the {which} text, which has {len(tokens)}: shorten it, or add text")
    return tokens.unfold(0, length, 1)  # a view [windows, length]


def _tokenized(documents: dict[str, list[str]], vocab_size: int, cache: Path) -> tuple[Tokenizer, dict[str, torch.Tensor]]:
    """Tokenizer and tokens of both splits from `cache`, which is first made, in one step, where it is missing or damaged."""
    try:
        content = {name: (cache / name).read_bytes() for name in ("tokenizer.json", "tokens.safetensors", "meta.json")}
        good = json.loads(content.pop("meta.json")) == {name: hashlib.sha256(value).hexdigest() for name, value in content.items()}
    except (OSError, ValueError):
        good = False
    if not good:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.encode_special_tokens = True  # <|end|> written out in a text is text
        pieces = pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        rules = {"special_tokens": ["<|end|>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
        tokenizer.train_from_iterator(documents["train"], trainers.BpeTrainer(vocab_size=vocab_size, **rules))
        ids = {split: [i for text in texts for i in (*tokenizer.encode(text).ids, END)] for split, texts in documents.items()}
        tokens = safetensors.save({split: torch.tensor(ids[split], dtype=torch.int32) for split in ids})
        content = {"tokenizer.json": tokenizer.to_str(pretty=True).encode(), "tokens.safetensors": tokens}
        meta = {name: hashlib.sha256(value).hexdigest() for name, value in content.items()}
        temporary = cache.with_name(f"{cache.name}.{os.getpid()}")
        temporary.mkdir(parents=True, exist_ok=True)
        for name, value in {**content, "meta.json": json.dumps(meta, indent=1).encode()}.items():
            (temporary / name).write_bytes(value)
        shutil.rmtree(cache, ignore_errors=True)
        shutil.move(temporary, cache)  # no error when another process has just put the same there
    tokenizer = Tokenizer.from_str(content["tokenizer.json"].decode())
    tokenizer.encode_special_tokens = True  # the json does not keep it
    return tokenizer, safetensors.load(content["tokens.safetensors"])


def is_valid(path: str) -> bool:
    """Whether the file at this relative posix path is for validation; no other file has a say in it."""
    return int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) < VALID_SHARE * 2**32


def load(folder: str | Path | None = None, vocab_size: int = 2048, max_bytes: int | None = None) -> Corpus:
    """The corpus of `folder` (None: the standard library) with a tokenizer trained on its training files; cached by content.
    max_bytes: take files in the order of a hash of their paths, without those that no longer fit.
    ValueError: no text in the folder, no file for one of the splits, or vocab_size under 257 (256 bytes and END)."""
    if vocab_size < 257:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and the end token need 257")
    root = Path(sysconfig.get_path("stdlib") if folder is None else folder)
    paths = stdlib_files() if folder is None else text_files(root)
    content = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
    if max_bytes is not None:
        for path in sorted(content, key=lambda path: store.key(order=path)):
            max_bytes -= len(content[path])
            if max_bytes < 0:
                max_bytes += len(content.pop(path))
    documents, fingerprint = {"train": [], "valid": []}, hashlib.sha256()
    for path, text in content.items():
        documents["valid" if is_valid(path) else "train"].append(text.decode("utf-8"))
        fingerprint.update(f"{path}\0{len(text)}\0".encode() + text)
    for split, texts in documents.items():
        if not texts:
            raise ValueError(f"no {split} file among the {len(content)} of {str(root)!r}: 1 in 12 is for validation, so give a few dozen")
    cache = store.checkpoint_dir("corpus", contents=fingerprint.hexdigest(), vocab_size=vocab_size, pieces=PIECES, share=VALID_SHARE,
                                 tokenizers=tokenizers.__version__)
    tokenizer, tokens = _tokenized(documents, vocab_size, cache)
    fingerprint.update(f"{vocab_size}\0{tokenizer.to_str()}".encode())
    name = "Python {}.{} standard library".format(*sys.version_info) if folder is None else root.resolve().name
    files = {split: len(texts) for split, texts in documents.items()}
    files["skipped"] = len(paths if folder is None else _visible_files(root)) - len(content)
    valid_bytes = sum(len(text.encode()) for text in documents["valid"])
    return Corpus(name, tokenizer, tokens["train"], tokens["valid"], valid_bytes, fingerprint.hexdigest(), files)


def token_classes(tokenizer: Tokenizer, source: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of Python source and, for each, the index in CLASSES of the Python token around its first visible character; both int64 [n].
    White space alone is "space"; a backslash that continues a line is "operator". ValueError, with the line, for what is not Python."""
    starts = [0, *(match.end() for match in re.finditer("\n", source))]  # of each line, in characters
    class_at = torch.full((len(source) + 1,), CLASSES.index("operator"))
    class_at[-1] = CLASSES.index("space")
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            kind = tokenize.tok_name[token.type].lower()
            if kind == "errortoken":
                raise tokenize.TokenError(f"cannot read {token.line.strip()!r}", token.start)
            if kind.startswith(("fstring", "tstring")):  # since Python 3.12 and 3.14 the parts of a string are tokens
                kind = "string"
            kind = "keyword" if kind == "name" and keyword.iskeyword(token.string) else kind
            if kind in CLASSES:
                first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
                class_at[first:last] = CLASSES.index(kind)
    except (tokenize.TokenError, SyntaxError) as error:
        raise ValueError(f"not Python, line {getattr(error, 'lineno', None) or error.args[1][0]}: {error.args[0]}") from error
    encoding = tokenizer.encode(source)  # its offsets count characters; both parts of a character cut in two have that character's
    visible = [next((i for i in range(*span) if not source[i].isspace()), -1) for span in encoding.offsets]
    return torch.tensor(encoding.ids, dtype=torch.long), class_at[torch.tensor(visible, dtype=torch.long)]
