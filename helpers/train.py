"""The pre-training loop: V3's AdamW, schedule, clipping, bias update and MTP weights, scaled to a short run; exact stop and resume.

`python -m helpers.train --help` runs it from a shell, torchrun on several processes (helpers.parallel); `run` is what the notebooks call."""
import argparse
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm.auto import tqdm

from helpers import checkpoint, data, parallel, store
from helpers.model import DeepSeekV3, V3Config

# V3 section 4.2, in trillions of tokens: constant to 10, cosine to a tenth at 14.3, constant to 14.633, the rest at 7.3e-6 / 2.2e-4
TOTAL, CONSTANT, COSINE, LOW = 14.8, 10.0, 14.3, 14.633
History = dict[str, Any]


class TrainingDiverged(RuntimeError):
    """The loss is not a finite number any more. The message has the step, the last good checkpoint and what to try."""


@dataclass(frozen=True)
class Settings:
    """One run. Tokens = steps * batch_size * length. Values of V3 (section 4.2) where they carry over; lr and gamma fit short runs."""

    steps: int = 400
    batch_size: int = 16
    length: int = 256
    lr: float = 3e-3
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    gamma: float = 0.003  # bias update speed; V3: 0.001 over 235,000 steps, 0 for the last 500B tokens
    alpha: float = 1e-4  # balance loss
    mtp_lambda: float = 0.3  # until the constant phase ends
    mtp_lambda_last: float = 0.1
    valid_every: int = 50
    valid_sequences: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            value, low = getattr(self, f.name), int(f.name in ("steps", "batch_size", "length", "valid_every", "valid_sequences"))
            if type(value) not in (int, float) or not math.isfinite(value) or value < low or (f.type is int and type(value) is not int):
                raise ValueError(f"{f.name}={value!r} cannot work: it must be a{'n integer' if f.type is int else ' number'} of at least {low}")


def learning_rate(step: int, settings: Settings) -> float:
    """Learning rate of `step` (from 0): linear warm-up, constant, cosine to a tenth, then two constants (V3 section 4.2)."""
    peak, low, done = settings.lr, settings.lr / 10, step / settings.steps * TOTAL
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    if done < CONSTANT:
        return peak
    if done < COSINE:
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (done - CONSTANT) / (COSINE - CONSTANT)))
    return low if done < LOW else peak * 7.3e-6 / 2.2e-4


def losses(model: DeepSeekV3, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [B, T+1] -> cross-entropy of the next token, mean cross-entropy of the MTP depths, sum of the layers' balance losses."""
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    hidden = model.hidden(ids)
    main = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten())
    further = [F.cross_entropy(logits.flatten(0, 1), targets[:, k:].flatten())
               for k, logits in enumerate(model.predict_further(hidden, ids), start=1)]
    mtp = torch.stack(further).mean() if further else main.new_zeros(())  # V3 eq. 25: the mean over depths
    balance = main.new_zeros(())
    for router in model.routers():
        balance, router.balance_loss = balance + router.balance_loss, 0.0  # taken out, so that the model does not hold on to the graph
    return main, mtp, balance


