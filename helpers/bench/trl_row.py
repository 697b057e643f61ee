"""One GRPO step of ours beside TRL's: same weights, prompts, rewards and lengths.

trl is no package of the notebooks (`helpers/tests/requirements.txt` has it). Both draw
`questions` times `group` answers of exactly `length` tokens and learn from them once.
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from helpers.bench.timing import Row, faster, seconds_of
from helpers.reasoning import countdown
from helpers.reasoning.countdown import Problem
from helpers.reasoning.grpo import GRPO, GRPOTrainer
from helpers.reasoning.rollout import Rollout, prompt_ids, roll_out_prompts
from helpers.training.corpus import END
from helpers.v3 import DeepSeekV3, V3Config, checkpoint

import torch

MISSING = (
    "not measured: trl is not installed "
    "(pip install -r helpers/tests/requirements.txt brings it)"
)
NEVER = -1  # no token's id: an answer that waits for it does not end
SETTINGS = GRPO(questions=32, group=8, max_new_tokens=96, weight_format=0.0)
AT_ONCE = (256, 64)  # rows of TRL's micro-batches; the faster one counts
CONFIG = V3Config.tiny(num_nextn_predict_layers=0, vocab_size=len(countdown.VOCABULARY))


def installed() -> bool:
    """Whether trl is there to be compared with."""
    return find_spec("trl") is not None


def reward_of(text: str) -> float:
    """Different words, as a share of all: a reward by which answers differ."""
    words = text.split()
    return len(set(words)) / max(len(words), 1)


class Forced(GRPOTrainer):
    """GRPO where all answers have the same length, and the reward of this bench."""

    def reward_of(self, problem: Problem, text: str) -> float:
        """See `reward_of`."""
        return reward_of(text)

    def draw(self, asked: list[Problem], seed: int) -> Rollout:
        """Answers that do not end."""
        words = countdown.tokenizer()
        return roll_out_prompts(
            self.model,
            [prompt_ids(words, problem.prompt) for problem in asked],
            self.settings.max_new_tokens,
            NEVER,
            words.decode,
            torch.Generator(self.device).manual_seed(seed),
        )


def grpo_row(repeats: int) -> Row:
    """Our step and TRL's in turns."""
    rows = [_beside_trl(repeats, at_once) for at_once in AT_ONCE]
    return min(rows, key=lambda row: row.ratio)


def _beside_trl(repeats: int, at_once: int) -> Row:
    from transformers import DeepseekV3ForCausalLM, PrinterCallback
    from trl import GRPOTrainer as TRLTrainer

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    model = DeepSeekV3(CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        files = checkpoint.save(model, folder)
        theirs: Any = DeepseekV3ForCausalLM.from_pretrained(files)
        theirs.set_experts_implementation("grouped_mm")

        trainer = Forced(model, SETTINGS)
        turns = Turns(_our_step(trainer), repeats)
        their_trainer = TRLTrainer(
            model=theirs,
            reward_funcs=_their_reward,
            args=_their_settings(folder, repeats, at_once),
            train_dataset=_prompts(),
            processing_class=_their_tokenizer(),
            callbacks=[turns.callback()],
        )
        their_trainer.remove_callback(PrinterCallback)
        their_trainer.train()
    row = faster("GRPO step", 1, "steps", turns.ours, turns.theirs)
    B = SETTINGS.questions * SETTINGS.group
    note = f"{B} answers of {SETTINGS.max_new_tokens} tokens; TRL {at_once} at once"
    return replace(row, note=note)


def _our_step(trainer: GRPOTrainer) -> Callable[[], None]:
    steps = iter(range(10**6))

    def step() -> None:
        number = next(steps)
        trainer.gradients(number)
        trainer.update(number)

    return step


class Turns:
    """Seconds of our steps and theirs, taken in turns while TRL trains.

    The first turn is not counted.
    """

    def __init__(self, our_step: Callable[[], None], repeats: int) -> None:
        self.our_step = our_step
        self.repeats = repeats
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def callback(self) -> Any:
        """What TRL's trainer calls around each of its steps."""
        from transformers import TrainerCallback

        turns = self

        class Clock(TrainerCallback):
            start = 0.0

            def on_step_begin(self, *args: Any, **more: Any) -> None:
                self.start = time.perf_counter()

            def on_step_end(self, *args: Any, **more: Any) -> None:
                turns.theirs.append(time.perf_counter() - self.start)
                turns.ours.append(seconds_of(turns.our_step))

            def on_train_end(self, *args: Any, **more: Any) -> None:
                del turns.ours[0], turns.theirs[0]

        return Clock()


def _their_reward(completions: list[str], **more: Any) -> list[float | None]:
    return [reward_of(text) for text in completions]


def _their_settings(folder: str, repeats: int, at_once: int) -> Any:
    """Ours in TRL's words: one update a step, no KL, no dropout, nothing recomputed."""
    from trl import GRPOConfig

    rows = SETTINGS.questions * SETTINGS.group
    return GRPOConfig(
        output_dir=folder,
        max_steps=repeats + 1,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=rows // at_once,
        num_generations=SETTINGS.group,
        max_completion_length=SETTINGS.max_new_tokens,
        generation_kwargs={"min_new_tokens": SETTINGS.max_new_tokens},
        learning_rate=SETTINGS.lr,
        beta=SETTINGS.kl,
        epsilon=SETTINGS.clip,
        loss_type="grpo",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        log_level="error",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _prompts() -> Any:
    from datasets import Dataset

    questions = countdown.problems("train", 512, 0, countdown.ALL_OPERATORS)
    return Dataset.from_list([{"prompt": problem.prompt} for problem in questions])


def _their_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    end = countdown.VOCABULARY[END]
    return PreTrainedTokenizerFast(
        tokenizer_object=countdown.tokenizer(), eos_token=end, pad_token=end
    )
