"""Sampling, decoding, drafting."""

from helpers.tests.builders import draw, ids, small, theirs_of
from helpers.training import pretrain
from helpers.v3 import DeepSeekV3, decode, generate, generate_with_mtp, sample

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.usefixtures("one_thread", "same_random_numbers")


# --- generation


@pytest.mark.slow
def test_greedy_rows_of_a_batch_are_those_written_alone_and_by_the_full_forward():
    config = small()
    model, prompts = draw(config), ids(config, 5, 6)
    together = generate(model, prompts, 12)
    assert torch.equal(
        together, torch.cat([generate(model, row[None], 12) for row in prompts])
    )
    text = prompts
    for _ in range(12):
        text = torch.cat((text, model(text)[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(together, text)


def test_rows_that_wrote_eos_leave_the_batch_and_are_filled_with_it():
    config = small(vocab_size=7)
    model, prompts = draw(config), ids(config, 8, 4)
    free = generate(model, prompts, 20)
    eos = 3
    expected = free.clone()
    for row in expected:
        if len(found := (row[4:] == eos).nonzero()):
            row[4 + found[0, 0] :] = eos
    done = (expected[:, 4:] == eos).any(dim=1)
    steps = decode(model, prompts, 20, eos_token_id=eos)
    sizes = [len(step.rows) for step in steps]
    out = generate(model, prompts, 20, eos_token_id=eos)
    assert done.any() and torch.equal(out, expected[:, : out.shape[1]])
    assert out.shape[1] == 24 or done.all()
    assert sizes[0] == 8 and sizes[-1] < 8 and sizes == sorted(sizes, reverse=True)


def test_decode_gives_each_new_token_and_what_it_was_drawn_from():
    config = small()
    model = draw(config)
    prompt = ids(config, 1, 5)
    steps = list(decode(model, prompt, 9))
    written = generate(model, prompt, 9)[0, 5:].tolist()
    assert [int(step.tokens) for step in steps] == written
    assert all(torch.equal(step.logits.argmax(-1), step.tokens) for step in steps)


def test_sampled_text_repeats_with_the_generator_and_differs_without():
    config = small()
    model, prompts = draw(config), ids(config, 3, 5)

    def write(seed):
        return generate(
            model,
            prompts,
            10,
            temperature=1.0,
            generator=torch.Generator().manual_seed(seed),
        )

    assert torch.equal(write(5), write(5)) and not torch.equal(write(5), write(6))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_draws_from_the_softmax(temperature):
    logits = torch.tensor([2.0, -1.0, 0.5, float("-inf"), 1.0])
    drawn = sample(
        logits.expand(40000, 5), temperature, torch.Generator().manual_seed(0)
    )
    share = drawn.bincount(minlength=5) / 40000
    assert (
        torch.allclose(share, torch.softmax(logits / temperature, dim=0), atol=0.01)
        and share[3] == 0
    )
    assert torch.equal(sample(logits[None], 0.0), torch.tensor([0]))


@pytest.mark.parametrize(
    "tokens, more, message",
    [
        (torch.zeros(1, 60, dtype=torch.long), {}, "max_position_embeddings=64"),
        (
            torch.zeros(1, 65, dtype=torch.long),
            {"max_new_tokens": 0},
            "max_position_embeddings=64",
        ),
        (torch.tensor([[1, 61]]), {}, "input_ids.*vocab_size=61"),
        (torch.tensor([[1, -1]]), {}, "input_ids.*0..60"),
        (torch.zeros(3, dtype=torch.long), {}, "input_ids"),
        (torch.zeros(1, dtype=torch.long), {"max_new_tokens": 0}, "input_ids"),
        (torch.zeros(1, 0, dtype=torch.long), {}, "input_ids"),
        (torch.zeros(1, 1, 3, dtype=torch.long), {}, "input_ids"),
        (torch.zeros(1, 3), {}, "input_ids"),
        (
            torch.zeros(1, 3, dtype=torch.long),
            {"max_new_tokens": -1},
            "max_new_tokens=-1",
        ),
        (
            torch.zeros(1, 3, dtype=torch.long),
            {"temperature": -0.1},
            "temperature=-0.1",
        ),
        (
            torch.zeros(1, 3, dtype=torch.long),
            {"temperature": float("nan")},
            "temperature=nan",
        ),
        (
            torch.zeros(2, 3, dtype=torch.long),
            {"pad": torch.tensor([0, 3])},
            r"pad=\[0, 3\].*0 to 2",
        ),
        (torch.zeros(2, 3, dtype=torch.long), {"pad": torch.tensor([0])}, r"pad=\[0\]"),
    ],
)
def test_generate_says_what_is_wrong_with_its_input(tokens, more, message):
    model = draw(small())
    with pytest.raises(ValueError, match=message):
        generate(model, tokens, **({"max_new_tokens": 5} | more))
    if not {"temperature", "pad"} & set(more):
        with pytest.raises(ValueError, match=message):
            generate_with_mtp(model, tokens, **({"max_new_tokens": 5} | more))


def test_drafting_needs_one_row_and_an_mtp_module():
    one = torch.zeros(1, 3, dtype=torch.long)
    for model, tokens in (
        (draw(small()), one.expand(2, 3)),
        (draw(small(num_nextn_predict_layers=0)), one),
    ):
        with pytest.raises(ValueError, match="one row.*num_nextn_predict_layers"):
            generate_with_mtp(model, tokens, 5)


@torch.no_grad()
def test_the_context_may_be_filled_to_its_end():
    config = small(max_position_embeddings=16)
    model = draw(config)
    assert generate(model, ids(config, 1, 10), 6).shape == (
        1,
        16,
    ) and generate_with_mtp(model, ids(config, 1, 10), 6)[0].shape == (1, 16)
    with pytest.raises(ValueError, match="17 tokens.*max_position_embeddings=16"):
        model(ids(config, 1, 17))


def toy_text(batch, length, generator):
    """Rows made of four phrases in random order: partly to be foreseen, partly not."""
    phrases = torch.tensor(
        [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 3, 12, 13, 14], [15, 16, 2, 17, 18]]
    )
    return phrases[
        torch.randint(4, (batch, length // 5 + 1), generator=generator)
    ].flatten(1)[:, :length]


@pytest.fixture(scope="module")
def toy_model():
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(3)
    config = small(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        initializer_range=0.08,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
    )
    model = DeepSeekV3(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        main, mtp, *_ = pretrain.losses(model, toy_text(8, 41, generator))
        optimizer.zero_grad()
        (main + 0.3 * mtp).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_drafting_writes_and_accepts_what_transformers_does(
    toy_model, tmp_path, ignore_mtp_layers
):
    ignore_mtp_layers(toy_model.config)
    theirs = theirs_of(toy_model, tmp_path)
    counts = [0, 0]
    for seed in range(4):
        prompt = toy_text(1, 7 + seed, torch.Generator().manual_seed(seed))
        text, counted = generate_with_mtp(toy_model, prompt, 40, eos_token_id=0)
        assert torch.equal(text, generate(toy_model, prompt, 40, eos_token_id=0))
        forwards = []
        hook = theirs.model.register_forward_hook(
            lambda *_, seen=forwards: seen.append(1)
        )
        other = theirs.generate(
            prompt,
            max_new_tokens=40,
            use_mtp=True,
            do_sample=False,
            eos_token_id=0,
            pad_token_id=0,
        )
        hook.remove()
        assert torch.equal(text, other)
        assert counted.forwards == len(forwards)
        assert (
            counted.forwards == counted.drafted + 1
            and text.shape[1] - prompt.shape[1] == counted.forwards + counted.accepted
        )
        counts = [counts[0] + counted.accepted, counts[1] + counted.drafted]
    assert 0 < counts[0] < counts[1]


@pytest.mark.slow
def test_swapped_halves_of_eh_proj_lose_accepted_drafts_but_not_the_text(
    toy_model, monkeypatch
):
    prompt = toy_text(1, 8, torch.Generator().manual_seed(0))
    text, counted = generate_with_mtp(toy_model, prompt, 40)
    weight = toy_model.mtp[0].eh_proj.weight
    monkeypatch.setattr(weight, "data", weight.data.roll(weight.shape[1] // 2, dims=1))
    other, swapped = generate_with_mtp(toy_model, prompt, 40)
    assert (
        torch.equal(text, other)
        and swapped.accepted < counted.accepted
        and swapped.forwards > counted.forwards
    )


@pytest.mark.slow
def test_drafting_stops_at_the_first_eos_and_at_the_asked_length(toy_model):
    prompt = toy_text(1, 8, torch.Generator().manual_seed(1))
    whole = generate(toy_model, prompt, 30)
    for length in range(6):
        assert torch.equal(
            generate_with_mtp(toy_model, prompt, length)[0], whole[:, : 8 + length]
        )
    for eos in whole[0, 8:].unique().tolist():
        text, _ = generate_with_mtp(toy_model, prompt, 30, eos_token_id=eos)
        assert torch.equal(text, generate(toy_model, prompt, 30, eos_token_id=eos))
        assert text[0, -1] == eos and eos not in text[0, 8:-1]


# --- prompts of different lengths, small integers, numbers that are none


@pytest.mark.slow
@pytest.mark.parametrize("eos", [None, 3])
def test_left_padded_prompts_are_continued_as_if_alone(eos):
    config = small(vocab_size=7)
    model = draw(config)
    lengths = [9, 4, 6, 1, 9]
    prompts = [ids(config, 1, n, seed=n) for n in lengths]
    width = max(lengths)
    rows = [
        F.pad(prompt, (width - n, 0), value=5)
        for prompt, n in zip(prompts, lengths, strict=True)
    ]
    pad = torch.tensor([width - n for n in lengths])
    together = generate(model, torch.cat(rows), 12, eos_token_id=eos, pad=pad)
    for row, prompt in zip(together, prompts, strict=True):
        alone = generate(model, prompt, 12, eos_token_id=eos)[0, prompt.shape[1] :]
        written = row[width : width + len(alone)]
        assert torch.equal(written, alone)


def test_logits_of_left_padded_prompts_are_those_of_each_alone():
    config = small()
    model = draw(config)
    prompt = ids(config, 1, 5)
    padded = F.pad(prompt, (3, 0), value=60)
    both = torch.cat((padded, ids(config, 1, 8)))
    steps = decode(model, both, 6, pad=torch.tensor([3, 0]))
    for step, alone in zip(steps, decode(model, prompt, 6), strict=True):
        assert torch.allclose(step.logits[0], alone.logits[0], atol=1e-5)


def test_ids_of_32_bits_are_continued_like_those_of_64():
    config = small()
    model = draw(config)
    prompts = ids(config, 3, 5)
    short = generate(model, prompts.int(), 6, eos_token_id=2)
    assert short.dtype == torch.int32
    assert torch.equal(short.long(), generate(model, prompts, 6, eos_token_id=2))
    drafted, _ = generate_with_mtp(model, prompts[:1].int(), 6)
    assert torch.equal(drafted.long(), generate(model, prompts[:1], 6))


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1e-300, 1e-6])
def test_a_tiny_temperature_takes_the_largest(temperature):
    logits = torch.tensor([[3.0, 5.0, 1.0, 0.0]])
    assert sample(logits, temperature).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_are_an_error_that_says_so(temperature, bad):
    good = torch.randn(1, 4)
    worse = torch.full((1, 4), bad)
    if bad == bad and bad > 0 or bad != bad:
        worse = torch.tensor([[1.0, bad, 0.0, 2.0]])
    with pytest.raises(ValueError, match="logits hold NaN or infinity"):
        sample(torch.cat((good, worse)), temperature)


def test_decoding_one_row_takes_one_thread_and_gives_the_others_back(monkeypatch):
    config = small()
    model = draw(config)
    torch.set_num_threads(2)
    seen = []
    hidden = model.hidden

    def watched(*args):
        seen.append(torch.get_num_threads())
        return hidden(*args)

    monkeypatch.setattr(model, "hidden", watched)
    generate(model, ids(config, 1, 5), 3)
    assert set(seen) == {1} and torch.get_num_threads() == 2
    seen.clear()
    generate(model, ids(config, 2, 5), 3)
    assert set(seen) == {2}
    torch.set_num_threads(1)
