"""Settings, schedule, losses, history and command line of pre-training."""

import json
import math
from dataclasses import fields, replace

from helpers.evidence import facts
from helpers.tests.builders import draw, ids, small
from helpers.tests.training.small_runs import CONFIG, SETTINGS, counted, new_model
from helpers.training import loop, pretrain, runs
from helpers.training.pretrain import Settings, learning_rate
from helpers.v3 import DeepSeekV3, V3Config, checkpoint, fp8

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")


def fact(name):
    return facts.fact(f"v3.{name}").value


# ---------------------------------------------------------------------------- schedule


def test_the_learning_rate_follows_the_papers_proportions():
    # one step is a billion tokens
    peak = fact("train.lr")
    settings = Settings(steps=14800, lr=peak, warmup_steps=20)
    constant = fact("train.constant_until_tokens") / 1e9
    cosine = fact("train.cosine_tokens") / 1e9
    end_of_cosine = constant + cosine
    end_of_low = end_of_cosine + fact("train.final_tokens_1") / 1e9
    assert end_of_low + fact("train.final_tokens_2") / 1e9 == pytest.approx(14800)
    low = fact("train.final_lr_1")
    last = fact("train.final_lr_2")
    expected = (
        (0, peak / 20),
        (9, peak / 2),
        (19, peak),
        (20, peak),
        (constant - 1, peak),
        (constant + cosine / 2, (peak + low) / 2),
        (end_of_cosine + 1, low),
        (end_of_low - 1, low),
        (end_of_low + 1, last),
        (14799, last),
    )
    for step, rate in expected:
        assert learning_rate(int(step), settings) == pytest.approx(rate), step
    falling = [learning_rate(step, settings) for step in range(int(constant), 14800)]
    assert falling == sorted(falling, reverse=True)
    assert learning_rate(0, Settings(warmup_steps=0)) == Settings().lr


@pytest.mark.slow
def test_the_bias_moves_by_gamma_until_the_cosine_ends(corpus):
    settings = replace(SETTINGS, steps=60, valid_every=1)
    history = pretrain.train(new_model(), corpus, settings)
    bias = torch.tensor(history["bias"])
    load = torch.tensor(history["load"])
    for step in range(59):
        error = load[step].mean(dim=-1, keepdim=True) - load[step]
        gamma = 0.01 if step / 60 * 14.8 < 14.3 else 0.0
        moved = bias[step] + gamma * error.sign()
        assert torch.allclose(bias[step + 1], moved, atol=1e-6), step
    assert torch.equal(bias[59], bias[58])
    assert not torch.equal(bias[58], bias[57])


@pytest.mark.slow
def test_the_mtp_weight_changes_where_the_constant_phase_ends(corpus):
    # the steps before 6 * 10 / 14.8 = 4.05, so the first five
    settings = replace(SETTINGS, steps=6, warmup_steps=0, valid_every=1)

    def valid_losses(**changes):
        changed = replace(settings, **changes)
        return pretrain.train(new_model(), corpus, changed)["valid_loss"]

    plain = valid_losses()
    last = valid_losses(mtp_lambda_last=50.0)
    first = valid_losses(mtp_lambda=50.0)
    assert plain[:5] == last[:5]
    assert plain[5] != last[5]
    assert first[0] != plain[0]


# -------------------------------------------------------------------- losses, measures


