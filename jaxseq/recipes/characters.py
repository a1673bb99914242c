"""A character language model: learns from any text to write more of it."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import platform
import shlex
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxseq import plots
from jaxseq.cells.lstm import LSTM
from jaxseq.cells.pointwise import Dense, Embed
from jaxseq.combinators.noise import Dropout
from jaxseq.combinators.stack import Stack
from jaxseq.core.serialization import to_json
from jaxseq.training import checkpoints, corpus, data, language, loop, runs, writing
from jaxseq.training.errors import UserError, require, require_flag
from jaxseq.training.progress import Progress
from jaxseq.training.signals import Stopped
from jaxseq.training.text import Vocabulary, with_newlines


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a character language model on a text. Ctrl-C stops it and saves; --resume RUN goes on."""

    text: pathlib.Path | None = None
    """A UTF-8 text file, or a folder of them; by default the language reference that comes with Python."""
    run: pathlib.Path | None = None
    """The new folder of this run; by default the first free one of runs/characters-1, -2 and so on."""
    resume: pathlib.Path | None = None
    """The folder of a run to continue exactly as it was; other flags must be those of that run."""
    train_fraction: float = 0.9
    """The part of the text to learn from, from its beginning."""
    validation_fraction: float = 0.05
    """The part after it, scored whenever a checkpoint is saved."""
    test_fraction: float = 0.05
    """The part after that, scored once at the end."""
    embedding_size: int = 64
    """Features of each character."""
    hidden_size: int = 320
    """Hidden units of each LSTM layer."""
    layers: int = 1
    """How many LSTM layers there are."""
    dropout: float = 0.25
    """The probability with which each output of an LSTM layer is dropped while training."""
    batch: int = 32
    """How many places of the text are read side by side."""
    time: int = 64
    """Characters in a window: how far gradients flow back; the state is carried further."""
    epochs: int = 12
    """How many times the training part is read."""
    learning_rate: float = 5e-3
    """Adam's step size at its highest."""
    warmup: float = 0.05
    """The part of the training in which the learning rate rises from 0; after it, it falls to 0 as a cosine."""
    clip: float = 1.0
    """The norm to which larger gradients are scaled down."""
    seed: int = 0
    """For the first parameters, dropout and the samples."""
    log_every: int = 10
    """Steps, one window each, between two lines of metrics.jsonl."""
    save_every: int = 200
    """Steps between two checkpoints, each with a validation score and a sample."""
    keep: int = 3
    """How many checkpoints stay on the disk."""
    sample_characters: int = 200
    """The length of the samples written while training."""


def check(config: Config) -> None:
    """Raises UserError, naming the flag, if a number of the config makes no sense."""
    counts = ("embedding_size", "hidden_size", "layers", "batch", "time", "epochs", "log_every", "save_every", "keep")
    for name in counts:
        require_flag(config, 1 <= getattr(config, name) < 2**31, name, "at least 1 and less than 2**31")
    for name in ("learning_rate", "clip", "train_fraction", "validation_fraction"):
        require_flag(config, 0 < getattr(config, name) < math.inf, name, "more than 0")
    require_flag(config, 0 <= config.test_fraction < math.inf, "test_fraction", "at least 0")
    require_flag(config, 0 <= config.dropout < 1, "dropout", "at least 0 and less than 1")
    require_flag(config, 0 <= config.warmup <= 1, "warmup", "between 0 and 1")
    writing.check_length(config, "sample_characters")
    writing.check_seed(config)


def model(config: Config, vocab_size: int) -> Stack:
    """The model: an embedding, LSTM layers with dropout after each, and the logits of the next character."""
    cells, size = [], config.embedding_size
    for _ in range(config.layers):
        cells += [LSTM(size, config.hidden_size), Dropout(config.dropout)]
        size = config.hidden_size
    return Stack((Embed(vocab_size, config.embedding_size), *cells, Dense(size, vocab_size)))


def optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Adam with the gradient's norm clipped, and a learning rate that rises linearly and falls as a cosine."""
    return _adam(config.learning_rate, round(config.warmup * steps), steps, config.clip)


@functools.cache
def _adam(learning_rate: float, warmup: int, steps: int, clip: float) -> optax.GradientTransformation:
    # once for equal numbers, so that equal training steps compile once
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps)
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(rate))


