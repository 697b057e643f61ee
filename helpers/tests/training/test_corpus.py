"""The text, its tokenizer, its batches, its cache."""

import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

from helpers.tests.builders import write_texts
from helpers.training import corpus, runs

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("V3LAB_HOME", str(tmp_path_factory.mktemp("home")))
        return corpus.load(vocab_size=1024, max_bytes=1_000_000)


# ------------------------------------------------------------------------------ files


def test_stdlib_files_are_sorted_and_without_tests_or_packages():
    paths = corpus.stdlib_files()
    parts = {part for path in paths for part in path.parts[-3:]}
    assert len(paths) > 300
    assert len(set(paths)) == len(paths)
    assert "textwrap.py" in parts
    unwanted = {"test", "tests", "idle_test", "site-packages", "pydoc_data"}
    assert not parts & (unwanted | {"__pycache__"})
    assert paths == corpus.stdlib_files()


def test_text_files_skips_binary_hidden_and_empty_ones(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    files = {
        "b/z": b"z",
        "a.txt": "é".encode(),
        "nul": b"a\0b",
        "latin": b"\xe9",
        "cut": "é".encode()[:1],
        "none": b"",
        ".x": b"x",
        ".git/y": b"y",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    found = corpus.text_files(str(folder))
    assert [path.relative_to(folder).as_posix() for path in found] == ["a.txt", "b/z"]


NO_TEXT = [
    None,
    {},
    {"x.bin": b"\0\1"},
    {"x.txt": b"\xff\xfe"},
    {".hidden": b"text"},
    {"x.txt": b""},
]


@pytest.mark.parametrize("content", NO_TEXT)
def test_a_folder_without_text_is_one_error_with_its_name(tmp_path, content):
    folder = tmp_path / "nothing_here"
    if content is not None:
        folder.mkdir()
        for name, value in content.items():
            (folder / name).write_bytes(value)
    with pytest.raises(ValueError, match="nothing_here.*UTF-8 text files"):
        corpus.load(folder)
    assert not runs.cache_dir().exists()


def test_too_few_files_for_both_splits_and_too_small_a_vocabulary(tmp_path):
    folder = write_texts(tmp_path / "few", n=1)
    with pytest.raises(ValueError, match="few.*dozen"):
        corpus.load(folder)
    with pytest.raises(ValueError, match="vocab_size=256 cannot work.*257"):
        corpus.load(folder, vocab_size=256)


def test_split_is_about_eight_percent_and_stable_under_additions(tmp_path):
    share = sum(corpus.is_valid(f"a/{i}.py") for i in range(5000)) / 5000
    assert 0.06 < share < 0.10
    folder = write_texts(tmp_path / "texts")
    (folder / "picture.png").write_bytes(b"\0")
    before = corpus.load(folder, 300)
    names = [path.name for path in folder.glob("*.txt")]
    valid = sorted(name for name in names if corpus.is_valid(name))
    assert before.files == {"train": 40 - len(valid), "valid": len(valid), "skipped": 1}
    assert before.name == "texts"
    texts = [(folder / name).read_text(encoding="utf-8") for name in valid]
    assert list(before.valid_documents()) == texts

    names = (f"new{i}.txt" for i in range(1000))
    new = next(name for name in names if not corpus.is_valid(name))
    (folder / new).write_text("one more training file", encoding="utf-8")
    after = corpus.load(folder, 300)
    assert list(after.valid_documents()) == texts
    assert after.hash != before.hash


LATIN_NAME = b"caf\xe9.txt"
on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="other systems refuse such names"
)


@on_linux
def test_a_file_named_in_another_encoding_is_read_like_any_other(tmp_path):
    folder = write_texts(tmp_path / "texts")
    without = corpus.load(folder, 300)
    text = "a word from an old disk"
    with open(os.path.join(os.fsencode(folder), LATIN_NAME), "wb") as file:
        file.write(text.encode())
    found = corpus.load(folder, 300, max_bytes=10**9)
    assert sum(found.files.values()) == sum(without.files.values()) + 1
    assert found.files["skipped"] == 0
    assert found.hash != without.hash
    whole = corpus.load(folder, 300)
    assert text in whole.decode(whole.train) + whole.decode(whole.valid)


@on_linux
def test_a_folder_named_in_another_encoding_has_a_name_that_can_be_written(tmp_path):
    named = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9"))
    os.mkdir(named)
    folder = write_texts(Path(named))
    found = corpus.load(folder, 300)
    assert found.name.startswith("caf\ufffd")
    assert found.name.encode("utf-8")
    assert found.hash == corpus.load(write_texts(tmp_path / "texts"), 300).hash


def test_tokens_and_batches_are_those_of_the_first_edition(tmp_path):
    """The digits are those of the first edition's data.py."""
    found = corpus.load(write_texts(tmp_path / "texts"), 300)
    digest = hashlib.sha256()
    for tokens in (found.train, found.valid, found.batch(3, 1, 4, 33)):
        digest.update(tokens.numpy().tobytes())
    assert digest.hexdigest()[:16] == "5456bde07fd4ee1f"


def test_hash_is_that_of_paths_contents_and_tokenizer(tmp_path):
    folder = write_texts(tmp_path / "texts")
    found = corpus.load(folder, 300)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        text = path.read_bytes()
        digest.update(path.name.encode() + f"\0{len(text)}\0".encode() + text)
    digest.update(b"300\0" + found.tokenizer.to_str().encode())
    assert found.hash == digest.hexdigest()


# -------------------------------------------------------------------------- tokenizer

some_text = st.text(max_size=80)
hard_text = st.text("\n\r\t\x0c\u2028 \ufeffa_1é<|end|>漢\u0301", max_size=40)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(some_text | hard_text)
def test_tokenizer_is_lossless(stdlib, text):
    ids = stdlib.encode(text)
    assert stdlib.decode(ids) == text
    assert stdlib.decode(torch.tensor(ids, dtype=torch.int32)) == text
    assert corpus.END not in ids
    assert max(ids, default=0) < stdlib.vocab_size


def test_pieces_keep_indentation_together_and_digits_apart(stdlib):
    source = "def f():\n\n        return 12345  # é"
    split = stdlib.tokenizer.pre_tokenizer.pre_tokenize_str(source)
    assert [piece for piece, _ in split] == [
        "def",
        "Ġf",
        "():",
        "ĊĊĠĠĠĠĠĠĠĠ",
        "return",
        "Ġ",
        "123",
        "45",
        "ĠĠ",
        "#",
        "ĠÃ©",
    ]
    assert stdlib.tokenizer.id_to_token(corpus.END) == "<|end|>"
    assert stdlib.vocab_size == 1024


def test_corpus_counts_bytes_and_ends(stdlib):
    documents = list(stdlib.valid_documents())
    assert stdlib.train.dtype == stdlib.valid.dtype == torch.int32
    ends = (stdlib.valid == corpus.END).sum()
    assert ends == len(documents) == stdlib.files["valid"] > 1
    assert (stdlib.train == corpus.END).sum() == stdlib.files["train"]
    assert stdlib.files["skipped"] > 0
    assert stdlib.valid_bytes == sum(len(text.encode()) for text in documents)
    assert stdlib.bytes_per_token == stdlib.valid_bytes / len(stdlib.valid) > 2
    train = stdlib.decode(stdlib.train).split("<|end|>")
    total = stdlib.valid_bytes + sum(len(text.encode()) for text in train)
    assert 900_000 < total <= 1_000_000


# ---------------------------------------------------------------------------- batches


def test_batch_is_a_pure_function_of_seed_and_step(stdlib):
    state = torch.get_rng_state()
    batch = stdlib.batch(step=3, seed=1, batch_size=4, length=65)
    torch.manual_seed(5)
    assert batch.shape == (4, 65)
    assert batch.dtype == torch.long
    assert torch.equal(batch, stdlib.batch(step=3, seed=1, batch_size=4, length=65))
    other = stdlib.batch(step=1, seed=3, batch_size=4, length=65)
    assert not torch.equal(batch, other)
    torch.set_rng_state(state)
    stdlib.batch(0, 0, 2, 8)
    assert torch.equal(state, torch.get_rng_state())
    text = stdlib.decode(batch[0])
    assert text in stdlib.decode(stdlib.train) or "\ufffd" in text


def test_valid_batch_is_fixed_and_reaches_both_ends(stdlib):
    windows = stdlib.valid_batch(5, 32)
    assert windows.shape == (5, 32)
    assert windows.dtype == torch.long
    assert torch.equal(windows, stdlib.valid_batch(5, 32))
    assert torch.equal(windows[0], stdlib.valid[:32].long())
    assert torch.equal(windows[-1], stdlib.valid[-32:].long())
    whole = stdlib.valid_batch(1, len(stdlib.valid))
    assert torch.equal(whole[0], stdlib.valid.long())


def test_a_window_longer_than_the_text_is_an_error(stdlib):
    with pytest.raises(ValueError, match="training text"):
        stdlib.batch(0, 0, 1, len(stdlib.train) + 1)
    with pytest.raises(ValueError, match="validation text"):
        stdlib.valid_batch(1, len(stdlib.valid) + 1)


# ------------------------------------------------------------------------------ cache


def same(a, b):
    texts_agree = a.encode("x<|end|>") == b.encode("x<|end|>")
    tokens_agree = torch.equal(a.train, b.train) and torch.equal(a.valid, b.valid)
    return a.hash == b.hash and tokens_agree and texts_agree


@pytest.mark.slow
def test_cache_is_read_again_and_a_damaged_one_rebuilt(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "texts")
    first = corpus.load(folder, 300)
    (cache,) = runs.cache_dir().iterdir()
    names = sorted(path.name for path in cache.iterdir())
    assert cache.name.startswith("corpus-")
    assert names == ["meta.json", "tokenizer.json", "tokens.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(corpus.trainers, "BpeTrainer", None)  # training again would fail
        assert same(corpus.load(folder, 300), first)

    for path in list(cache.iterdir()):
        good = path.read_bytes()
        for bad in (good[: len(good) // 2], b"[]", good[:-9] + b"?" + good[-8:], None):
            path.unlink()
            if bad is not None:
                path.write_bytes(bad)
            assert same(corpus.load(folder, 300), first)
            assert path.read_bytes() == good
            assert list(runs.cache_dir().iterdir()) == [cache]


def test_two_processes_may_tokenize_at_once(tmp_path, monkeypatch):
    """The other one puts its cache there just before this one does."""
    folder = write_texts(tmp_path / "texts")
    first = corpus.load(folder, 300)
    (cache,) = runs.cache_dir().iterdir()
    others = shutil.copytree(cache, tmp_path / "of the other process")
    (cache / "meta.json").unlink()
    remove = shutil.rmtree

    def remove_and_lose_the_race(path, ignore_errors=False):
        remove(path, ignore_errors=ignore_errors)
        if path == cache:
            shutil.copytree(others, cache)

    with monkeypatch.context() as patch:
        patch.setattr(corpus.shutil, "rmtree", remove_and_lose_the_race)
        assert same(corpus.load(folder, 300), first)
    assert list(runs.cache_dir().iterdir()) == [cache]
    names = sorted(path.name for path in cache.iterdir())
    assert names == ["meta.json", "tokenizer.json", "tokens.safetensors"]


def test_a_cache_that_cannot_be_written_is_one_message(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "texts")
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="V3LAB_HOME"):
        corpus.load(folder, 300)


def test_changed_text_or_vocabulary_is_another_corpus(tmp_path):
    folder = write_texts(tmp_path / "texts")
    hashes = {corpus.load(folder, 300).hash, corpus.load(folder, 301).hash}
    (folder / "text00.txt").write_text("changed", encoding="utf-8")
    hashes.add(corpus.load(folder, 300).hash)
    (folder / "text00.txt").rename(folder / "text00.md")
    hashes.add(corpus.load(folder, 300).hash)
    assert len(hashes) == 4 == len(list(runs.cache_dir().iterdir()))


@pytest.mark.slow
def test_the_second_load_of_the_whole_library_is_quick():
    paths = corpus.stdlib_files()
    first = corpus.load(vocab_size=512)
    start = time.perf_counter()
    second = corpus.load(vocab_size=512)
    assert time.perf_counter() - start < 2
    assert same(first, second)
    assert first.files["train"] + first.files["valid"] == len(paths)
    assert first.name.startswith("Python 3.")


# ----------------------------------------------------------------------- token classes


def characters_by_class(stdlib, source):
    """{class: the visible characters of its tokens}."""
    _, classes = corpus.token_classes(stdlib.tokenizer, source)
    found = {name: set() for name in corpus.CLASSES}
    offsets = stdlib.tokenizer.encode(source).offsets
    for (start, end), number in zip(offsets, classes.tolist(), strict=True):
        found[corpus.CLASSES[number]] |= set(source[start:end].strip())
    return found


def test_token_classes_by_hand(stdlib):
    source = 'if é漢 == 12:  # nöte\n    x = "a 😀 if" \\\n  + 1\n'
    ids, classes = corpus.token_classes(stdlib.tokenizer, source)
    assert ids.tolist() == stdlib.encode(source)
    assert classes.shape == ids.shape
    assert classes.dtype == torch.long
    assert corpus.CLASSES.index("space") in classes
    assert characters_by_class(stdlib, source) == {
        "keyword": set("if"),
        "name": set("é漢x"),
        "number": set("12"),
        "operator": set("=:\\+"),
        "comment": set("#nöte"),
        "string": set('"a😀if'),
        "space": set(),
    }


LINES = ["x = 1  # é", "if x:", "    'two\u2028'", "    y = '''", "z ''' + 3"]


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_token_classes_knows_all_ends_of_lines(stdlib, end):
    """Each character has the class that it has between plain line breaks."""
    plain = "\n".join(LINES) + "\n"
    other = end.join(LINES) + end
    ids, _ = corpus.token_classes(stdlib.tokenizer, other)
    assert stdlib.decode(ids) == other
    expected = characters_by_class(stdlib, plain)
    assert characters_by_class(stdlib, other) == expected
    assert expected["comment"] == set("#é")
    assert expected["string"] == set("'twoz\u2028") - {"\u2028"}


def test_token_classes_mixes_ends_of_lines(stdlib):
    found = characters_by_class(
        stdlib, "a = 1\rb = 2\r\n\r# c\nd = 'e'\r\rif f:\r  g\r"
    )
    assert found["name"] == set("abdfg")
    assert found["comment"] == set("#c")
    assert found["string"] == set("'e")


def test_token_classes_passes_over_a_byte_order_mark(stdlib):
    source = "import a\nif b: 'c'  # d\n"
    ids, classes = corpus.token_classes(stdlib.tokenizer, "\ufeff" + source)
    assert stdlib.decode(ids) == "\ufeff" + source
    marks = len(stdlib.encode("\ufeff"))
    expected = corpus.token_classes(stdlib.tokenizer, source)[1]
    assert torch.equal(classes[marks:], expected)
    assert set(classes[:marks].tolist()) == {corpus.CLASSES.index("space")}


def test_token_classes_on_real_files(stdlib):
    counts = torch.zeros(len(corpus.CLASSES))
    for source in stdlib.valid_documents():
        ids, classes = corpus.token_classes(stdlib.tokenizer, source)
        assert stdlib.decode(ids) == source
        counts += classes.bincount(minlength=len(corpus.CLASSES))
    assert (counts > 0).all()
    ids, classes = corpus.token_classes(stdlib.tokenizer, "")
    assert ids.numel() == classes.numel() == 0


NOT_PYTHON = [
    ("x = 1\ny = (\n", "[23]"),
    ('a\nb = """\n\n', "2"),
    ("if x:\n    a\n  b\n", "3"),
    ("if x:\r    a\r  b\r", "3"),
    ("\ufeffif x:\n    a\n  b\n", "3"),
]
if sys.version_info < (3, 12):  # later ones take a stray sign for an operator
    NOT_PYTHON.append(("a\nb ?\n", "2"))


@pytest.mark.parametrize(("source", "line"), NOT_PYTHON)
def test_token_classes_names_the_line_that_is_not_python(stdlib, source, line):
    with pytest.raises(ValueError, match=f"line {line}"):
        corpus.token_classes(stdlib.tokenizer, source)
