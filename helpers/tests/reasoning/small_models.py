"""Small things that the tests of rollouts, GRPO and fine-tuning build."""

import _thread
import random

from helpers.reasoning.countdown import VOCABULARY, problems, tokenizer
from helpers.reasoning.grpo import GRPO, grpo
from helpers.reasoning.sft import SFT, sft
from helpers.reasoning.writers import answer_text, search
from helpers.tests.builders import draw
from helpers.training.corpus import END
from helpers.v3 import V3Config, checkpoint

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CONFIG = V3Config.tiny(
    vocab_size=len(VOCABULARY),
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=2,
    q_lora_rank=None,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    max_position_embeddings=96,
    initializer_range=0.15,
)
# A model that knows nothing is rewarded for its language: that differs among answers.
SETTINGS = GRPO(
    steps=6,
    questions=4,
    group=4,
    max_new_tokens=16,
    lr=3e-3,
    warmup_steps=2,
    weight_language=1.0,
)
LESSON = SFT(epochs=2, batch_size=5, lr=3e-3)
KINDS = pytest.mark.parametrize("kind", ["v3", "llama", "qwen2"])
DENSE = pytest.mark.parametrize("kind", ["llama", "qwen2"])


def dense(kind, **changes):
    """A small transformers model whose vocabulary is Countdown's."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": END,
    }
    sizes |= changes
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()


def any_model(kind):
    """A V3 whose expert biases, MTP and norms are not at their start, or a student."""
    return draw(CONFIG) if kind == "v3" else dense(kind)


def logits_of(model, tokens):
    """tokens [B, T] -> logits [B, T, V], from the whole model and without gradients."""
    with torch.no_grad():
        output = model(tokens)
    return output if isinstance(output, torch.Tensor) else output.logits


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    """The names of the tensors that are not the same in both."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def without_seconds(history):
    return {name: value for name, value in history.items() if name != "seconds"}


def lessons(n):
    """n questions with answers that somebody wrote."""
    rng = random.Random(0)
    pairs = []
    for problem in problems("train", n, 8):
        thoughts, expression = search(problem, rng, tries=2)
        pairs.append((problem.prompt, answer_text(thoughts, expression)))
    return pairs


EXAMPLES = lessons(22)


def ids_of(text):
    """A document that starts with `text`."""
    return [END, *tokenizer().encode(text).ids]


def record(monkeypatch, owner, name, keep):
    """Let `owner.name` also note what it is called with: -> the list of the notes.

    keep(*args) is what is noted of a call; arguments by name are passed on.
    """
    plain = getattr(owner, name)
    notes = []

    def noting(*args, **named):
        notes.append(keep(*args))
        return plain(*args, **named)

    monkeypatch.setattr(owner, name, noting)
    return notes


# --------------------------------------------------------------- runs that are stopped

WAYS = pytest.mark.parametrize("kind", ["grpo", "grpo with a reference", "sft"])


def train_some(kind, base, folder=None, **more):
    """Ten steps of GRPO or fine-tuning."""
    if kind == "sft":
        return sft(base, EXAMPLES, LESSON, "some", folder)
    kl = 0.1 if kind == "grpo with a reference" else 0.0
    settings = GRPO(
        steps=10,
        questions=4,
        group=4,
        max_new_tokens=16,
        lr=3e-3,
        warmup_steps=2,
        weight_language=1.0,
        refresh=4,
        kl=kl,
    )
    return grpo(base, settings, "some", folder=folder, **more)


def interrupted(monkeypatch, at, act=_thread.interrupt_main):
    """Call `act` in the midst of the optimizer step `at`, counted from 1.

    -> a list with an entry for each optimizer step begun.
    """
    steps = []
    clip = torch.nn.utils.clip_grad_norm_

    def counted(*args):
        steps.append(1)
        if len(steps) == at:
            act()
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counted)
    return steps


def power_cut():
    raise RuntimeError("power cut")


def bits(folder):
    """All that a run ends with: tensors of model and training, step and history.

    The history is without seconds.
    """
    tensors, state = checkpoint.load_training(folder)
    history = without_seconds(state["history"])
    weights = checkpoint.load(folder).state_dict()
    return weights | tensors, (state["step"], history)


def assert_same_bits(a, b):
    assert a[0].keys() == b[0].keys()
    assert a[1] == b[1]
    assert not changed(a[0], b[0])
