"""The flat decoding loop beside the model's own forward pass."""

from helpers.tests.builders import draw
from helpers.v3 import V3Config, fast_decode, fp8, generate
from helpers.v3.attention import LatentCache

import pytest
import torch
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = V3Config.tiny()
CASES = {
    "tiny": {},
    "queries without a latent": {"q_lora_rank": None},
    "no shared experts": {"n_shared_experts": 0},
    "softmax gates, not normalised": {
        "scoring_func": "softmax",
        "norm_topk_prob": False,
    },
    "one group, scaled gates": {
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
    },
    "YaRN": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    },
    "all dense": {"first_k_dense_replace": TINY.num_hidden_layers},
}


@pytest.mark.parametrize("pad", [None, (3, 0, 1)], ids=["full", "padded"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_cache_are_those_of_the_model(case, rows, pad):
    model = draw(TINY.with_(**CASES[case])).eval()
    with torch.no_grad():  # weights of norms that are not 1
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.3)
    ids = torch.randint(1, TINY.vocab_size, (rows, 12))
    left = None if pad is None else torch.tensor(pad[:rows])
    caches = []
    for _ in range(2):
        cache = LatentCache(
            model.config, len(model.layers), rows, 12, model.lm_head.weight, left
        )
        caches.append(cache)
    assert fast_decode.fits(model)
    with torch.inference_mode():
        for cache in caches:
            model(ids[:, :5], cache)
        decoder = fast_decode.Decoder(model, 12)
        for i in range(5, 12):
            fast = decoder.read(ids[:, i], caches[0])
            plain = model(ids[:, i : i + 1], caches[1])[:, -1]
            assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    assert caches[0].length == caches[1].length == 12
    for fast_rows, plain_rows in zip(caches[0].rows, caches[1].rows, strict=True):
        assert_close(fast_rows, plain_rows, rtol=1e-4, atol=1e-5)


def test_it_is_used_and_writes_the_same_text(monkeypatch):
    model = draw(TINY).eval()
    ids = torch.randint(1, TINY.vocab_size, (4, 6))
    read = fast_decode.Decoder.read
    calls = []

    def counted(self, tokens, cache):
        calls.append(len(tokens))
        return read(self, tokens, cache)

    monkeypatch.setattr(fast_decode.Decoder, "read", counted)
    fast = generate(model, ids, 9)
    assert calls == [4] * 8
    monkeypatch.setattr(fast_decode, "fits", lambda model: False)
    assert torch.equal(generate(model, ids, 9), fast)
    assert calls == [4] * 8


def test_what_computes_other_numbers_or_wants_to_be_called_is_left_alone():
    model = draw(TINY).eval()
    assert fast_decode.fits(model)
    hook = model.layers[1].mlp.gate.register_forward_hook(lambda *_: None)
    assert not fast_decode.fits(model)
    hook.remove()
    assert fast_decode.fits(model)
    patched = draw(TINY)
    patched.hidden = lambda *_: None  # somebody looks on
    assert not fast_decode.fits(patched)
    assert not fast_decode.fits(draw(TINY).bfloat16())
    assert not fast_decode.fits(draw(TINY.with_(kv_lora_rank=47)))
    rounded = draw(TINY)
    fp8.convert(rounded, fp8.Recipe())
    assert not fast_decode.fits(rounded)
