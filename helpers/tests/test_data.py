import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import data, store

WORDS = "def return alpha beta gamma self.value 12 3456 é 漢字 😀 # note".split()


def write_texts(folder, n=40):
    folder.mkdir(exist_ok=True)
    for i in range(n):
        lines = [" " * (4 * (j % 3)) + " ".join(WORDS[(i + j * k) % len(WORDS)] for k in range(6)) for j in range(30)]
        (folder / f"text{i:02}.txt").write_text("\n".join(lines), encoding="utf-8", newline="")
    return folder


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("V3LAB_HOME", str(tmp_path_factory.mktemp("home")))
        return data.load(vocab_size=1024, max_bytes=1_000_000)


def test_stdlib_files_are_sorted_and_without_tests_or_packages():
    paths = data.stdlib_files()
    parts = {part for path in paths for part in path.parts[-3:]}
    assert len(paths) > 300 and len(set(paths)) == len(paths) and "textwrap.py" in parts
    assert not parts & {"test", "tests", "idle_test", "site-packages", "pydoc_data", "__pycache__"}
    assert paths == data.stdlib_files()


def test_text_files_skips_binary_hidden_and_empty_ones(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    skipped = {"nul": b"a\0b", "latin": b"\xe9", "none": b"", ".x": b"x", ".git/y": b"y"}
    for name, content in {"b/z": b"z", "a.txt": "é".encode(), **skipped}.items():
        (folder / name).write_bytes(content)
    assert [p.relative_to(folder).as_posix() for p in data.text_files(str(folder))] == ["a.txt", "b/z"]


@pytest.mark.parametrize("content", [None, {}, {"x.bin": b"\0\1"}, {"x.txt": b"\xff\xfe"}, {".hidden": b"text"}, {"x.txt": b""}])
def test_a_folder_without_text_is_one_error_with_its_name(tmp_path, content):
    folder = tmp_path / "nothing_here"
    if content is not None:
        folder.mkdir()
        for name, value in content.items():
            (folder / name).write_bytes(value)
    with pytest.raises(ValueError, match="nothing_here.*UTF-8 text files"):
        data.load(folder)
    assert not store.cache_dir().exists()


def test_too_few_files_for_both_splits_and_too_small_a_vocabulary(tmp_path):
    folder = write_texts(tmp_path / "few", n=1)
    with pytest.raises(ValueError, match="few.*dozen"):
        data.load(folder)
    with pytest.raises(ValueError, match="257"):
        data.load(folder, vocab_size=256)


def test_split_is_about_eight_percent_and_stable_under_additions(tmp_path):
    assert 0.06 < sum(data.is_valid(f"a/{i}.py") for i in range(5000)) / 5000 < 0.10
    folder = write_texts(tmp_path / "texts")
    (folder / "picture.png").write_bytes(b"\0")
    before = data.load(folder, 300)
    valid = sorted(p.name for p in folder.glob("*.txt") if data.is_valid(p.name))
    assert before.files == {"train": 40 - len(valid), "valid": len(valid), "skipped": 1} and before.name == "texts"
    assert list(before.valid_documents()) == [(folder / name).read_text(encoding="utf-8") for name in valid]
    new = next(f"new{i}.txt" for i in range(1000) if not data.is_valid(f"new{i}.txt"))
    (folder / new).write_text("one more training file")
    after = data.load(folder, 300)
    assert list(after.valid_documents()) == list(before.valid_documents()) and after.hash != before.hash


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80) | st.text("\n\r\t\x0c\u2028 \ufeffa_1é<|end|>漢\u0301", max_size=40))
def test_tokenizer_is_lossless(stdlib, text):
    ids = stdlib.encode(text)
    assert stdlib.decode(ids) == text and stdlib.decode(torch.tensor(ids, dtype=torch.int32)) == text
    assert data.END not in ids and max(ids, default=0) < stdlib.vocab_size


def test_pieces_keep_indentation_together_and_digits_apart(stdlib):
    pieces = [piece for piece, _ in stdlib.tokenizer.pre_tokenizer.pre_tokenize_str("def f():\n\n        return 12345  # é")]
    assert pieces == ["def", "Ġf", "():", "ĊĊĠĠĠĠĠĠĠĠ", "return", "Ġ", "123", "45", "ĠĠ", "#", "ĠÃ©"]
    assert stdlib.tokenizer.id_to_token(data.END) == "<|end|>" and stdlib.vocab_size == 1024


def test_corpus_counts_bytes_and_ends(stdlib):
    documents = list(stdlib.valid_documents())
    assert stdlib.train.dtype == stdlib.valid.dtype == torch.int32
    assert (stdlib.valid == data.END).sum() == len(documents) == stdlib.files["valid"] > 1
    assert (stdlib.train == data.END).sum() == stdlib.files["train"] and stdlib.files["skipped"] > 0
    assert stdlib.valid_bytes == sum(len(text.encode()) for text in documents)
    assert stdlib.bytes_per_token == stdlib.valid_bytes / len(stdlib.valid) > 2
    total = stdlib.valid_bytes + sum(len(text.encode()) for text in stdlib.decode(stdlib.train).split("<|end|>"))
    assert 900_000 < total <= 1_000_000