@torch.no_grad()
def evaluate(model: DeepSeekV3, tokens: Tensor, batch_size: int = 16) -> float:
    """Mean cross-entropy of the next token in nats, over tokens [n, T+1]; the model's mode and loads stay as they were."""
    was, total = model.training, 0.0
    model.eval()
    for part in tokens.to(model.lm_head.weight.device).split(batch_size):
        total += F.cross_entropy(model(part[:, :-1]).flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum").item()
    model.train(was)
    return total / tokens[:, 1:].numel()


def max_violation(load: Tensor) -> float:
    """How far the busiest expert lies above the mean: max / mean - 1 (arXiv:2408.15664). load [E], tokens per expert."""
    return (load.max() / load.mean().clamp(min=1e-9) - 1).item()


@contextmanager
def _stop_after_step() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C (or Jupyter's stop) into a flag that is read between steps, so that no step is done by half; a second one acts."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handler)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def adamw(model: torch.nn.Module, settings: Any) -> torch.optim.AdamW:
    """AdamW with the lr, betas and weight decay of `settings`; vectors (norms) are not decayed."""
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": settings.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)


def _resume(model: DeepSeekV3, optimizer: torch.optim.AdamW, keep: dict[str, Tensor], identity: dict[str, Any], folder: Path) -> tuple[int, History]:
    """Put the newest checkpoint into model, optimizer and `keep`; -> steps done, history. ValueError when it belongs to another run."""
    extra, state = checkpoint.load_training(folder)
    for part, value in identity.items():
        if state.get(part) != json.loads(json.dumps(value)):
            raise ValueError(f"the checkpoint in {folder.name} was made with another {part}: go on with that one, or choose another folder")
    found = checkpoint.load(folder).state_dict()
    model.load_state_dict({name: parallel.part(found[name], tensor) for name, tensor in model.state_dict().items()})
    for name, p in model.named_parameters():
        if f"{name}.step" in extra:
            optimizer.state[p] = {kind: parallel.part(extra[f"{name}.{kind}"], p) for kind in ("step", "exp_avg", "exp_avg_sq")}
    for name, tensor in keep.items():
        tensor.copy_(extra[name])
    return state["step"], state["history"]


def descend(model: torch.nn.Module, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
    """One optimizer step on the gradients at hand, clipped to the norm `grad_clip`; then there are none."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    for state in optimizer.state.values() if getattr(model, "precision", None) else ():
        for moment in ("exp_avg", "exp_avg_sq"):  # BF16 numbers (V3 section 3.3.3), in float32 tensors
            state[moment].copy_(state[moment].bfloat16())
    optimizer.zero_grad(set_to_none=True)


def loop(model: DeepSeekV3, optimizer: torch.optim.AdamW, rate: Callable[[int], float], steps: int,
         take_step: Callable[[int, History, Callable[..., None]], None], history: History, identity: dict[str, Any], folder: str | Path | None,
         tokenizer: Tokenizer, save_every: int, label: str, keep: dict[str, Tensor] | None = None) -> History:
    """The frame of every training here: call take_step(step, history, check) at learning rate rate(step) for each step that `folder` lacks.

    take_step calls check(loss) before it changes the weights, or check(loss, after=True) after it: one that is not finite raises
    TrainingDiverged. It adds to `history` and draws its randomness from (seed, step) alone, so that a stopped, killed or resumed run ends
    in the bits of one never stopped.
    `identity`: JSON that a resumed run must share. `keep`: more tensors that belong to the state, by name. Ctrl-C or Jupyter's stop ends
    after the step at hand, saves, says how to go on and raises KeyboardInterrupt."""
    folder, start, keep = Path(folder) if folder else None, 0, keep or {}
    if folder and (folder / "latest").exists():
        start, history = _resume(model, optimizer, keep, identity, folder)
    if parallel.mean(mark := int(store.key(identity=identity, start=start)[:8], 16)) != [mark]:
        raise ValueError("the processes do not see the same text or checkpoint: they need the same Python, --text and --out (a shared folder)")
    saved = start
    optimizer.zero_grad(set_to_none=True)  # of a step that was cut off

    def save(step: int) -> None:
        nonlocal saved
        if folder and step != saved:
            extra = {f"{name}.{kind}": parallel.whole(x) for name, p in model.named_parameters() for kind, x in optimizer.state[p].items()} | keep
            checkpoint.save(model, folder, extra, identity | {"step": step, "history": history}, files={"tokenizer.json": tokenizer.to_str()})
            saved = step

    with _stop_after_step() as stop, tqdm(total=steps, initial=start, desc=label, unit="step", disable=start == steps or parallel.RANK > 0) as bar:
        for step in range(start, steps):

            def check(loss: float, after: bool = False, step: int = step) -> None:
                if not math.isfinite(loss):
                    kept = f"the checkpoint of step {saved} is in {folder}" if folder and saved else "no checkpoint was saved before it"
                    raise TrainingDiverged(f"loss is {loss} at step {step + after}; {kept}. Try a lower lr (now {rate(step):g}), more warmup_steps "
                                           f"or a smaller initializer_range")
                if step % save_every == 0 and not after:  # only now is it known that the weights of the step before are good
                    save(step)

            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            began, exchanged = time.perf_counter(), parallel.AllToAll.seconds
            take_step(step, history, check)
            history["seconds"] = history.get("seconds", 0.0) + time.perf_counter() - began
            if parallel.ON:
                history["all_to_all_seconds"] = history.get("all_to_all_seconds", 0.0) + parallel.AllToAll.seconds - exchanged
            bar.update()
            bar.set_postfix({name: f"{history[name][-1]:.3g}" for name in ("loss", "accuracy", "length") if history.get(name)}, refresh=False)
            if step + 1 == steps:
                save(steps)
            elif any(parallel.mean(stop.is_set())):
                save(step + 1)
                kept = f"saved in {folder.name}; the same call goes on from there" if folder else "the model keeps what it has learnt"
                if parallel.RANK == 0:
                    print(f"stopped after step {step + 1} of {steps}: {kept}")
                raise KeyboardInterrupt
    model.eval()
    return history


def train(model: DeepSeekV3, corpus: data.Corpus, settings: Settings, folder: str | Path | None = None, save_every: int = 100,
          label: str = "training") -> History:
    """Pre-train `model` in place; with a `folder`, save there and go on from what it holds (see `loop`).

    The history has one entry per step (loss, mtp_loss, lr, max_violation as the mean over MoE layers) and snapshots every
    `valid_every` steps and at the end (valid_step, valid_loss in nats per token, load and bias [layers][E]), and seconds of training.
    ValueError: a folder of another run, a text too short, a vocabulary too large. TrainingDiverged: a loss that is not finite."""
    if corpus.vocab_size > model.config.vocab_size:
        raise ValueError(f"vocab_size={model.config.vocab_size} is too small for a corpus of {corpus.vocab_size} tokens")
    if settings.length <= model.config.num_nextn_predict_layers:
        raise ValueError(f"length={settings.length} is too short for num_nextn_predict_layers={model.config.num_nextn_predict_layers}")
    device = model.lm_head.weight.device
    identity = {"config": asdict(model.config), "settings": asdict(settings), "corpus": corpus.hash,
                "precision": model.precision and asdict(model.precision)}
    optimizer, routers = adamw(model, settings), model.routers()
    valid = parallel.rows(corpus.valid_batch(settings.valid_sequences, settings.length + 1), "valid_sequences")
    for router in routers:
        router.load.zero_()  # of a step that was cut off
    model.train()

    def take_step(step: int, history: History, check: Callable[..., None]) -> None:
        done = step / settings.steps * TOTAL
        tokens = parallel.rows(corpus.batch(step, settings.seed, settings.batch_size, settings.length + 1), "batch_size").to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and not model.precision):
            main, mtp, balance = losses(model, tokens)
            weight = settings.mtp_lambda if done < CONSTANT else settings.mtp_lambda_last
            loss = main + weight * mtp + settings.alpha * balance
        seen = parallel.mean(loss.item(), main.item(), mtp.item())
        check(seen[0])
        loss.backward()
        descend(model, optimizer, settings.grad_clip)
        violation = sum(max_violation(parallel.total(router.load)) for router in routers) / max(len(routers), 1)
        for name, value in zip(("loss", "mtp_loss", "lr", "max_violation"), (*seen[1:], learning_rate(step, settings), violation), strict=True):
            history[name].append(value)
        snapshot = step + 1 == settings.steps or (step + 1) % settings.valid_every == 0
        if snapshot:
            history["load"].append([router.load.tolist() for router in routers])
            history["bias"].append([router.e_score_correction_bias.tolist() for router in routers])
        for router in routers:
            router.update_bias(settings.gamma if done < COSINE else 0.0)
        if snapshot:
            history["valid_step"].append(step + 1)
            history["valid_loss"] += parallel.mean(evaluate(model, valid))
            check(history["valid_loss"][-1], after=True)

    history: History = {name: [] for name in ("loss", "mtp_loss", "lr", "max_violation", "valid_step", "valid_loss", "load", "bias")}
    return loop(model, optimizer, lambda step: learning_rate(step, settings), settings.steps, take_step, history, identity, folder,
                corpus.tokenizer, save_every, label)


def run(config: V3Config, corpus: data.Corpus, settings: Settings, label: str, precision: Any = None) -> tuple[DeepSeekV3, History]:
    """A model drawn from `settings.seed` and trained, or the finished or half-finished one of exactly this config, corpus, settings, precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = DeepSeekV3(config, precision).to(parallel.DEVICE)
    more = {"precision": precision} if precision else {}
    folder = store.checkpoint_dir(label.replace(" ", "-").lower(), config=config, settings=settings, corpus=corpus.hash, **more)
    return model, train(model, corpus, settings, folder, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for checkpoints; a run found there is gone on with")
    parser.add_argument("--text", help="folder of text files (default: Python's standard library)")
    parser.add_argument("--config", help="a config.json with DeepSeek-V3's field names (default: V3Config.tiny())")
    parser.add_argument("--max-bytes", type=int, help="use only so much of the text")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--ep", type=int, help="processes that share one copy of the model (default: all that torchrun started)")
    for f in fields(Settings):
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, default=f.default)
    args = vars(parser.parse_args())
    try:
        settings = Settings(**{f.name: args[f.name] for f in fields(Settings)})
        config = V3Config.from_hf(json.loads(Path(args["config"]).read_text())) if args["config"] else V3Config.tiny()
        corpus = data.load(args["text"], config.vocab_size, args["max_bytes"])
        torch.manual_seed(settings.seed)
        parallel.join()
        history = train(parallel.shard(DeepSeekV3(config), args["ep"]).to(parallel.DEVICE), corpus, settings, args["out"], args["save_every"])
    except (ValueError, OSError, TrainingDiverged) as error:
        raise SystemExit(1 if parallel.RANK else f"{type(error).__name__}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if parallel.RANK == 0:
        loss, seconds = history["valid_loss"][-1], history["seconds"]
        print(f"validation loss {loss:.4f} nats per token, {loss / math.log(2) / corpus.bytes_per_token:.4f} bits per byte, {seconds:.0f} s, "
              f"{settings.steps * settings.batch_size * settings.length / seconds:.0f} tokens/s; checkpoint in {checkpoint.resolve(args['out'])}"
              + f"; {history.get('all_to_all_seconds', 0) / seconds:.1%} of the time in all-to-all" * parallel.ON, flush=True)
    parallel.leave()


if __name__ == "__main__":
    main()
