"""A folder of numbered checkpoints, and `latest`, which points to the newest whole one.

    run/checkpoint-000007/      config.json, weights, ...
    run/latest                  -> checkpoint-000007
    run/.part-4711-HOST/        what a process (its id and machine) is writing
    run/.lock                   held while `latest` is switched

A checkpoint is written as a part. It gets its number by one rename, and `latest` leads
to it by another: a kill at any moment leaves the old checkpoint or the new one. Several
processes may save into one folder; each leaves the others' parts alone.
"""

import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from helpers.v3.tensor_files import CheckpointError

from filelock import FileLock

Result = TypeVar("Result")

OURS = re.compile(r"latest|checkpoint-(\d{6,})")
UNFINISHED = re.compile(r"\.(?:part|latest)-(\d+)(?:-(.*))?")
DAY = 86400  # seconds


# ------------------------------------------------------------------------- writing


def start_part(folder: Path) -> Path:
    """A new empty folder to write into. ValueError if `folder` is no run's folder."""
    _numbers(folder)
    part = folder / f".part-{_this_process()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def publish(part: Path, folder: Path) -> Path:
    """Turn a finished part into the newest checkpoint. -> its own folder.

    Removes older checkpoints, and what processes that are gone have left.
    """
    for path in part.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before `latest` says so
    # without the lock another process could switch `latest` back, to what we remove
    with FileLock(folder / ".lock", poll_interval=0.01):
        number = 1 + max(_numbers(folder), default=0)
        new = folder / f"checkpoint-{number:06d}"
        os.replace(part, new)
        _point_latest_to(new)
        _remove_older(folder, number)
        _remove_abandoned(folder)
    return new


def _numbers(folder: Path) -> list[int]:
    """The numbers of the checkpoints in a folder that holds nothing else."""
    if folder.is_dir():
        inside = [path.name for path in folder.iterdir() if path.name[0] != "."]
    else:
        inside = [folder.name] if folder.exists() else []
    numbers = []
    for name in inside:
        ours = OURS.fullmatch(name)
        if ours is None:
            raise ValueError(
                f"{folder} holds {name}, which is no checkpoint of ours: choose a new "
                "or empty folder"
            )
        if name != "latest":
            numbers.append(int(ours[1]))
    return numbers


def _point_latest_to(new: Path) -> None:
    pointer = new.with_name(f".latest-{_this_process()}")
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(new.name, target_is_directory=True)
    except OSError:  # no links on this file system: a file with the name in it
        pointer.write_text(new.name, encoding="utf-8")
    os.replace(pointer, new.with_name("latest"))


def _remove_older(folder: Path, newest: int) -> None:
    for number in _numbers(folder):
        if number < newest:
            # what is still open elsewhere goes with the next save
            shutil.rmtree(folder / f"checkpoint-{number:06d}", ignore_errors=True)


# ------------------------------------------------------------- what others have left


def _this_process() -> str:
    return f"{os.getpid()}-{_machine()}"


def _machine() -> str:
    return re.sub(r"[^\w.-]", "_", platform.node())


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes left that are gone. Never a living one's."""
    for path in folder.glob(".*"):
        writer = UNFINISHED.fullmatch(path.name)
        if writer is None or _may_be_at_work(int(writer[1]), writer[2], path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _may_be_at_work(pid: int, machine: str | None, path: Path) -> bool:
    """Whether the process that wrote `path` may still live.

    Only a process of this machine can be asked. After a day nobody is at work on it,
    and its number may long be another process's.
    """
    try:
        age = time.time() - path.lstat().st_mtime
    except FileNotFoundError:
        return False
    if age > DAY:
        return False
    # on Windows signal 0 is no question, it is Ctrl-C
    can_ask = os.name == "posix" and machine in (None, _machine())
    if not can_ask:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives and is another user's
    return True


# ------------------------------------------------------------------------- reading


def resolve(folder: str | Path) -> Path:
    """The folder with the files: what `latest` points to, or `folder` itself.

    Raises CheckpointError when neither leads to a config.json.
    """
    folder = Path(folder)
    target = _target(folder)
    while target is not None:
        if (target / "config.json").is_file():
            return target.resolve()
        # a save may just have replaced it
        before = target
        target = _target(folder)
        if target == before:
            break
    if (folder / "config.json").is_file():
        return folder.resolve()
    raise CheckpointError(
        f"no checkpoint in {folder}: neither config.json nor a `latest` that leads to "
        "one"
    )


def _target(folder: Path) -> Path | None:
    """Where `latest` leads: a link, a file with a name in it, or a copied folder."""
    pointer = folder / "latest"
    if pointer.is_symlink():
        return folder / os.readlink(pointer)
    if pointer.is_file():
        name = pointer.read_text(encoding="utf-8", errors="replace")
        return folder / name.strip()
    return pointer if pointer.is_dir() else None


def read_newest(folder: str | Path, read: Callable[[Path], Result]) -> Result:
    """`read(place)` of the newest checkpoint.

    Where a save replaces that checkpoint while it is read, the newer one is read.
    """
    place = resolve(folder)
    while True:
        try:
            return read(place)
        except CheckpointError:
            newest = resolve(folder)
            if newest == place:
                raise
            place = newest
