import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from helpers import checkpoint
from helpers.checkpoint import INDEX, CheckpointError
from helpers.model import DeepSeekV3
from helpers.tests.test_model import draw, ids, ignore_mtp_layers, one_thread, same_random_numbers, small  # noqa: F401


def same(a, b):
    """Whether two models have the same config and the same bits."""
    x, y = a.state_dict(), b.state_dict()
    return a.config == b.config and x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.fixture(scope="module")
def model():
    return draw(small(num_hidden_layers=2))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A folder of files in three shards or more, not to be changed."""
    return checkpoint.save(model, tmp_path_factory.mktemp("whole"), shard_bytes=30_000)


@pytest.fixture
def files(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "files"))


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("shard_bytes", [1, 20_000, 2_000_000_000])
def test_saved_and_loaded_again_every_bit_is_the_same(depth, shard_bytes, tmp_path):
    model = draw(small(num_nextn_predict_layers=depth, num_hidden_layers=2, moe_intermediate_size=7))
    state = torch.random.get_rng_state()
    written = checkpoint.save(model, tmp_path, shard_bytes=shard_bytes)
    loaded = checkpoint.load(tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert same(model, loaded) and same(model, checkpoint.load(written)) and not loaded.training
    index = json.loads((written / INDEX).read_text())
    tensors = [t for file in written.glob("*.safetensors") for t in load_file(file).values()]
    assert sum(t.numel() for t in tensors) == checkpoint.published_parameters(model)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors)
    shards = len(list(written.glob("model-*")))
    assert shards == len(set(index["weight_map"].values())) and (shards == 1) == (shard_bytes > 10**9) and shards <= len(tensors)


def test_the_names_are_the_published_ones(whole):
    names = json.loads((whole / INDEX).read_text())["weight_map"]
    for name in ("model.layers.1.mlp.experts.7.gate_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias",
                 "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "model.layers.2.eh_proj.weight",
                 "model.layers.2.shared_head.norm.weight", "model.layers.2.shared_head.head.weight", "model.layers.2.embed_tokens.weight",
                 "model.layers.2.mlp.experts.0.down_proj.weight", "lm_head.weight", "model.norm.weight"):
        assert name in names
    assert not any("mtp" in name or "block" in name for name in names)


def test_extra_tensors_state_and_files_come_back(tmp_path, model):
    written = checkpoint.save(model, tmp_path, {"a.b": torch.arange(3.0)}, {"step": 3, "x": [1.5]}, files={"tokenizer.json": "é"})
    extra, state = checkpoint.load_training(tmp_path)
    assert extra.keys() == {"a.b"} and torch.equal(extra["a.b"], torch.arange(3.0)) and state == {"step": 3, "x": [1.5]}
    assert (written / "tokenizer.json").read_text(encoding="utf-8") == "é"
    checkpoint.save(model, tmp_path)
    with pytest.raises(CheckpointError, match="training.json"):
        checkpoint.load_training(tmp_path)


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_what_transformers_saves_loads_without_mtp(shards, tmp_path):
    config = small(moe_intermediate_size=7)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**config.to_hf())).eval()
    theirs.set_experts_implementation("eager")
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / INDEX).exists() == (shards == "20KB")
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    loaded, tokens = checkpoint.load(tmp_path), ids(config, 2, 9)
    assert loaded.config == config.with_(num_nextn_predict_layers=0)
    with torch.no_grad():
        assert torch.allclose(loaded(tokens), theirs(tokens).logits, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_ours_in_either_precision(dtype, tmp_path, ignore_mtp_layers):  # noqa: F811
    config = small()
    ignore_mtp_layers(config)
    model = draw(config).to(dtype)
    checkpoint.save(model, tmp_path, {"moment": torch.zeros(3)}, {"step": 1})
    assert load_file(tmp_path / "latest" / "model-00001-of-00001.safetensors")["lm_head.weight"].dtype == dtype
    theirs, report = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "latest", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    loaded, tokens = checkpoint.load(tmp_path), ids(config, 2, 9)
    assert same(loaded, model.float())
    with torch.no_grad():
        assert torch.allclose(loaded(tokens), theirs.eval()(tokens).logits, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------------ damaged files


def break_shard(folder, change):
    """Rewrite the shard that holds a MoE layer's gate with its tensors changed by `change`; returns its name."""
    name = json.loads((folder / INDEX).read_text())["weight_map"][GATE]
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    return name


