"""Safe saving: failures, kills and several processes at any moment."""

import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from helpers.tests.builders import draw, small
from helpers.tests.v3.test_checkpoint import same
from helpers.v3 import checkpoint, latest, tensor_files
from helpers.v3.checkpoint import CheckpointError, Training

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread", "same_random_numbers")

ROOT = Path(checkpoint.__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    return draw(small(num_hidden_layers=2))


def names_in(folder):
    """What a folder holds, without the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# --- one process


@pytest.mark.parametrize("content", [None, b"nowhere", b"", b"\xff\0"])
def test_a_folder_without_a_checkpoint_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=f"no checkpoint in .*{folder.name}"):
            checkpoint.load(folder)


def test_a_link_to_nothing_is_no_checkpoint(tmp_path):
    (tmp_path / "latest").symlink_to("checkpoint-000001")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.resolve(tmp_path)


def test_where_links_cannot_be_made_latest_is_a_file_with_the_name(
    tmp_path, model, monkeypatch
):
    def no_links(*_, **__):
        raise OSError("not supported")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    for _ in range(2):
        checkpoint.save(model, tmp_path)
    pointer = (tmp_path / "latest").read_text(encoding="utf-8")
    assert pointer == "checkpoint-000002"
    assert same(checkpoint.load(tmp_path), model)


@pytest.mark.parametrize("links", [True, False])
def test_a_copied_run_loads(tmp_path, model, links):
    checkpoint.save(model, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=links)
    assert same(checkpoint.load(tmp_path / "copy"), model)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "notes.txt",
        "checkpoint-500",
        "model.safetensors",
        "checkpoint-backup",
    ],
)
def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(
    tmp_path, model, name
):
    (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=name):
        checkpoint.save(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text(encoding="utf-8") == "mine"
    with pytest.raises(ValueError, match=name):
        checkpoint.save(model, tmp_path / name)


def test_only_the_newest_checkpoint_is_kept(tmp_path, model):
    for n in range(1, 4):
        assert checkpoint.save(model, tmp_path).name == f"checkpoint-{n:06d}"
    assert names_in(tmp_path) == ["checkpoint-000003", "latest"]


def test_numbers_go_on_beyond_six_digits(tmp_path, model):
    checkpoint.save(model, tmp_path).rename(tmp_path / "checkpoint-999999")
    for _ in range(2):
        checkpoint.save(model, tmp_path)
    assert names_in(tmp_path) == ["checkpoint-1000001", "latest"]


STEPS = [
    (checkpoint, "save_file"),
    (checkpoint, "_write_json"),
    (os, "fsync"),
    (os, "replace"),
    (shutil, "rmtree"),
]


@pytest.mark.slow
@pytest.mark.parametrize("place, name", STEPS)
def test_a_save_that_fails_anywhere_leaves_the_old_checkpoint_or_the_new_one(
    place, name, tmp_path, model
):
    models = {"old": model, "new": draw(model.config, seed=9)}
    trainings = {
        "old": Training({"m": torch.zeros(1)}, {"which": "old"}),
        "new": Training({"m": torch.ones(1)}, {"which": "new"}),
    }
    stopped = 0
    for stage in range(1, 30):
        folder = tmp_path / str(stage)
        checkpoint.save(models["old"], folder, trainings["old"])
        calls, real = [], getattr(place, name)

        def failing(*args, calls=calls, real=real, stage=stage, **kwargs):
            calls.append(1)
            if len(calls) == stage:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, failing)
            try:
                checkpoint.save(
                    models["new"], folder, trainings["new"], shard_bytes=50_000
                )
            except KeyboardInterrupt:
                stopped += 1
        tensors, state = checkpoint.load_training(folder)
        which = state["which"]
        assert same(checkpoint.load(folder), models[which])
        assert torch.equal(tensors["m"], trainings[which].tensors["m"])
        checkpoint.save(models["new"], folder, trainings["new"])
        assert len(names_in(folder)) == 2
        assert same(checkpoint.load(folder), models["new"])
        if len(calls) < stage:
            break
    assert stopped >= 2 and len(calls) < stage


# --- killed


SAVE_AND_READ = """
import os, random, signal, sys, time
from helpers.v3 import DeepSeekV3, V3Config, checkpoint
from helpers.v3.checkpoint import Training
import torch
torch.set_num_threads(1)
folder = sys.argv[1]
sizes = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2}
model = DeepSeekV3(V3Config.tiny(**sizes, moe_intermediate_size=12))