def train(config: Config) -> runs.Run:
    """Trains a model in a new run folder, or goes on with the run `config.resume`; returns the run.

    The folder holds `config.json`, `metrics.jsonl` (training loss, validation and at last test bits per character),
    `loss.png`, `samples.txt` and `checkpoints/`.

    Raises:
        UserError: if the config, the text or the run folder is unusable, the text of a run that goes on has changed,
            or the disk is full.
        Stopped: after Ctrl-C or SIGTERM, when the state is saved.
    """
    for package in ("orbax.checkpoint", "rich.progress", "matplotlib.figure"):  # rather now than at the first use
        require(package)
    run = None
    if config.resume is not None:
        run = runs.open_run(config.resume)
        config = stored_config(run)
    check(config)
    text = corpus.read(config.text, (config.train_fraction, config.validation_fraction, config.test_fraction))
    windows = data.windows(text.train, config.batch, config.time, "character")
    most = (2**31 - 1) // len(windows.inputs)
    require_flag(config, config.epochs <= most, "epochs", f"at most {most:,} for less than 2**31 steps with this text")
    if run is None:
        run = runs.create(config.run or runs.next_free(pathlib.Path("runs"), "characters"), _about(config, text))
    elif run.about["text"]["sha256"] != text.source.fingerprint():
        raise UserError(f"{text.source.source} is no longer the text that {run.path} began with")
    progress = Progress("characters", config.batch * config.time)
    _introduce(run, text, progress)
    try:
        _fit(config, text, windows, run, progress)
    except Stopped as stopped:
        progress.say(f"stopped and saved after step {stopped.step}: continue with {_to_resume(run)}")
        raise
    _conclude(run, progress)
    return run


def _fit(config: Config, text: corpus.Corpus, windows: data.Windows, run: runs.Run, progress: Progress) -> None:
    cell, steps = model(config, text.vocabulary.size), config.epochs * len(windows.inputs)
    adam = optimizer(config, steps)
    init_key, noise_key, sample_key = jax.random.split(jax.random.key(config.seed), 3)
    parts = {
        name: data.scoring_windows(text.tokens, *span, batch=config.batch, time=config.time, context=config.time)
        for name, span in text.scored.items()
    }

    def before_save(step: int, state: language.TrainState) -> None:
        bits = float(language.score(cell, state.params, parts["validation"]))
        run.record({"step": step, "validation_bits_per_character": bits})
        sampling = writing.Sampling(run.about["opening"], config.sample_characters)
        sample = writing.write(cell, state.params, text.vocabulary, sampling, jax.random.fold_in(sample_key, step))
        run.write_sample(f"--- step {step}, validation {bits:.3f} bits per character\n{sample}\n\n")
        progress.say(f"step {step} of {steps}: validation {bits:.3f} bits per character; it writes:\n{sample}\n")
        _plot(run)

    state = loop.fit(
        language.TrainStep(cell, adam, unit="character"),
        language.initial_state(cell, adam, init_key, config.batch),
        (jax.tree.map(jnp.asarray, windows), noise_key),
        plan=loop.Plan(steps, config.log_every, config.save_every, config.keep),
        run=run,
        before_save=before_save,
        progress=progress,
    )
    if "test" in parts:
        run.record({"step": steps, "test_bits_per_character": float(language.score(cell, state.params, parts["test"]))})


def _about(config: Config, text: corpus.Corpus) -> dict[str, Any]:
    """What a run folder says of itself in `config.json`; sampling needs it, and so does going on."""
    values = _flags(config)
    if config.text is not None:
        values["text"] = str(config.text.absolute())
    source = text.source
    return {
        "recipe": "characters",
        "config": values,
        "text": {
            "source": source.source,
            "sha256": source.fingerprint(),
            "characters": len(source.content),
            "cuts": text.cuts,
            "unknown": {name: int((text.tokens[slice(*span)] == 0).sum()) for name, span in text.scored.items()},
            "skipped_files": source.skipped,
        },
        "baseline_bits": corpus.baselines(text),
        "vocabulary": text.vocabulary.characters,
        "opening": _opening(text),
        "model": json.loads(to_json(model(config, text.vocabulary.size))),
        "versions": _versions(),
    }


