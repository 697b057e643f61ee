"""Files in the published layout: written, read again, damaged, of other programs."""

import copy
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

from helpers.tests.builders import draw, ids, small
from helpers.v3 import DeepSeekV3, checkpoint
from helpers.v3.checkpoint import INDEX, CheckpointError, Training
from helpers.v3.gqa import GQA, GQAShape

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread", "same_random_numbers")

GATE = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def same(a, b):
    """Whether two models have the same config and the same bits."""
    x, y = a.state_dict(), b.state_dict()
    if a.config != b.config or x.keys() != y.keys():
        return False
    return all(torch.equal(x[name], y[name]) for name in x)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def tensors_in(folder):
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def merge(folder):
    """One model.safetensors in the place of the index and its shards."""
    tensors = tensors_in(folder)
    for file in (*folder.glob("model-*"), folder / INDEX):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


def change_single_file(folder, change):
    """`change(tensors)` in a folder whose weights are one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


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


# --- written and read


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("shard_bytes", [1, 20_000, 2_000_000_000])
def test_saved_and_loaded_again_every_bit_is_the_same(depth, shard_bytes, tmp_path):
    config = small(
        num_nextn_predict_layers=depth, num_hidden_layers=2, moe_intermediate_size=7
    )
    model = draw(config)
    state = torch.random.get_rng_state()
    written = checkpoint.save(model, tmp_path, shard_bytes=shard_bytes)
    loaded = checkpoint.load(tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert same(model, loaded) and not loaded.training
    assert same(model, checkpoint.load(written))
    numbers = sum(t.numel() for t in tensors_in(written).values())
    assert numbers == checkpoint.published_parameters(model)


@pytest.mark.parametrize("shard_bytes", [1, 4_000, 20_000])
def test_shards_are_as_small_as_asked_and_the_index_knows_them(shard_bytes, tmp_path):
    # the experts of a layer are views of one stack of 9 KB
    model = draw(small(num_hidden_layers=2))
    written = checkpoint.save(model, tmp_path, shard_bytes=shard_bytes)
    index = read(written / INDEX)
    files = sorted(written.glob("model-*"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    total = 0
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert len(sizes) == 1 or sum(sizes) <= shard_bytes
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    if shard_bytes == 1:
        assert len(files) == len(index["weight_map"])


def test_a_single_shard_is_one_file_without_index(tmp_path, model):
    written = checkpoint.save(model, tmp_path)
    names = sorted(path.name for path in written.iterdir())
    assert names == ["config.json", "model.safetensors"]


def test_the_older_layout_of_one_shard_with_an_index_is_read(tmp_path, model):
    written = checkpoint.save(model, tmp_path)
    older = "model-00001-of-00001.safetensors"
    (written / "model.safetensors").rename(written / older)
    names = load_file(written / older)
    write(written / INDEX, {"metadata": {}, "weight_map": dict.fromkeys(names, older)})
    assert same(checkpoint.load(tmp_path), model)


def test_the_names_are_the_published_ones(whole):
    names = read(whole / INDEX)["weight_map"]
    for name in (
        "model.layers.1.mlp.experts.7.gate_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.2.eh_proj.weight",
        "model.layers.2.shared_head.norm.weight",
        "model.layers.2.shared_head.head.weight",
        "model.layers.2.embed_tokens.weight",
        "model.layers.2.mlp.experts.0.down_proj.weight",
        "lm_head.weight",
        "model.norm.weight",
    ):
        assert name in names
    assert not any("mtp" in name or "block" in name for name in names)


def test_training_and_files_come_back(tmp_path, model):
    training = Training({"a.b": torch.arange(3.0)}, {"step": 3, "x": [1.5]})
    written = checkpoint.save(model, tmp_path, training, {"tokenizer.json": "é"})
    tensors, state = checkpoint.load_training(tmp_path)
    assert tensors.keys() == {"a.b"}
    assert torch.equal(tensors["a.b"], torch.arange(3.0))
    assert state == {"step": 3, "x": [1.5]}
    assert (written / "tokenizer.json").read_text(encoding="utf-8") == "é"
    checkpoint.save(model, tmp_path)
    with pytest.raises(CheckpointError, match="training.json"):
        checkpoint.load_training(tmp_path)


def test_weights_may_be_given_where_the_model_holds_only_parts(tmp_path, model):
    empty = draw(model.config, seed=5)
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.zero_()
    checkpoint.save(empty, tmp_path, weights=model.state_dict())
    assert same(checkpoint.load(tmp_path), model)


def test_published_parameters_count_the_copies(model):
    copies = 2 * model.config.vocab_size * model.config.hidden_size
    own = sum(t.numel() for t in model.state_dict().values())
    assert checkpoint.published_parameters(model) == own + copies
    without = DeepSeekV3(small(num_nextn_predict_layers=0))
    own = sum(t.numel() for t in without.state_dict().values())
    assert checkpoint.published_parameters(without) == own


# --- transformers' and others' files


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_what_transformers_saves_loads_without_mtp(shards, tmp_path):
    config = small(moe_intermediate_size=7)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**config.to_hf())).eval()
    theirs.set_experts_implementation("eager")
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / INDEX).exists() == (shards == "20KB")
    assert read(tmp_path / "config.json")["num_nextn_predict_layers"] == 1
    loaded, tokens = checkpoint.load(tmp_path), ids(config, 2, 9)
    assert loaded.config == config.with_(num_nextn_predict_layers=0)
    with torch.no_grad():
        assert torch.allclose(loaded(tokens), theirs(tokens).logits, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shard_bytes", [20_000, 2_000_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_reads_ours_in_either_precision(
    dtype, shard_bytes, tmp_path, ignore_mtp_layers
):
    config = small()
    ignore_mtp_layers(config)
    model = draw(config).to(dtype)
    training = Training({"moment": torch.zeros(3)}, {"step": 1})
    written = checkpoint.save(model, tmp_path, training, shard_bytes=shard_bytes)
    assert tensors_in(written)["lm_head.weight"].dtype == dtype
    theirs, report = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "latest", dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind]
    loaded, tokens = checkpoint.load(tmp_path), ids(config, 2, 9)
    assert same(loaded, model.float())
    with torch.no_grad():
        assert torch.allclose(loaded(tokens), theirs.eval()(tokens).logits, atol=1e-4)


def test_frequencies_in_the_files_are_passed_over(files, model):
    """Moonlight's and Kimi-K2's files hold them; they follow from the config."""
    merge(files)
    kimi = read(files / "config.json") | {"model_type": "kimi_k2"}
    write(files / "config.json", kimi)
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    frequencies = {name.format(n): torch.ones(2) for n in range(3)}
    change_single_file(files, lambda tensors: tensors.update(frequencies))
    assert same(checkpoint.load(files), model)
    other = {"model.layers.1.self_attn.inv_freq": torch.ones(2)}
    change_single_file(files, lambda tensors: tensors.update(other))
    with pytest.raises(CheckpointError, match="self_attn.inv_freq is extra"):
        checkpoint.load(files)


@pytest.mark.parametrize("changes", [{"first_k_dense_replace": 7}])
def test_a_model_with_dense_layers_only_is_saved_and_loaded(changes, tmp_path):
    model = draw(small(num_hidden_layers=2, num_nextn_predict_layers=0, **changes))
    checkpoint.save(model, tmp_path)
    assert same(checkpoint.load(tmp_path), model)


def test_no_quantisation_may_be_said_with_null(files, model):
    write(
        files / "config.json",
        read(files / "config.json") | {"quantization_config": None},
    )
    assert same(checkpoint.load(files), model)


# --- damaged files


def break_shard(folder, change):
    """Rewrite the shard that holds a MoE layer's gate, changed by `change`."""
    path = folder / read(folder / INDEX)["weight_map"][GATE]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(GATE), f"{GATE} is missing"),
        (lambda t: t.update({"model.gate": t.pop(GATE)}), f"{GATE} is missing"),
        (
            lambda t: t.update({GATE: t[GATE].T.contiguous()}),
            rf"{GATE} has shape \[24, 8\].*\[8, 24\]",
        ),
        (
            lambda t: t.update({GATE: t[GATE][:4].clone()}),
            rf"{GATE} has shape \[4, 24\]",
        ),
        (lambda t: t.update({"model.more": torch.zeros(1)}), "model.more.*extra"),
        (
            lambda t: t.update({GATE: t[GATE].long()}),
            f"{GATE} is torch.int64.*float32",
        ),
        (lambda t: t.update({GATE: t[GATE].bool()}), f"{GATE} is torch.bool"),
        (
            lambda t: t.update({GATE: t[GATE].to(torch.complex64)}),
            f"{GATE} is torch.complex64",
        ),
    ],
)
@pytest.mark.parametrize("indexed", [True, False])
def test_a_wrong_tensor_is_named(files, change, message, indexed):
    break_shard(files, change)
    if not indexed:
        merge(files)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(files)