def test_batch_is_a_pure_function_of_seed_and_step(stdlib):
    state = torch.get_rng_state()
    batch = stdlib.batch(step=3, seed=1, batch_size=4, length=65)
    torch.manual_seed(5)
    assert batch.shape == (4, 65) and batch.dtype == torch.long
    assert torch.equal(batch, stdlib.batch(step=3, seed=1, batch_size=4, length=65))
    assert not torch.equal(batch, stdlib.batch(step=1, seed=3, batch_size=4, length=65))
    torch.set_rng_state(state)
    stdlib.batch(0, 0, 2, 8)
    assert torch.equal(state, torch.get_rng_state())
    assert stdlib.decode(batch[0]) in stdlib.decode(stdlib.train) or "\ufffd" in stdlib.decode(batch[0])


def test_valid_batch_is_fixed_and_reaches_both_ends(stdlib):
    windows = stdlib.valid_batch(5, 32)
    assert windows.shape == (5, 32) and windows.dtype == torch.long and torch.equal(windows, stdlib.valid_batch(5, 32))
    assert torch.equal(windows[0], stdlib.valid[:32].long()) and torch.equal(windows[-1], stdlib.valid[-32:].long())
    assert torch.equal(stdlib.valid_batch(1, len(stdlib.valid))[0], stdlib.valid.long())


def test_a_window_longer_than_the_text_is_an_error(stdlib):
    with pytest.raises(ValueError, match="training text"):
        stdlib.batch(0, 0, 1, len(stdlib.train) + 1)
    with pytest.raises(ValueError, match="validation text"):
        stdlib.valid_batch(1, len(stdlib.valid) + 1)


def same(a, b):
    ids = [corpus.encode("x<|end|>") for corpus in (a, b)]
    return a.hash == b.hash and torch.equal(a.train, b.train) and torch.equal(a.valid, b.valid) and ids[0] == ids[1]


def test_cache_is_read_again_and_a_damaged_one_rebuilt(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "texts")
    first = data.load(folder, 300)
    (cache,) = store.cache_dir().iterdir()
    names = sorted(p.name for p in cache.iterdir())
    assert cache.name.startswith("corpus-") and names == ["meta.json", "tokenizer.json", "tokens.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(data.trainers, "BpeTrainer", None)  # training again would fail
        assert same(data.load(folder, 300), first)
    for path in list(cache.iterdir()):
        good = path.read_bytes()
        for bad in (good[: len(good) // 2], b"[]", good[:-9] + b"?" + good[-8:], None):
            path.unlink()
            if bad is not None:
                path.write_bytes(bad)
            assert same(data.load(folder, 300), first)
            assert path.read_bytes() == good and list(store.cache_dir().iterdir()) == [cache]


def test_changed_text_or_vocabulary_is_another_corpus(tmp_path):
    folder = write_texts(tmp_path / "texts")
    hashes = {data.load(folder, 300).hash, data.load(folder, 301).hash}
    (folder / "text00.txt").write_text("changed")
    hashes.add(data.load(folder, 300).hash)
    (folder / "text00.txt").rename(folder / "text00.md")
    hashes.add(data.load(folder, 300).hash)
    assert len(hashes) == 4 == len(list(store.cache_dir().iterdir()))


def test_token_classes_by_hand(stdlib):
    source = 'if é漢 == 12:  # nöte\n    x = "a 😀 if" \\\n  + 1\n'
    ids, classes = data.token_classes(stdlib.tokenizer, source)
    assert ids.tolist() == stdlib.encode(source) and classes.shape == ids.shape and classes.dtype == torch.long
    found = {name: set() for name in data.CLASSES}
    for (a, b), c in zip(stdlib.tokenizer.encode(source).offsets, classes.tolist(), strict=True):
        found[data.CLASSES[c]] |= set(source[a:b].strip())
    assert found["keyword"] == set("if") and found["name"] == set("é漢x") and found["number"] == set("12")
    assert found["operator"] == set("=:\\+") and found["comment"] == set("#nöte") and found["string"] == set('"a 😀if') - {" "}
    assert found["space"] == set() and data.CLASSES.index("space") in classes


def test_token_classes_on_real_files(stdlib):
    counts = torch.zeros(len(data.CLASSES))
    for source in stdlib.valid_documents():
        ids, classes = data.token_classes(stdlib.tokenizer, source)
        assert stdlib.decode(ids) == source
        counts += classes.bincount(minlength=len(data.CLASSES))
    assert (counts > 0).all()
    assert [t.numel() for t in data.token_classes(stdlib.tokenizer, "")] == [0, 0]


NOT_PYTHON = [("x = 1\ny = (\n", "[23]"), ('a\nb = """\n\n', "2"), ("if x:\n    a\n  b\n", "3")]
if sys.version_info < (3, 12):  # later ones take a stray sign for an operator
    NOT_PYTHON.append(("a\nb ?\n", "2"))


@pytest.mark.parametrize(("source", "line"), NOT_PYTHON)
def test_token_classes_names_the_line_that_is_not_python(stdlib, source, line):
    with pytest.raises(ValueError, match=f"line {line}"):
        data.token_classes(stdlib.tokenizer, source)


def test_the_second_load_of_the_whole_library_is_quick():
    paths = data.stdlib_files()
    first = data.load(vocab_size=512)
    start = time.perf_counter()
    second = data.load(vocab_size=512)
    assert time.perf_counter() - start < 2 and same(first, second)
    assert first.files["train"] + first.files["valid"] == len(paths) and first.name.startswith("Python 3.")