def test_losses_are_the_papers_means():
    model = draw(small(num_nextn_predict_layers=2)).train()
    tokens = ids(model.config, 2, 10)
    main, mtp, balance, routings = pretrain.losses(model, tokens)
    text = tokens[:, :-1]
    model.eval()
    hidden, trunk = model.trunk(text)
    further, rest = model.predict_further(hidden, text)
    by_hand = []
    for k, logits in enumerate([model.lm_head(hidden), *further]):
        scores = logits.log_softmax(dim=-1)
        total = 0.0
        for b in range(2):
            for i in range(9 - k):
                total -= scores[b, i, tokens[b, i + k + 1]].item()
        by_hand.append(total / (2 * (9 - k)))
    assert main.item() == pytest.approx(by_hand[0], rel=1e-5)
    assert mtp.item() == pytest.approx(sum(by_hand[1:]) / 2, rel=1e-5)

    assert len(routings) == len(model.routers()) == 4
    balances = [found.balance_loss(model.config).item() for found in trunk + rest]
    assert balance.item() == pytest.approx(sum(balances), rel=1e-5)
    assert min(balances) > 0
    for mine, theirs in zip(routings, trunk + rest, strict=True):
        assert torch.equal(mine.load(), theirs.load())
    one_by_one = pretrain.evaluate(model, tokens, batch_size=1)
    assert one_by_one == pytest.approx(main.item(), rel=1e-5)


def test_a_dense_model_without_mtp_has_one_loss():
    config = small(num_nextn_predict_layers=0, first_k_dense_replace=3)
    model = DeepSeekV3(config)
    found = pretrain.losses(model, ids(config, 2, 10))
    assert found.mtp.item() == 0
    assert found.balance.item() == 0
    assert found.routings == []


