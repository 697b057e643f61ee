"""Post-training: supervised fine-tuning and GRPO (arXiv:2402.03300; R1 v2, section 2.1) on the Countdown task.

Trains a DeepSeekV3, or a transformers model with an `lm_head` (the dense students), through the same functions.

What is not published for R1 is decided here and said: the expert bias stays as pre-training left it (gamma 0, as in V3's last 500B tokens),
so that sampler and trainer route alike; no balance loss, no MTP loss, and the MTP modules are not changed."""
import copy
import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from helpers import countdown, data, store, train
from helpers.countdown import Problem
from helpers.model import DeepSeekV3, V3Config, sample

WORDS = countdown.tokenizer()
# The base of all reasoning notebooks: a V3 of two cores' size for 135 words, and how it is pre-trained, short and then long
BASE = V3Config.tiny(vocab_size=len(countdown.VOCABULARY), num_hidden_layers=3, intermediate_size=256, n_routed_experts=8, num_experts_per_tok=2,
                     moe_intermediate_size=64, q_lora_rank=None, kv_lora_rank=32, max_position_embeddings=512)
PRETRAINING = train.Settings(steps=1750, batch_size=16, length=128, lr=3e-3, valid_every=250)
EXTENSION = train.Settings(steps=350, batch_size=8, length=256, lr=1.5e-3, valid_every=50)