def test_a_tensor_in_two_shards_is_said_to_be_in_two(files):
    weight_map = read(files / INDEX)["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map[GATE])
    tensors = load_file(files / other)
    tensors[GATE] = torch.zeros(8, 24)
    save_file(tensors, files / other)
    both = sorted([weight_map[GATE], other])
    message = f"tensor {GATE} is in two files, {both[0]} and {both[1]}"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(files)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_bias_that_is_no_number_is_refused(files, value, dtype):
    """It would route all tokens to one expert, or to none, and nobody would see it."""
    merge(files)

    def change(tensors):
        tensors[BIAS] = tensors[BIAS].to(dtype)
        tensors[BIAS][3] = value

    change_single_file(files, change)
    with pytest.raises(CheckpointError, match=f"{BIAS} .*not a finite number"):
        checkpoint.load(files)


def test_a_single_file_without_index_loads(files, model):
    merge(files)
    assert same(checkpoint.load(files), model)
    (files / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        checkpoint.load(files)


@pytest.mark.parametrize(
    "name, source",
    [
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("shared_head.head.weight", "lm_head.weight"),
    ],
)
def test_an_mtp_copy_must_equal_its_source_and_may_be_absent(
    files, model, name, source
):
    merge(files)
    copy = f"model.layers.2.{name}"

    def differ(tensors):
        tensors[copy][3, 3] += 0.5

    change_single_file(files, differ)
    with pytest.raises(CheckpointError, match=f"{copy} differs from {source}"):
        checkpoint.load(files)
    change_single_file(files, lambda tensors: tensors.pop(copy))
    assert same(checkpoint.load(files), model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"hidden_size": 25}, "has shape"),
        ({"num_hidden_layers": 3}, "extra"),
        ({"num_hidden_layers": 1}, "missing"),
        ({"n_routed_experts": 12, "n_group": 2}, "missing"),
        ({"n_routed_experts": 4, "n_group": 2}, "extra"),
        ({"q_lora_rank": None}, "missing"),
        ({"num_nextn_predict_layers": 0}, "extra"),
        ({"first_k_dense_replace": 2}, "missing"),
    ],
)
def test_a_config_for_other_sizes_names_a_tensor(files, changes, problem):
    write(files / "config.json", read(files / "config.json") | changes)
    with pytest.raises(CheckpointError, match=f"tensor (model|lm_head).*{problem}"):
        checkpoint.load(files)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\0",
        b"[]",
        b"null",
        b"3",
        b'{"hidden_size": "x"}',
        b"1" * 5000,
        b"hello",
        b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_garbage_for_json_is_named(files, file, content):
    (files / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=file):
        checkpoint.load(files)