def test_the_balance_loss_of_a_batch_is_pooled(monkeypatch):
    model = draw(small(seq_aux=False))
    tokens = ids(model.config, 2, 10)
    alone = pretrain.losses(model, tokens)
    twice = pretrain.losses(model, tokens, pool=lambda counts: 2 * counts)
    assert twice.balance.item() == pytest.approx(2 * alone.balance.item(), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_leaves_the_mode_and_the_gradients_as_they_are(corpus, training):
    model = new_model().train(training)
    pretrain.losses(model, corpus.batch(0, 0, 2, 17)).main.backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    pretrain.evaluate(model, corpus.valid_batch(3, 17))
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert model.training is training
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_max_violation_by_hand():
    assert pretrain.max_violation(torch.tensor([4.0, 2, 1, 1])) == pytest.approx(1.0)
    assert pretrain.max_violation(torch.full((5,), 3.0)) == 0.0
    assert pretrain.max_violation(torch.zeros(4)) == -1.0


# ----------------------------------------------------------------------------- history


def test_the_history_has_an_entry_per_step_and_snapshots(corpus):
    model = new_model()
    settings = replace(SETTINGS, steps=10)
    history = pretrain.train(model, corpus, settings)
    assert history["seconds"] > 0
    for name in ("loss", "mtp_loss", "lr", "max_violation"):
        assert len(history[name]) == 10
    for name in ("valid_step", "valid_loss", "load", "bias"):
        assert len(history[name]) == 3
    assert len(history) == 10  # these, the seconds and the provenance
    assert history["valid_step"] == [4, 8, 10]
    assert history["lr"] == [learning_rate(step, settings) for step in range(10)]
    last = torch.tensor(history["load"][-1])
    assert last.shape == (2, 8)
    assert last[0].sum() == 2 * 16 * 3
    assert last[1].sum() == 2 * 15 * 3  # the MTP layer sees one token less
    violations = [pretrain.max_violation(load) for load in last]
    assert history["max_violation"][-1] == pytest.approx(sum(violations) / 2)
    expected = pretrain.evaluate(model, corpus.valid_batch(3, 17))
    assert history["valid_loss"][-1] == expected


@pytest.mark.slow
def test_the_loss_goes_down_on_a_small_text(corpus):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    model = new_model()
    after = torch.random.get_rng_state()
    settings = replace(SETTINGS, steps=60, batch_size=4, valid_every=60, lr=1e-2)
    history = pretrain.train(model, corpus, settings)
    assert torch.equal(after, torch.random.get_rng_state())
    assert not torch.equal(after, state)
    assert history["loss"][0] > 5
    assert sum(history["loss"][-5:]) / 5 < 3
    assert history["valid_loss"][0] < 3.5
    assert history["mtp_loss"][-1] < history["mtp_loss"][0] - 1
    assert not model.training


def test_only_an_fp8_run_keeps_its_moments_as_bf16_numbers(corpus):
    for recipe in (None, fp8.Recipe()):
        model = new_model()
        if recipe is not None:
            fp8.convert(model, recipe)
        trainer = pretrain.Pretrainer(model, corpus, SETTINGS, pretrain.World())
        for step in range(2):
            trainer.gradients(step)
            trainer.update(step)
        rounded = True
        for state in trainer.optimizer.state.values():
            for moment in (state["exp_avg"], state["exp_avg_sq"]):
                assert moment.dtype == torch.float32
                rounded = rounded and torch.equal(moment, moment.bfloat16().float())
        assert rounded == (recipe is not None)


@pytest.mark.slow
def test_run_caches_under_the_home_folder(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("V3LAB_HOME", str(tmp_path))
    state = torch.random.get_rng_state()
    asked = counted(corpus, monkeypatch)

    def folders():
        paths = runs.cache_dir().iterdir()
        return [path.name for path in paths if path.is_dir()]

    first, history = pretrain.run(CONFIG, corpus, SETTINGS, "My Run")
    assert len(asked) == 12
    assert [name.rsplit("-", 1)[0] for name in folders()] == ["my-run"]
    again, same = pretrain.run(CONFIG, corpus, SETTINGS, "My Run")
    assert len(asked) == 12
    assert same == history
    for mine, theirs in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    pretrain.run(CONFIG, corpus, replace(SETTINGS, steps=3, seed=1), "My Run")
    assert len(asked) == 15
    assert len(folders()) == 2
    rounded, _ = pretrain.run(CONFIG, corpus, SETTINGS, "My Run", fp8.Recipe())
    assert fp8.recipe_of(rounded) == fp8.Recipe()
    assert len(folders()) == 3
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_corpus_or_length_that_does_not_fit_is_named(corpus, tmp_path):
    long = CONFIG.with_(max_position_embeddings=10**6)
    cases = (
        (CONFIG.with_(vocab_size=200), SETTINGS, "vocab_size=200.*300"),
        (CONFIG, replace(SETTINGS, length=1), "length=1.*num_nextn_predict_layers=1"),
        (CONFIG, replace(SETTINGS, length=65), "max_position_embeddings=64"),
        (long, replace(SETTINGS, length=10**6 - 1), "window of 1000000 tokens"),
    )
    for config, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            pretrain.train(DeepSeekV3(config), corpus, settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_text_that_is_too_short_to_validate_on_is_named(corpus):
    settings = replace(SETTINGS, length=60)
    corpus.valid = corpus.valid[:30]
    with pytest.raises(ValueError, match="window of 61 tokens.*validation"):
        pretrain.train(new_model(), corpus, settings)


# ---------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "1", None, True])
def test_a_setting_that_cannot_work_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        Settings(**{name: value})


COUNTS = ["steps", "batch_size", "length", "valid_every", "valid_sequences"]


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_of_zero_or_a_fraction_is_named(name):
    for value in (0, 1.5):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            Settings(**{name: value})


def test_the_defaults_are_the_papers_where_they_carry_over():
    defaults = Settings()
    for name in ("beta1", "beta2", "weight_decay", "grad_clip", "alpha"):
        assert getattr(defaults, name) == fact(f"train.{name}")
    assert defaults.mtp_lambda == fact("train.lambda_first")
    assert defaults.mtp_lambda_last == fact("train.lambda_last")
    assert fact("tokens") / 1e12 == pretrain.TOTAL
    assert fact("train.constant_until_tokens") / 1e12 == pretrain.CONSTANT
    assert fact("train.gamma_tokens") / 1e12 == pretrain.COSINE
    assert fact("train.lr") == pretrain.V3_PEAK
    assert fact("train.final_lr_2") == pretrain.V3_LAST
    scaled = 0.006 * math.sqrt(7168 / 128)
    assert V3Config.tiny().initializer_range == pytest.approx(scaled, rel=0.01)


# ------------------------------------------------------------------------ command line


@pytest.fixture
def ask(monkeypatch, capsys, tmp_path):
    """Call `main` with these words; -> its exit code and what it printed."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["pretrain", *map(str, words)])
        code = 0
        try:
            pretrain.main()
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


SMALL_RUN = (
    *("--steps", 3, "--batch-size", 2, "--length", 16),
    *("--valid-sequences", 3, "--warmup-steps", 0),
)


@pytest.fixture
def words(texts, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG.to_hf()), encoding="utf-8")
    return ("--text", texts, "--config", config, *SMALL_RUN)


def test_the_command_line_has_a_flag_with_help_for_every_setting(ask):
    code, help_text, _ = ask("--help")
    assert code == 0
    for field in (*fields(Settings), *fields(pretrain.CommandLine)):
        assert f"--{field.name.replace('_', '-')} " in help_text
        assert field.metadata["help"].split()[-1] in help_text


@pytest.mark.slow
def test_the_command_line_trains_and_ends_in_one_line(ask, words, tmp_path):
    out = tmp_path / "run"
    code, printed, _ = ask("--out", out, *words, "--lr", "1e-3", "--save-every", 1)
    assert code == 0
    [line] = printed.splitlines()
    assert line.startswith("validation loss ")
    assert line.endswith(f"checkpoint in {checkpoint.resolve(out)}")
    state = checkpoint.load_training(out).state
    assert state["settings"]["lr"] == 1e-3
    assert state["step"] == 3
    made = state["history"]["provenance"]["code"]
    assert made == runs.code_hash("helpers.training.pretrain")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lr", "nan"), "lr=nan cannot work"),
        (("--steps", 0), "steps=0 cannot work"),
        (("--save-every", 0), "save_every=0 cannot work"),
        (("--max-bytes", -1), "max_bytes=-1 cannot work"),
        (("--ep", 2), "ep=2 cannot work"),
        (("--surprise", 2), "--surprise"),
        (("--config", "nowhere.json"), "nowhere.json"),
        (("--text", "nowhere"), "nowhere"),
        (("--lr", "1e30"), "TrainingDiverged: loss is"),
    ],
)
def test_what_is_wrong_is_one_line(ask, words, tmp_path, more, message):
    code, printed, errors = ask("--out", tmp_path / "run", *words, *more)
    assert code == 1
    assert printed == ""
    last = errors.splitlines()[-1]
    assert message in last
    assert "Traceback" not in errors


def test_a_config_that_is_no_json_is_one_line(ask, words, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    code, _, errors = ask("--out", tmp_path / "run", *words, "--config", broken)
    assert code == 1
    assert len(errors.splitlines()) == 1


def test_an_interrupt_ends_with_130_and_one_line(ask, words, tmp_path, monkeypatch):
    def interrupted(*args, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain.text, "load", interrupted)
    code, printed, errors = ask("--out", tmp_path / "run", *words)
    assert (code, printed) == (130, "")
    assert errors == "stopped before the first step\n"

    def stopped(*args, **more):
        raise loop.Stopped("stopped after step 2 of 3: and so on")

    monkeypatch.setattr(pretrain.text, "load", stopped)
    code, _, errors = ask("--out", tmp_path / "run", *words)
    assert code == 130
    assert errors == "stopped after step 2 of 3: and so on\n"


@pytest.mark.slow
def test_another_run_in_the_folder_is_one_line_in_the_shell(shell, never_stopped):
    code, printed = shell.finish(shell.folder / "whole", "--lr", 0.1)
    assert code == 1
    assert "Traceback" not in printed
    assert "another settings" in printed.splitlines()[-1]


@pytest.mark.slow
def test_a_config_and_a_folder_beyond_ascii_are_read_in_a_plain_locale(shell, tmp_path):
    config = CONFIG.to_hf() | {"_name_or_path": "größe/深度求索"}
    path = tmp_path / "config.json"
    text = json.dumps(config, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    out = tmp_path / "run"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    more = ("--config", path, "--steps", 2)
    code, printed = shell.finish(out, *more, **plain)
    assert code == 0, printed
    assert "validation loss" in printed