def save(i):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(i)
    training = Training({"i": torch.tensor(float(i))}, {"i": i})
    checkpoint.save(model, folder, training, shard_bytes=50_000)

def read():
    values = set()
    for p in checkpoint.load(folder).parameters():
        values.update(p.unique().tolist())
    assert len(values) == 1, values
    return values.pop()

def fork(work):
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)
"""


KILLED_WHILE_SAVING = """
rng = random.Random(0)
save(0)
seen = []
for _ in range(10):
    before = os.readlink(folder + "/latest")
    first = seen[-1] + 1 if seen else 1
    child = fork(lambda: [save(i) for i in range(first, 10**6)])
    while os.readlink(folder + "/latest") == before:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the saving process ended"
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    tensors, state = checkpoint.load_training(folder)
    assert read() == state["i"] == tensors["i"].item(), (state, tensors)
    seen.append(state["i"])
assert seen == sorted(set(seen)), seen
save(9)
left = [name for name in os.listdir(folder) if name.startswith((".part", ".latest"))]
assert not left, left
"""


def run(script, *args):
    return subprocess.Popen(
        [sys.executable, "-c", script, *args],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the process it kills")
def test_killed_at_any_moment_of_saving_a_whole_checkpoint_stays(tmp_path):
    process = run(SAVE_AND_READ + KILLED_WHILE_SAVING, str(tmp_path / "run"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]


# --- several processes


def ended_process():
    """The id of a process that has just ended."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return process.pid


def part_of(folder, pid, machine=None, age=0.0):
    """A part as the process `pid` would have left it, `age` seconds ago."""
    machine = platform.node() if machine is None else machine
    part = folder / f".part-{pid}-{machine}"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(b"half")
    then = time.time() - age
    os.utime(part, (then, then))
    return part


@pytest.mark.skipif(os.name != "posix", reason="Windows cannot be asked")
def test_the_part_of_a_process_that_has_ended_is_removed(tmp_path, model):
    part = part_of(tmp_path, ended_process())
    pointer = tmp_path / f".latest-{ended_process()}-{platform.node()}"
    pointer.symlink_to("checkpoint-000001")
    first_edition = tmp_path / f".part-{ended_process()}"
    first_edition.mkdir()
    checkpoint.save(model, tmp_path)
    for left in (part, pointer, first_edition):
        assert not os.path.lexists(left)


def test_the_part_of_a_living_process_is_left_alone(tmp_path, model):
    process = run("input()")
    try:
        part = part_of(tmp_path, process.pid)
        for _ in range(2):
            checkpoint.save(model, tmp_path)
        assert (part / "model.safetensors").read_bytes() == b"half"
    finally:
        process.kill()
        process.communicate()


def test_a_part_of_another_machine_stays_for_a_day(tmp_path, model):
    pid = ended_process()
    recent = part_of(tmp_path, pid, machine="elsewhere", age=latest.DAY - 3600)
    old = part_of(tmp_path, pid + 1, machine="elsewhere", age=latest.DAY + 3600)
    checkpoint.save(model, tmp_path)
    assert recent.exists() and not old.exists()


def test_a_part_of_a_day_ago_goes_even_if_a_process_has_its_number(tmp_path, model):
    old = part_of(tmp_path, os.getppid(), age=latest.DAY + 3600)
    checkpoint.save(model, tmp_path)
    assert not old.exists()


