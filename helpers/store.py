"""Where things are kept: checkpoints and caches in `.lab` (never committed), measured results in `notebooks/results` (committed)."""
import dataclasses
import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path


def home() -> Path:
    """The repository root, or the folder that the environment variable V3LAB_HOME names."""
    return Path(os.environ.get("V3LAB_HOME") or Path(__file__).resolve().parent.parent)


def cache_dir() -> Path:
    """`home()/.lab`: checkpoints and the tokenized corpus. All of it can be made again, so it may be removed at any time."""
    return home() / ".lab"


def results_dir() -> Path:
    """`home()/notebooks/results`: the recorded numbers that the figures draw."""
    return home() / "notebooks" / "results"


def _fields(value):
    """What json.dumps cannot write by itself: a dataclass becomes the dict of its fields, anything else is a TypeError."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON; use numbers, strings, lists, dicts or a dataclass of these")


def key(**parts) -> str:
    """16 hex digits that are the same for the same parts in any order, on any machine.
    TypeError, with the part's name, for a part that is not JSON (NaN included) nor a dataclass of it."""
    for name, part in parts.items():
        try:
            json.dumps(part, sort_keys=True, default=_fields, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"key part {name!r}: {error}") from error
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_fields, separators=(",", ":")).encode()).hexdigest()[:16]


def checkpoint_dir(label: str, /, **parts) -> Path:
    """The folder for what `label` makes from exactly these parts; not created here. TypeError as in `key`."""
    return cache_dir() / f"{label}-{key(**parts)}"


def _seeds(path: Path, parameters: dict) -> dict[int, dict] | None:
    """{seed: data} of the result file at `path`: None where there is no file, {} where it was made with other parameters."""
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    same = key(parameters=found["parameters"]) == key(parameters=parameters)
    return {int(seed): data for seed, data in found["seeds"].items()} if same else {}


def record(name: str, parameters: dict, seed: int, data: dict) -> Path:
    """Put one seed's numbers and histories into `results_dir()/NAME.json`; returns the file written.
    parameters: every size and step count, without the seeds. A file with the same parameters keeps its other seeds. A file with other
    parameters is left alone, and the result goes to NAME.other.json (overwritten when its parameters differ too).
    Floats in `data` are rounded to 6 significant digits. "versions" are those of the latest seed recorded.
    ValueError for NaN or infinity, TypeError for what is not JSON; the file on disk then stays as it was."""
    try:
        text = json.dumps(data, default=_fields, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{name}, seed {seed}: only finite numbers can be recorded ({error})") from error
    path = results_dir() / f"{name}.json"
    path = path.with_name(f"{name}.other.json") if _seeds(path, parameters) == {} else path
    seeds = (_seeds(path, parameters) or {}) | {seed: json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"))}
    code = b"".join(source.name.encode() + b"\0" + source.read_bytes() + b"\0" for source in sorted(Path(__file__).parent.glob("*.py")))
    versions = {"python": platform.python_version(), "torch": version("torch"), "code": hashlib.sha256(code).hexdigest()[:12]}
    result = {"name": name, "parameters": parameters, "versions": versions, "seeds": dict(sorted(seeds.items()))}
    text = json.dumps(result, indent=1, default=_fields, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def recorded(name: str, parameters: dict) -> dict[int, dict]:
    """{seed: data} recorded with exactly these parameters, from NAME.json or else NAME.other.json; {} when there is none."""
    for path in (results_dir() / f"{name}.json", results_dir() / f"{name}.other.json"):
        if found := _seeds(path, parameters):
            return found
    return {}
