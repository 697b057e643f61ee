"""The classes that readers write on the pages of 02 and 03 make up a whole V3.

Their cells are run as they stand on the pages. The experts are those of helpers until
01 has them written out; block, model and losses stand here until 04 has them.
"""

import ast
import math

from helpers import v3
from helpers.tests import reading
from helpers.training import pretrain

import pytest
import torch
import torch.nn.functional as F
from torch import nn

# The cells, in order: 02's attention, 03's module.
PAGES = {
    "02_latent_attention": [
        "02-attend-code",
        "02-turn",
        "02-class",
        "02-naive-absorbed",
        "02-absorbed",
        "02-forward-code",
    ],
    "03_multi_token_prediction": ["03-mtp-class"],
}
REST = '''
class Block(nn.Module):
    def __init__(self, config, dense):
        super().__init__()
        H = config.hidden_size
        self.input_layernorm = nn.RMSNorm(H, eps=config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = nn.RMSNorm(H, eps=config.rms_norm_eps)
        self.mlp = MLP(H, config.intermediate_size) if dense else MoE(config)

    def forward(self, x, rope, cache=None, layer=0):
        """x [B, T, H] -> [B, T, H], and how its tokens were routed, or None."""
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, layer)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(normed), None
        out, routing = self.mlp(normed)
        return x + out, routing


class DeepSeekV3(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        H = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, H)
        dense = config.first_k_dense_replace
        self.layers = nn.ModuleList(
            Block(config, n < dense) for n in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(H, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(H, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(
            MTP(config) for _ in range(config.num_nextn_predict_layers)
        )

    def rope(self, start, T):
        """cos + i sin of the angles of positions start, ..., start + T - 1."""
        dr = self.config.qk_rope_head_dim
        frequencies = self.config.rope_theta ** -(torch.arange(0, dr, 2) / dr)
        angles = torch.arange(start, start + T)[:, None] * frequencies
        return torch.polar(torch.ones_like(angles), angles)

    def forward(self, ids, cache=None):
        """ids [B, T] -> hidden [B, T, H], and what each MoE layer chose."""
        start = cache.length if cache else 0
        rope = self.rope(start, ids.shape[1])
        x = self.embed_tokens(ids)
        routings = []
        for n, block in enumerate(self.layers):
            x, routing = block(x, rope, cache, n)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.norm(x), routings


def losses(model, tokens):
    """tokens [B, T + 1] -> main, MTP and balance loss."""
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    hidden, routings = model(ids)
    main = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten())

    mtp = torch.zeros(())
    for k, module in enumerate(model.mtp, start=1):
        given = model.embed_tokens(ids[:, k:])
        T = given.shape[1]
        hidden, routing = module(hidden[:, :T], given, model.rope(0, T))
        routings.append(routing)
        logits = model.lm_head(hidden).flatten(0, 1)
        mtp = mtp + F.cross_entropy(logits, targets[:, k:].flatten())

    balance = torch.zeros(())
    for routing in routings:
        balance = balance + routing.balance_loss(model.config)
    return main, mtp / max(len(model.mtp), 1), balance
'''


def definitions(source: str) -> str:
    """The classes and functions of a cell, without what it tries out."""
    kept = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            kept.append(ast.unparse(node))
    return "\n".join(kept)


@pytest.fixture(scope="module")
def names():
    """All that the pages define, by name."""
    found = {"torch": torch, "nn": nn, "F": F, "math": math}
    found |= {"MLP": v3.MLP, "MoE": v3.MoE}
    for page in sorted(PAGES):
        [path] = [path for path in reading.NOTEBOOKS if path.stem == page]
        cells = {cell.id: cell.source for cell in reading.read(path).cells}
        for name in PAGES[page]:
            exec(definitions(cells[name]), found)
    exec(REST, found)
    return found


@pytest.fixture(scope="module")
def both(names):
    """The reader's model and that of helpers, with the same weights."""
    torch.manual_seed(0)
    theirs = v3.DeepSeekV3(v3.V3Config.tiny(vocab_size=300))
    ours = names["DeepSeekV3"](theirs.config)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_losses_and_gradients_are_those_of_helpers(names, both):
    ours, theirs = both
    tokens = torch.randint(300, (3, 25))
    main, mtp, balance = names["losses"](ours, tokens)
    expected = pretrain.losses(theirs, tokens)
    torch.testing.assert_close(main, expected.main)
    torch.testing.assert_close(mtp, expected.mtp)
    torch.testing.assert_close(balance, expected.balance)

    (main + 0.3 * mtp + 0.1 * balance).backward()
    (expected.main + 0.3 * expected.mtp + 0.1 * expected.balance).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name
        )


@torch.no_grad()
def test_token_by_token_through_the_cache(both):
    ours, theirs = both
    ids = torch.randint(300, (2, 12))
    cache = v3.LatentCache(theirs.config, len(ours.layers), 2, 12, ids.float())
    states = [ours(token, cache)[0] for token in ids.split(1, dim=1)]
    expected = theirs.hidden(ids)
    torch.testing.assert_close(torch.cat(states, dim=1), expected, atol=1e-4, rtol=0)