GATE = "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(GATE), f"{GATE} is missing"),
    (lambda t: t.update({"model.gate": t.pop(GATE)}), f"{GATE} is missing"),
    (lambda t: t.update({GATE: t[GATE].T.contiguous()}), rf"{GATE} has shape \[24, 8\].*\[8, 24\]"),
    (lambda t: t.update({GATE: t[GATE][:4].clone()}), rf"{GATE} has shape \[4, 24\]"),
    (lambda t: t.update({"model.more": torch.zeros(1)}), "model.more.*extra"),
    (lambda t: t.update({GATE: t[GATE].long()}), f"{GATE} is torch.int64.*float32"),
    (lambda t: t.update({GATE: t[GATE].bool()}), f"{GATE} is torch.bool"),
    (lambda t: t.update({GATE: t[GATE].to(torch.complex64)}), f"{GATE} is torch.complex64"),
])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_wrong_tensor_is_named(files, change, message, indexed):
    break_shard(files, change)
    if not indexed:
        merge(files)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(files)


def merge(folder):
    """One model.safetensors in the place of the index and its shards."""
    tensors = {name: t for file in sorted(folder.glob("model-*")) for name, t in load_file(file).items()}
    for file in (*folder.glob("model-*"), folder / INDEX):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


def test_a_single_file_without_index_loads(files, model):
    merge(files)
    assert same(checkpoint.load(files), model)
    (files / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        checkpoint.load(files)


@pytest.mark.parametrize("name, source", [("embed_tokens.weight", "model.embed_tokens.weight"),
                                          ("shared_head.head.weight", "lm_head.weight")])
def test_an_mtp_copy_must_equal_its_source_and_may_be_absent(files, model, name, source):
    merge(files)
    tensors = load_file(files / "model.safetensors")
    tensors[f"model.layers.2.{name}"][3, 3] += 0.5
    save_file(tensors, files / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"model.layers.2.{name} differs from {source}"):
        checkpoint.load(files)
    del tensors[f"model.layers.2.{name}"]
    save_file(tensors, files / "model.safetensors")
    assert same(checkpoint.load(files), model)


def test_a_config_for_other_sizes_names_a_tensor(files):
    config = json.loads((files / "config.json").read_text())
    for field, value, tensor in (
        ("hidden_size", 25, "has shape"), ("num_hidden_layers", 3, "extra"), ("num_hidden_layers", 1, "missing"),
        ("n_routed_experts", 12, "missing"), ("n_routed_experts", 4, "extra"), ("q_lora_rank", None, "missing"),
        ("num_nextn_predict_layers", 0, "extra"),
    ):
        changed = {"n_group": 2, "topk_group": 2} if field == "n_routed_experts" else {}
        (files / "config.json").write_text(json.dumps(config | changed | {field: value}))
        with pytest.raises(CheckpointError, match=f"tensor (model|lm_head).*{tensor}"):
            checkpoint.load(files)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\0", b"[]", b"null", b"3", b'{"hidden_size": "x"}', b"1" * 5000, b"hello"])
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_garbage_for_json_is_named(files, file, content):
    (files / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=file):
        checkpoint.load(files)


@pytest.mark.parametrize("target", ["../outside.safetensors", "/etc/passwd", "..", "", ".", "a/b.safetensors", 3, None])
def test_an_index_that_leads_outside_its_folder_is_refused(files, target):
    shutil.copy(next(files.glob("model-*")), files.parent / "outside.safetensors")
    index = json.loads((files / INDEX).read_text())
    index["weight_map"][GATE] = target
    (files / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=INDEX):
        checkpoint.load(files)


def test_a_missing_shard_is_named(files):
    shard = sorted(files.glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        checkpoint.load(files)
    shard.mkdir()
    with pytest.raises(CheckpointError, match=shard.name):
        checkpoint.load(files)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_file_cut_anywhere_is_named(whole, tmp_path_factory, data):
    folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("cut") / "files"))
    path = folder / data.draw(st.sampled_from(sorted(p.name for p in whole.iterdir())))
    content = path.read_bytes().rstrip(b"\n") if path.suffix == ".json" else path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CheckpointError, match=path.name):
        checkpoint.load(folder)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_name_with_one_letter_changed_is_an_error_that_names_a_tensor(whole, tmp_path_factory, data):
    folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("flip") / "files"))
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    name = data.draw(st.sampled_from(sorted(weight_map)))
    place = data.draw(st.integers(0, len(name) - 1))
    wrong = name[:place] + "Z" + name[place + 1 :]
    path = folder / data.draw(st.sampled_from([weight_map[name], INDEX]))
    path.write_bytes(path.read_bytes().replace(f'"{name}"'.encode(), f'"{wrong}"'.encode()))
    with pytest.raises(CheckpointError, match=f"tensor ({name}|{wrong}) "):
        checkpoint.load(folder)


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=60, deadline=None)
def test_random_bytes_for_a_shard_are_named(whole, tmp_path_factory, junk, framed):
    folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("junk") / "files"))
    shard = sorted(folder.glob("model-*"))[0]
    shard.write_bytes(struct.pack("<Q", len(junk)) + junk if framed else junk)
    with pytest.raises(CheckpointError, match=shard.name):
        checkpoint.load(folder)