def _flags(config: Config) -> dict[str, Any]:
    """The fields that make a run what it is: all but where it is."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in ("run", "resume")}


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "jax": jax.__version__}


def _opening(text: corpus.Corpus) -> str:
    """The first characters of the validation part that the model knows."""
    known = (symbol for symbol in text.source.content[text.cuts[0] :] if symbol in text.vocabulary.characters)
    return "".join(itertools.islice(known, 32))


def _to_resume(run: runs.Run) -> str:
    return shlex.join(["jaxseq", "train", "characters", "--resume", str(run.path)])


def _form(flag: Any) -> Any:
    """The form in `config.json` of a flag with this default."""
    return (str, type(None)) if flag is None else type(flag)


_BITS = {"5-gram": float, ...: float}
# of what is read from config.json again
_FORM = {
    "config": {name: _form(flag) for name, flag in _flags(Config()).items()},
    "text": {"source": str, "sha256": str, "characters": int, "unknown": {...: int}, "skipped_files": [str]},
    "baseline_bits": {"validation": _BITS, ...: _BITS},
    "vocabulary": str,
    "opening": str,
    "versions": {...: str},
}


def stored_config(run: runs.Run) -> Config:
    """The config that a run began with, with `resume` as its folder.

    Raises:
        UserError: if it is the run of another recipe, or of a version with other flags, or `config.json` lacks
            something or has a value of another kind.
    """
    if run.about.get("recipe") != "characters":
        raise UserError(f"{run.path} is not a run of the recipe characters")
    run.check({"config": dict})
    values = dict(run.about["config"])
    if values.keys() != _flags(Config()).keys():
        raise UserError(f"{run.path} is a run of another version of jaxseq: its flags were {', '.join(values)}")
    run.check(_FORM)
    vocabulary = Vocabulary(run.about["vocabulary"])
    if vocabulary != Vocabulary.of(vocabulary.characters) or vocabulary.missing(run.about["opening"]):
        raise UserError(
            f"config.json of {run.path} needs a vocabulary in order, each character once, and an opening out of it"
        )
    text = values.pop("text")
    return Config(**values, text=text and pathlib.Path(text), resume=run.path)


def _introduce(run: runs.Run, text: corpus.Corpus, progress: Progress) -> None:
    about = run.about["text"]
    train, validation, test = (end - start for start, end in zip((0, *text.cuts), text.cuts, strict=False))
    others = ", ".join(f"{count:,} in {part}" for part, count in about["unknown"].items())
    progress.say(f"text: {about['source']}, {about['characters']:,} characters, sha256 {about['sha256'][:16]}")
    progress.say(
        f"split: {train:,} characters to learn from, {validation:,} for validation, {test:,} for the test; "
        f"{len(text.vocabulary.characters)} different ones to learn, others: {others}"
    )
    if about["skipped_files"]:
        progress.say(f"left out, as they are not UTF-8 text: {', '.join(about['skipped_files'])}")
    for part, scores in run.about["baseline_bits"].items():
        shown = ", ".join(f"{name} {bits:.3f}" for name, bits in scores.items())
        progress.say(f"baselines on {part}, bits per character: {shown}")
    progress.say(f"run folder: {run.path}")
    if run.about["versions"] != _versions():
        began = ", ".join(f"{name} {version}" for name, version in run.about["versions"].items())
        progress.say(f"this run began with {began}: with other versions its numbers may differ a little")


def _conclude(run: runs.Run, progress: Progress) -> None:
    last = {name: value for record in run.records() for name, value in record.items()}
    for part, baselines in run.about["baseline_bits"].items():
        bits, baseline = last.get(f"{part}_bits_per_character"), baselines["5-gram"]
        if bits is not None:
            verdict = "better than" if bits < baseline else "not better than"
            progress.say(f"{part}: {bits:.3f} bits per character, {verdict} the 5-gram's {baseline:.3f}")
    progress.say(f"trained for {last['seconds']:.0f} s ({last['cpu_seconds']:.0f} s of CPU time)")
    progress.say(f'to read more: {shlex.join(["jaxseq", "sample", str(run.path)])} --prompt "..."')


def _plot(run: runs.Run) -> None:
    records = run.records()
    curves = {}
    for label, name in (
        ("training, with dropout", "bits_per_character"),
        ("validation", "validation_bits_per_character"),
    ):
        points = [(record["step"], record[name]) for record in records if name in record]
        curves[label] = tuple(zip(*points, strict=True))
    figure = plots.learning_curves(curves, run.about["baseline_bits"]["validation"], ylabel="bits per character")
    checkpoints.write_whole(run.path / "loss.png", plots.png(figure))


def sample(path: pathlib.Path, sampling: writing.Sampling) -> str:
    """New text by the newest whole checkpoint of a run.

    Raises:
        UserError: if there is no run or checkpoint in `path`, if the prompt has characters that the training text
            does not have, or if a number makes no sense.
    """
    writing.check(sampling)
    run = runs.open_run(path)
    config = stored_config(run)
    check(config)
    vocabulary = Vocabulary(run.about["vocabulary"])
    sampling = dataclasses.replace(sampling, prompt=with_newlines(sampling.prompt))
    unknown = vocabulary.missing(sampling.prompt)
    if unknown:
        raise UserError(f"the prompt has characters that the run's training text does not have: {unknown!r}")
    checkpoint = checkpoints.newest(run.checkpoints, lambda message: print(message, file=sys.stderr))
    if checkpoint is None:
        raise UserError(f"{path} has no checkpoint yet: continue it with {_to_resume(run)}")
    cell = model(config, vocabulary.size)
    start = functools.partial(language.initial_state, cell, optimizer(config, 1), batch=config.batch)
    like = jax.eval_shape(start, jax.random.key(0))
    params, key = jax.tree.map(jnp.asarray, checkpoints.restore(checkpoint, like).params), jax.random.key(sampling.seed)
    if not sampling.prompt:
        opening = run.about["opening"]
        print(f"the text goes on from the validation part, after {opening!r}", file=sys.stderr)
        return writing.write(cell, params, vocabulary, dataclasses.replace(sampling, prompt=opening), key)
    return sampling.prompt + writing.write(cell, params, vocabulary, sampling, key)