def base(corpus: data.Corpus, config: V3Config = BASE, steps: int | None = None) -> tuple[DeepSeekV3, list[train.History]]:
    """The base model, pre-trained short and then long as V3 was (section 4.3), and both histories; or the finished one of exactly these.
    At positions that no window reached a model writes nothing of use: hence phase two. `steps` (for tests): of phase one; two takes a fifth."""
    first = PRETRAINING if steps is None else replace(PRETRAINING, steps=steps)
    second = EXTENSION if steps is None else replace(EXTENSION, steps=max(1, steps // 5))
    model, history = train.run(config, corpus, first, "countdown base")
    folder = store.checkpoint_dir("countdown-base-longer", base=fingerprint(model), settings=second, corpus=corpus.hash)
    return model, [history, train.train(model, corpus, second, folder, label="countdown base, longer")]


class Rollout(NamedTuple):
    """Answers to B prompts: tokens [B, P + n] (END once a row has ended), log_probs [B, n] of those drawn, lengths [B] with END, texts."""
    tokens: Tensor
    log_probs: Tensor
    lengths: Tensor
    texts: list[str]

    @property
    def prompt(self) -> int:
        """Tokens of a prompt, END included."""
        return self.tokens.shape[1] - self.log_probs.shape[1]


def rollout(model: Any, problems: list[Problem], max_new_tokens: int, generator: torch.Generator, temperature: float = 1.0) -> Rollout:
    """One answer to each problem, sampled in one batch through the absorbed latent cache. All prompts have nine tokens, END first."""
    device = model.lm_head.weight.device
    prompts = torch.tensor([[data.END, *WORDS.encode(problem.prompt).ids] for problem in problems], device=device)
    if isinstance(model, DeepSeekV3):
        log_probs = torch.zeros(len(problems), max_new_tokens, device=device)
        tokens = model.generate(prompts, max_new_tokens, temperature, data.END, generator, log_probs=log_probs).clone()
    else:
        tokens, log_probs = _transformers_generate(model, prompts, max_new_tokens, generator, temperature)
    answers = tokens[:, prompts.shape[1] :]
    ended = answers == data.END
    lengths = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, answers.shape[1])
    texts = [WORDS.decode(row[:n].tolist()) for row, n in zip(answers, lengths.tolist(), strict=True)]
    return Rollout(tokens, log_probs[:, : answers.shape[1]], lengths, texts)


def sampled(model: Any, problems: list[Problem], max_new_tokens: int, seed: int = 0, temperature: float = 1.0, label: str | None = None) -> Rollout:
    """`rollout` of many problems, 512 at a time (with a progress bar, if it has a label), padded to the longest answer allowed."""
    generator, parts = torch.Generator(model.lm_head.weight.device).manual_seed(seed), []
    for start in tqdm(range(0, len(problems), 512), desc=label, unit="batch", disable=label is None):
        part = rollout(model, problems[start : start + 512], max_new_tokens, generator, temperature)
        missing = max_new_tokens - part.log_probs.shape[1]
        parts.append((F.pad(part.tokens, (0, missing), value=data.END), F.pad(part.log_probs, (0, missing)), part.lengths, part.texts))
    tokens, log_probs, lengths, texts = zip(*parts, strict=True)
    return Rollout(torch.cat(tokens), torch.cat(log_probs), torch.cat(lengths), sum(texts, []))


@torch.no_grad()
def _transformers_generate(model: Any, prompts: Tensor, max_new_tokens: int, generator: torch.Generator, temperature: float) -> tuple[Tensor, Tensor]:
    """The same of a transformers model through its own cache; rows that are done leave: tokens [B, P + n], log_probs [B, n]."""
    B, P = prompts.shape
    tokens, log_probs = F.pad(prompts, (0, max_new_tokens), value=data.END), torch.zeros(B, max_new_tokens, device=prompts.device)
    cache, alive, new = DynamicCache(config=model.config), torch.arange(B, device=prompts.device), prompts
    for n in range(max_new_tokens):
        logits = model(new, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
        drawn = sample(logits, temperature, generator)
        tokens[alive, P + n] = drawn
        log_probs[alive, n] = logits.log_softmax(dim=-1).gather(-1, drawn[:, None]).squeeze(-1)
        rows = (drawn != data.END).nonzero().squeeze(-1)
        if len(rows) == 0:
            return tokens[:, : P + n + 1], log_probs[:, : n + 1]
        if len(rows) < len(alive):
            alive = alive[rows]
            cache.batch_select_indices(rows)
        new = drawn[rows, None]
    return tokens, log_probs


def token_log_probs(model: Any, tokens: Tensor, prompt: int) -> Tensor:
    """tokens [B, T] -> log-probability [B, T - prompt] of each token after the first `prompt` ones, with gradients."""
    if isinstance(model, DeepSeekV3):
        logits = model.lm_head(model.hidden(tokens[:, :-1])[:, prompt - 1 :])
    else:
        logits = model(tokens[:, :-1]).logits[:, prompt - 1 :]
    return logits.float().log_softmax(dim=-1).gather(-1, tokens[:, prompt:, None]).squeeze(-1)


def measure(problems: list[Problem], answers: Rollout, operators: str = "+-*") -> dict[str, float]:
    """Means of `countdown.behaviour`, mean length in tokens, share cut off, and consistency by language (nan where nobody spoke it)."""
    rows = [countdown.behaviour(problem, text, operators) for problem, text in zip(problems, answers.texts, strict=True)]
    for row, problem in zip(rows, problems, strict=True):
        row |= {f"consistency_{language}": row["consistency"] if language == problem.language else math.nan for language in countdown.WORDS}
    known = {name: [row[name] for row in rows if not math.isnan(row[name])] for name in rows[0]}
    means = {name: sum(values) / len(values) if values else math.nan for name, values in known.items()}
    ended = answers.tokens.gather(1, answers.prompt - 1 + answers.lengths[:, None]) == data.END
    return means | {"length": answers.lengths.float().mean().item(), "cut_off": 1 - ended.float().mean().item()}


@dataclass(frozen=True)
class GRPO:
    """One RL run. R1-Zero had 32 questions x 16 answers, lr 3e-6, KL 0.001, a reference new every 400 steps, temperature 1 (R1 v2)."""
    steps: int = 30
    questions: int = 64
    group: int = 8
    max_new_tokens: int = 200
    lr: float = 6e-4
    warmup_steps: int = 5
    updates: int = 2  # optimizer steps on each batch of answers
    clip: float = 0.2
    kl: float = 0.0
    refresh: int = 400  # steps between copies of the policy into the reference
    level: str = "sequence"  # "sequence": every answer weighs the same (GRPO); "token": every token (DAPO); "constant": Dr. GRPO
    divide_by_std: bool = True  # False: Dr. GRPO
    weight_format: float = 0.2
    weight_language: float = 0.0
    weight_readable: float = 0.0
    operators: str = "+-*"
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.level not in ("sequence", "token", "constant"):
            raise ValueError(f"level={self.level!r} is not known: use 'sequence', 'token' or 'constant'")
        for name in ("steps", "questions", "group", "max_new_tokens", "updates", "refresh"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} cannot work: it must be a whole number of at least 1")
        if self.group < 2:
            raise ValueError("group=1 cannot work: an answer's advantage is measured against the others of its group")
        if self.updates > self.questions:
            raise ValueError(f"updates={self.updates} cannot work: each needs a question of its own, and questions={self.questions}")


def reward(settings: GRPO, problem: Problem, text: str) -> float:
    """Accuracy, and format, language consistency and a readable last line at their weights, of one answer."""
    return (countdown.accuracy(problem, text, settings.operators) + settings.weight_format * countdown.well_formed(text)
            + settings.weight_language * countdown.language_consistency(problem.language, text)
            + settings.weight_readable * countdown.readable(problem, text))


def advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:
    """rewards [questions, group] -> how much better than its group each answer is, (r - mean) / std; 0 where all are alike."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True, correction=0) + 1e-6) if divide_by_std else centred


def row_weights(lengths: Tensor, level: str, max_new_tokens: int) -> Tensor:
    """Weight [B] of each token of an answer, so that the losses of all tokens add up to the batch's loss."""
    if level == "sequence":
        return 1 / (len(lengths) * lengths)
    return torch.full(lengths.shape, 1 / lengths.sum().item() if level == "token" else 1 / (len(lengths) * max_new_tokens))


def grpo_loss(log_probs: Tensor, old: Tensor, advantage: Tensor, weights: Tensor, clip: float, kl: float = 0.0,
              reference: Tensor | None = None) -> Tensor:
    """GRPO's objective with its sign turned (R1 v2, eq. 1-2). log_probs, old, reference [B, n]; advantage [B]; weights [B, n], 0 on padding."""
    ratio = ((log_probs - old) * (weights > 0)).exp()  # padding may hold anything
    gain = torch.minimum(ratio * advantage[:, None], ratio.clamp(1 - clip, 1 + clip) * advantage[:, None])
    if reference is not None:
        gain = gain - kl * ((reference - log_probs).exp() - (reference - log_probs) - 1)
    return -(gain * weights).sum()


def micro_batches(lengths: Tensor, tokens: int = 4096) -> list[Tensor]:
    """Row indices in parts of about `tokens` padded tokens, rows of like length together."""
    parts, rows = [], lengths.argsort(descending=True).tolist()
    while rows:
        n = max(1, tokens // int(lengths[rows[0]]))
        parts.append(torch.tensor(rows[:n]))
        rows = rows[n:]
    return parts


def fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits of the config and the weights, to key what is made from them."""
    digest = hashlib.sha256(str(model.config).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _begin(base: Any, settings: Any, label: str, folder: str | Path | None, **more: Any) -> tuple[Any, torch.optim.AdamW, dict, str | Path | None]:
    """A copy of `base`, its optimizer, the run's identity and its folder; a transformers model has none: save it with its own `save_pretrained`."""
    model, identity = copy.deepcopy(base), {"base": fingerprint(base), "settings": asdict(settings), **more}
    kept = store.checkpoint_dir(label.replace(" ", "-").lower(), **identity) if isinstance(base, DeepSeekV3) else None
    return model, train.adamw(model, settings), identity, folder or kept


def grpo(base: Any, settings: GRPO, label: str, watch: Callable[[Any, int], Any] | None = None, watch_at: tuple[int, ...] = (),
         folder: str | Path | None = None) -> tuple[Any, train.History]:
    """A copy of `base` trained by GRPO; or the finished or half-finished one of exactly this base and settings.
    The history has, per step, `measure` of the answers (before the update), reward, loss, clipped share and the largest gap between sampler's
    and trainer's log-probabilities, and in history["watch"] the JSON of `watch(model, step)`, before the steps in `watch_at` and after the last."""
    model, optimizer, identity, folder = _begin(base, settings, label, folder, watch_at=list(watch_at))
    reference = copy.deepcopy(base) if settings.kl else None

    def take_step(step: int, history: train.History, check: Callable[..., None]) -> None:
        model.eval()  # the routers do not count, no bias update
        if reference is not None and step % settings.refresh == 0:
            reference.load_state_dict(model.state_dict())
        generator = torch.Generator(model.lm_head.weight.device).manual_seed(settings.seed * 1_000_003 + step)
        asked = countdown.problems("train", settings.questions, settings.seed * 1_000_003 + step, settings.operators)
        asked = [problem for problem in asked for _ in range(settings.group)]
        answers = rollout(model, asked, settings.max_new_tokens, generator)
        rewards = torch.tensor([reward(settings, problem, text) for problem, text in zip(asked, answers.texts, strict=True)])
        advantage = advantages(rewards.view(-1, settings.group), settings.divide_by_std).flatten()
        order = torch.randperm(settings.questions, generator=torch.Generator().manual_seed(step))
        losses, gap, clipped = [], 0.0, []
        for n, questions in enumerate(order.tensor_split(settings.updates)):
            rows = (questions[:, None] * settings.group + torch.arange(settings.group)).flatten()
            weight = torch.zeros(len(asked))
            weight[rows] = row_weights(answers.lengths[rows].cpu(), settings.level, settings.max_new_tokens)
            rows = rows[advantage[rows].abs() > 0] if not settings.kl else rows  # nothing to learn from a group that agrees
            total = 0.0
            for part in micro_batches(answers.lengths[rows].cpu()) if len(rows) else []:
                loss, difference, outside = _part_loss(model, reference, answers, rows[part], advantage, weight, settings)
                loss.backward()
                total, gap = total + loss.item(), max(gap, difference) if n == 0 else gap
                clipped.append(outside)
            check(total)
            if n == 0 and step in watch_at:  # after the check, which may save: a run that goes on from there watches this step itself
                history["watch"].append(watch(model, step))
            train.descend(model, optimizer, settings.grad_clip)
            losses.append(total)
        seen = measure(asked, answers, settings.operators)
        seen |= {"reward": rewards.mean().item(), "loss": sum(losses) / len(losses), "gap": gap, "clipped": sum(clipped) / max(len(clipped), 1)}
        for name, value in seen.items():
            history.setdefault(name, []).append(None if math.isnan(value) else value)
        if watch and step + 1 == settings.steps:
            history["watch"].append(watch(model, settings.steps))

    history: train.History = {"watch": []}
    keep = {f"reference.{name}": tensor for name, tensor in reference.state_dict().items()} if reference is not None else {}
    return model, train.loop(model, optimizer, lambda step: settings.lr * min(1, (step + 1) / settings.warmup_steps), settings.steps, take_step,
                             history, identity, folder, WORDS, 10, label, keep)


def _part_loss(model: Any, reference: Any, answers: Rollout, rows: Tensor, advantage: Tensor, weight: Tensor,
               settings: GRPO) -> tuple[Tensor, float, float]:
    """Loss of some rows, the largest gap between the sampler's log-probabilities and these, and the share of tokens outside the clip."""
    n = int(answers.lengths[rows].max())
    device = answers.tokens.device
    tokens, old = answers.tokens[rows, : answers.prompt + n], answers.log_probs[rows, :n]
    inside = torch.arange(n, device=device) < answers.lengths[rows][:, None]
    log_probs = token_log_probs(model, tokens, answers.prompt)
    with torch.no_grad():
        other = token_log_probs(reference, tokens, answers.prompt) if reference is not None else None
        gap = ((log_probs - old).abs() * inside).max().item()
        outside = ((((log_probs - old).exp() - 1).abs() > settings.clip) & inside).sum().item() / inside.sum().item()
    weights = weight[rows].to(device)[:, None] * inside
    return grpo_loss(log_probs, old, advantage[rows].to(device), weights, settings.clip, settings.kl, other), gap, outside


@dataclass(frozen=True)
class SFT:
    """Fine-tuning on answers: cosine to a tenth, the prompt is not learnt. V3: 2 epochs, 5e-6 to 1e-6 (V3 section 5.1)."""
    epochs: int = 2
    batch_size: int = 32
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    by_length: bool = True  # texts of like length share a batch: faster, but where lengths differ much, a token of a short one weighs more
    seed: int = 0


def sft(base: Any, examples: list[tuple[str, str]], settings: SFT, label: str, folder: str | Path | None = None) -> tuple[Any, train.History]:
    """A copy of `base` fine-tuned on (prompt, answer) texts; or the finished or half-finished one of exactly these."""
    model, optimizer, identity, folder = _begin(base, settings, label, folder, examples=store.key(examples=examples))
    rows = [([data.END, *WORDS.encode(prompt).ids], [*WORDS.encode(answer).ids, data.END]) for prompt, answer in examples]
    batches = math.ceil(len(rows) / settings.batch_size)
    steps = settings.epochs * batches
    device = model.lm_head.weight.device

    def take_step(step: int, history: train.History, check: Callable[..., None]) -> None:
        rng = random.Random(f"{settings.seed} {step // batches}")
        order = sorted(range(len(rows)), key=lambda i: settings.by_length * len(rows[i][1]) + 20 * rng.random())  # like lengths, yet mixed
        starts = rng.sample(range(batches), batches)
        chosen = [rows[i] for i in order[starts[step % batches] * settings.batch_size :][: settings.batch_size]]
        learnt, total = sum(len(answer) for _, answer in chosen), 0.0
        widths = [len(prompt) + len(answer) for prompt, answer in chosen]
        parts = [range(len(chosen))] if settings.by_length else micro_batches(torch.tensor(widths), 1024)  # the same sum, with less padding
        for part in parts:
            texts, width = [chosen[i] for i in part], max(widths[i] for i in part)
            tokens = torch.tensor([[*prompt, *answer] + [data.END] * (width - len(prompt) - len(answer)) for prompt, answer in texts], device=device)
            inside = torch.tensor([[len(prompt) - 1 <= t < len(prompt) + len(answer) - 1 for t in range(width - 1)] for prompt, answer in texts],
                                  device=device)
            loss = -(token_log_probs(model.eval(), tokens, 1) * inside).sum() / learnt
            loss.backward()
            total += loss.item()
        check(total)
        train.descend(model, optimizer, settings.grad_clip)
        history["loss"].append(total)

    return model, train.loop(model, optimizer, lambda step: settings.lr * (0.55 + 0.45 * math.cos(math.pi * step / steps)), steps, take_step,
                             {"loss": []}, identity, folder, WORDS, 100, label)
