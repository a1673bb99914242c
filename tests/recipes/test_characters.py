import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxseq import losses
from jaxseq.recipes import characters
from jaxseq.training import corpus, data, language, runs
from jaxseq.training.errors import UserError
from jaxseq.training.progress import Progress


def test_the_model_is_the_stack_that_the_config_says():
    config = characters.Config(embedding_size=4, hidden_size=8, layers=2, dropout=0.5)
    shown = " ".join(repr(layer) for layer in characters.model(config, 11).layers)
    assert shown == (
        "Embed(vocab_size=11, size=4) LSTM(input_size=4, hidden_size=8) Dropout(rate=0.5) "
        "LSTM(input_size=8, hidden_size=8) Dropout(rate=0.5) Dense(input_size=8, output_size=11)"
    )


def test_gradients_are_clipped_and_the_rate_rises_and_falls():
    adam = characters.optimizer(characters.Config(learning_rate=0.1, warmup=0.5, clip=1.0), steps=4)
    weights = jnp.zeros(2)
    state, steps = adam.init(weights), []
    for _ in range(4):
        update, state = adam.update(jnp.array([3e6, 4e6]), state, weights)
        steps.append(-float(update[0]))
    np.testing.assert_allclose(steps, [0.0, 0.05, 0.1, 0.05], atol=1e-4)
    mean = state[1][0].mu  # of Adam: (1 - 0.9⁴) of a gradient of norm 1
    np.testing.assert_allclose(jnp.linalg.norm(mean), 1 - 0.9**4, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, r"--batch must be at least 1 and less than 2\*\*31, got 0"),
        ({"save_every": -1}, "--save-every must be at least 1"),
        ({"learning_rate": 0.0}, "--learning-rate must be more than 0"),
        ({"learning_rate": float("nan")}, "--learning-rate must be more than 0"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and less than 1"),
        ({"warmup": 1.5}, "--warmup must be between 0 and 1"),
        ({"test_fraction": float("nan")}, "--test-fraction must be at least 0, got nan"),
        ({"seed": 99999999999999999999999}, "--seed must be at least 0 and less than 2"),
        ({"seed": -1}, "--seed must be at least 0 and less than 2"),
        ({"sample_characters": 0}, "--sample-characters must be at least 1"),
        ({"sample_characters": 9 * 10**18}, "--sample-characters must be at least 1 and at most 10,000,000"),
        ({"epochs": 99999999999}, r"--epochs must be at least 1 and less than 2\*\*31"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(change: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        characters.check(dataclasses.replace(characters.Config(), **change))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> corpus.Corpus:
    """A text whose validation part has characters that its training part has not."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on the mat. " * 12 + "THE CAT sat; on. the mat" + "and the rat sat too, ok!")
    return corpus.read(path, (288 / 336, 24 / 336, 24 / 336))


def test_what_samples_begin_with_and_what_is_said_of_the_text(text: corpus.Corpus, tmp_path: pathlib.Path, capsys):
    config = characters.Config(text=pathlib.Path("text.txt"))
    run = runs.create(
        tmp_path / "run", {**characters._about(config, text), "versions": {"python": "2.7", "jax": "0.1"}}
    )
    assert run.about["opening"] == "  sat on. the matan the at sat t"  # no capitals, ;, d and r
    assert characters.stored_config(runs.open_run(run.path)) == dataclasses.replace(
        config, text=pathlib.Path("text.txt").absolute(), resume=run.path
    )
    characters._introduce(run, text, Progress())
    said = capsys.readouterr().out
    assert "11 different ones to learn, others: 7 in validation, 5 in test" in said
    assert "this run began with python 2.7, jax 0.1: with other versions" in said and "{" not in said


def test_the_baselines_score_the_unknown_character_too(text: corpus.Corpus):
    assert text.cuts == (288, 312, 336) and "T" not in text.vocabulary.characters
    start, stop = text.scored["validation"]
    assert (text.tokens[start:stop] == 0).sum() == 7  # THE CAT without its space, and ;
    bits = corpus.baselines(text)
    assert set(bits) == {"validation", "test"} and set(bits["test"]) == {"unigram", "5-gram"}
    assert all(np.isfinite(value) for part in bits.values() for value in part.values())


def test_texts_too_short_for_three_parts_are_refused(tmp_path: pathlib.Path):
    (tmp_path / "text.txt").write_text("abc")
    with pytest.raises(UserError, match=r"is too short: its 3 characters leave a part empty"):
        corpus.read(tmp_path / "text.txt", (0.9, 0.05, 0.05))
    with pytest.raises(UserError, match="sum to more than 1"):
        corpus.read(tmp_path / "text.txt", (0.9, 0.5, 0.05))


def test_model_and_baselines_score_the_same_characters(text: corpus.Corpus):
    """Read in windows by many readers, the score is that of one reader over the whole text."""
    config = characters.Config(embedding_size=4, hidden_size=8)
    cell = characters.model(config, text.vocabulary.size)
    params = cell.init(jax.random.key(0))
    start, stop = text.scored["validation"]
    windows = data.scoring_windows(text.tokens, start, stop, batch=4, time=7, context=start)
    got = language.score(cell, params, windows)
    _, logits = cell.unroll(params, jnp.asarray(text.tokens[: stop - 1]))
    want = losses.cross_entropy(logits, jnp.asarray(text.tokens[1:stop]))[start - 1 :].mean() / np.log(2)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_state_is_carried_between_windows_and_begins_anew_with_the_text():
    cell = characters.model(characters.Config(embedding_size=4, hidden_size=8, dropout=0.0), 5)
    still = characters.optimizer(characters.Config(learning_rate=1e-30), 10)
    windows = data.windows(np.arange(50) % 5, batch=3, time=4)
    step = jax.jit(language.TrainStep(cell, still))
    first = state = language.initial_state(cell, still, jax.random.key(1), batch=3)
    carries = []
    for number in range(len(windows.inputs) + 1):
        state, _ = step(state, number, (windows, jax.random.key(0)))
        carries.append(state.carry)
    stream = jnp.asarray(windows.inputs.swapaxes(0, 1).reshape(3, -1))
    whole, _ = cell.unroll(first.params, stream)
    for got, want in zip(jax.tree.leaves(carries[-2]), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert jax.tree.all(jax.tree.map(np.array_equal, carries[-1], carries[0]))


def test_the_gradient_of_a_step_is_that_of_its_window_alone():
    """With plain descent of rate 1 the change of the params is the gradient, from the state that was carried."""
    cell = characters.model(characters.Config(embedding_size=4, hidden_size=8, dropout=0.3), 5)
    windows = jax.tree.map(jnp.asarray, data.windows(np.arange(50) % 5, batch=3, time=4))
    key = jax.random.key(3)
    step = jax.jit(language.TrainStep(cell, optax.sgd(1.0)))
    before = language.initial_state(cell, optax.sgd(1.0), jax.random.key(1), 3)
    before, _ = step(before, 0, (windows, key))
    after, metrics = step(before, 1, (windows, key))

    def loss(params):
        _, logits = cell.unroll(params, windows.inputs[1], before.carry, key=jax.random.fold_in(key, 1))
        return losses.cross_entropy(logits, windows.targets[1]).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(before.params)
    np.testing.assert_allclose([metrics["loss"], metrics["bits_per_token"]], [value, value / np.log(2)], rtol=1e-5)
    for old, new, slope in zip(*map(jax.tree.leaves, (before.params, after.params, gradient)), strict=True):
        np.testing.assert_allclose(old - new, slope, atol=1e-6)