def test_nobody_is_asked_on_windows(tmp_path, monkeypatch):
    """There os.kill(pid, 0) sends Ctrl-C."""

    def kill(*_):
        raise AssertionError("asked")

    part = part_of(tmp_path, ended_process())
    monkeypatch.setattr(latest.os, "name", "nt")
    monkeypatch.setattr(latest.os, "kill", kill)
    assert latest._may_be_at_work(1, platform.node(), part)


def test_other_hidden_files_are_left_alone(tmp_path, model):
    for name in (".part-of-something", ".DS_Store", ".latest", ".part-1x"):
        (tmp_path / name).write_text("mine", encoding="utf-8")
    checkpoint.save(model, tmp_path)
    assert {".part-of-something", ".DS_Store", ".latest", ".part-1x"} < set(
        os.listdir(tmp_path)
    )


TWO_BESIDE_EACH_OTHER = """
save(0)
times = 25
children = [
    fork(lambda: [save(first + i) for i in range(times)]) for first in (1000, 2000)
]
seen = []
working = set(children)
while working:
    ended, status = os.waitpid(-1, os.WNOHANG)
    if ended:
        assert status == 0, status
        working.remove(ended)
    seen.append(read())
    tensors, state = checkpoint.load_training(folder)
    assert tensors["i"].item() == state["i"], (tensors, state)
assert len(set(seen)) > 1, seen
assert seen[-1] in (1000 + times - 1, 2000 + times - 1), seen
# each save has got a number of its own, and nothing is left of the others
left = sorted(os.listdir(folder))
assert left == [".lock", f"checkpoint-{2 * times + 1:06d}", "latest"], left
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the processes that save")
def test_two_processes_save_into_one_folder_and_latest_is_always_whole(tmp_path):
    process = run(SAVE_AND_READ + TWO_BESIDE_EACH_OTHER, str(tmp_path / "run"))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]


@pytest.mark.slow
def test_a_save_waits_while_another_one_switches_latest(tmp_path, model, monkeypatch):
    """Else it would remove, as older, what the other is about to point to."""
    point_latest_to = latest._point_latest_to
    others = []

    def slowly(new):
        if not others:
            other = threading.Thread(target=checkpoint.save, args=(model, tmp_path))
            others.append(other)
            other.start()
            other.join(timeout=1)
        point_latest_to(new)

    monkeypatch.setattr(latest, "_point_latest_to", slowly)
    assert checkpoint.save(model, tmp_path).name == "checkpoint-000001"
    others[0].join()
    assert same(checkpoint.load(tmp_path), model)
    assert names_in(tmp_path) == ["checkpoint-000002", "latest"]


def test_what_is_replaced_while_it_is_read_is_read_again(tmp_path, model):
    newer = draw(model.config, seed=9)
    checkpoint.save(model, tmp_path)
    places = []

    def read(place):
        places.append(place.name)
        if len(places) == 1:
            checkpoint.save(newer, tmp_path)
        return checkpoint.load(place)

    assert same(latest.read_newest(tmp_path, read), newer)
    assert places == ["checkpoint-000001", "checkpoint-000002"]


def test_a_file_that_goes_while_it_is_opened_is_read_again_from_the_newest(
    tmp_path, model, monkeypatch
):
    """safetensors opens twice; between, a newer save may remove the file."""
    checkpoint.save(model, tmp_path)
    really_open = tensor_files.safe_open
    calls = []

    def open_late(path, framework):
        calls.append(path)
        if len(calls) == 1:
            checkpoint.save(model, tmp_path)
            raise RuntimeError(f"unable to open file <{path}> in read-only mode")
        return really_open(path, framework=framework)

    monkeypatch.setattr(tensor_files, "safe_open", open_late)
    same(checkpoint.load(tmp_path), model)
    assert len(calls) == 2 and calls[0] != calls[1]