@pytest.mark.parametrize("content", [None, "nowhere", ""])
def test_a_folder_without_a_checkpoint_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "latest").write_text(content)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=f"no checkpoint in .*{folder.name}"):
            checkpoint.load(folder)


def test_where_links_cannot_be_made_latest_is_a_file_with_the_name(tmp_path, model, monkeypatch):
    def no_links(*_, **__):
        raise OSError("not supported")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    for _ in range(2):
        checkpoint.save(model, tmp_path)
    assert (tmp_path / "latest").read_text() == "checkpoint-000002" and same(checkpoint.load(tmp_path), model)


# -------------------------------------------------------------------------------------------------------------------- safe saving


@pytest.mark.parametrize("name", ["config.json", "notes.txt", "checkpoint-500", "model.safetensors", "checkpoint-backup"])
def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path, model, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=name):
        checkpoint.save(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"
    with pytest.raises(ValueError, match=name):
        checkpoint.save(model, tmp_path / name)


def test_only_the_newest_checkpoint_is_kept(tmp_path, model):
    for n in range(3):
        assert checkpoint.save(model, tmp_path).name == f"checkpoint-{n + 1:06d}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000003", "latest"]


STEPS = [(checkpoint, "save_file"), (checkpoint, "_write_json"), (os, "fsync"), (os, "replace"), (shutil, "rmtree")]


@pytest.mark.parametrize("place, name", STEPS)
def test_a_save_that_fails_anywhere_leaves_the_old_checkpoint_or_the_new_one(place, name, tmp_path, model):
    old, new = model, draw(model.config, seed=9)
    stopped = 0
    for stage in range(1, 30):
        folder = tmp_path / str(stage)
        checkpoint.save(old, folder, {"m": torch.zeros(1)}, {"which": "old"})
        calls, real = [], getattr(place, name)

        def failing(*args, calls=calls, real=real, stage=stage, **kwargs):
            calls.append(1)
            if len(calls) == stage:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, failing)
            try:
                checkpoint.save(new, folder, {"m": torch.ones(1)}, {"which": "new"}, shard_bytes=50_000)
            except KeyboardInterrupt:
                stopped += 1
        extra, state = checkpoint.load_training(folder)
        assert same(checkpoint.load(folder), {"old": old, "new": new}[state["which"]]) and extra["m"].item() == (state["which"] == "new")
        checkpoint.save(new, folder, {"m": torch.ones(1)}, {"which": "new"})
        assert len(list(folder.iterdir())) == 2 and same(checkpoint.load(folder), new)
        if len(calls) < stage:
            break
    assert stopped >= 2 and len(calls) < stage


KILLED_WHILE_SAVING = """
import os, random, signal, sys, time
import torch
from helpers import checkpoint
from helpers.tests.test_model import small
from helpers.model import DeepSeekV3
torch.set_num_threads(1)
folder, rng = sys.argv[1], random.Random(0)
model = DeepSeekV3(small(num_hidden_layers=2))
def save(i):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(i)
    checkpoint.save(model, folder, {"i": torch.tensor(float(i))}, {"i": i}, shard_bytes=50_000)
save(0)
seen = []
for _ in range(10):
    before, child = os.readlink(folder + "/latest"), os.fork()
    if child == 0:
        i = seen[-1] + 1 if seen else 1
        try:
            while True:
                save(i)
                i += 1
        finally:
            os._exit(1)
    while os.readlink(folder + "/latest") == before:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the saving process ended by itself"
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    extra, state = checkpoint.load_training(folder)
    values = {v for p in checkpoint.load(folder).parameters() for v in p.unique().tolist()}
    assert values == {state["i"]} == {extra["i"].item()}, (values, state, extra)
    seen.append(state["i"])
assert seen == sorted(set(seen)), seen
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the process that is killed")
def test_killed_at_any_moment_of_saving_a_whole_checkpoint_stays(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, tmp_path / "run"], capture_output=True, text=True,
                          cwd=Path(checkpoint.__file__).parent.parent, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


class Trap:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_never_loaded(files, model, tmp_path):
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    for name in ("pytorch_model.bin", "training.pt", "optimizer.pt", "model.pt"):
        (files / name).write_bytes(trap)
    assert same(checkpoint.load(files), model)
    for shard in (*files.glob("model-*"), files / INDEX):
        shard.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        checkpoint.load(files)
    (files / "model.safetensors").write_bytes(trap)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        checkpoint.load(files)
    assert not sprung.exists()
    pickle.loads(trap)
    assert sprung.exists()


def test_published_parameters_count_the_copies(model):
    copies = 2 * model.config.vocab_size * model.config.hidden_size
    own = sum(t.numel() for t in model.state_dict().values())
    assert checkpoint.published_parameters(model) == own + copies
    assert checkpoint.published_parameters(DeepSeekV3(small(num_nextn_predict_layers=0))) == sum(
        t.numel() for t in DeepSeekV3(small(num_nextn_predict_layers=0)).state_dict().values())