@pytest.mark.parametrize(
    "target",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "..",
        "",
        ".",
        "a/b.safetensors",
        3,
        None,
    ],
)
def test_an_index_that_leads_outside_its_folder_is_refused(files, target):
    shutil.copy(next(files.glob("model-*")), files.parent / "outside.safetensors")
    index = read(files / INDEX)
    index["weight_map"][GATE] = target
    write(files / INDEX, index)
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


@pytest.mark.slow
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_file_cut_anywhere_is_named(whole, tmp_path_factory, data):
    folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("cut") / "files"))
    name = data.draw(st.sampled_from(sorted(path.name for path in whole.iterdir())))
    content = (folder / name).read_bytes()
    if name.endswith(".json"):
        content = content.rstrip(b"\n")
    cut = data.draw(st.integers(0, len(content) - 1))
    (folder / name).write_bytes(content[:cut])
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(folder)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_name_with_one_letter_changed_is_an_error_that_names_a_tensor(
    whole, tmp_path_factory, data
):
    folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("flip") / "files"))
    weight_map = read(folder / INDEX)["weight_map"]
    name = data.draw(st.sampled_from(sorted(weight_map)))
    place = data.draw(st.integers(0, len(name) - 1))
    wrong = name[:place] + "Z" + name[place + 1 :]
    path = folder / data.draw(st.sampled_from([weight_map[name], INDEX]))
    content = path.read_bytes()
    path.write_bytes(content.replace(f'"{name}"'.encode(), f'"{wrong}"'.encode()))
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


# --- no pickle


class Trap:
    """A pickle that makes a folder when it is loaded."""

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


def test_a_model_with_another_attention_is_read_back_as_what_it_is(tmp_path):
    config = small(num_nextn_predict_layers=0)
    model = DeepSeekV3(config)
    for block in model.layers:
        block.self_attn = GQA(config.hidden_size, GQAShape(4, 2, 12, 8, 4))
    checkpoint.save(model, tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="do not fit their config"):
        checkpoint.load(tmp_path)

    like = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in like.parameters():
            parameter.zero_()
    found = checkpoint.load(tmp_path, like)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
    assert torch.equal(found.inv_freq, model.inv_freq)
    assert not any(parameter.any() for parameter in like.parameters())
