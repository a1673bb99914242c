"""Generative and discriminative taggers by training size: a hidden Markov model, a classifier, BiLSTM, BiLSTM-CRF.

python -m benchmarks.tagging --conll FOLDER
"""

import argparse
import functools
import json
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxseq as js
from benchmarks import tasks
from jaxseq.structured import chains
from jaxseq.structured.crf import CRF, forbidden
from jaxseq.structured.spans import span_score, to_iob2
from jaxseq.structured.tagger import Tagger, Words, find_words, fit_tagger

RESULTS = pathlib.Path(__file__).parent / "results"
MODELS = ("HMM", "classifier", "BiLSTM", "BiLSTM-CRF")
SMOOTHING = (1.0, 0.1, 0.01)
STEPS = {100: 200, 500: 300, 2000: 600}  # of training; more data have 1500
CHECKS, BATCH, CUT = 5, 32, 32
ROWS, LENGTHS = 128, (32, 128)  # of the sentences tagged at once: two shapes, as compiling takes longer than tagging
MISSING = 0.2

Sentence = list[tuple[str, str]]


class Corpus(NamedTuple):
    """Sentences of pairs of a word and a tag, to train, to choose and to test."""

    train: list[Sentence]
    chosen_by: list[Sentence]
    test: list[Sentence]


def read(path: pathlib.Path) -> list[Sentence]:
    """The sentences of a file of CoNLL-2003, with tags in IOB2."""
    found: list[Sentence] = [[]]
    for line in path.read_text().splitlines():
        parts = line.split()
        if not parts or parts[0] == "-DOCSTART-":
            found.append([])
        else:
            found[-1].append((parts[0], parts[-1]))
    return [list(zip(words(s), to_iob2(tags(s)), strict=True)) for s in found if s]


def words(sentence: Sentence) -> list[str]:
    return [word for word, _ in sentence]


def tags(sentence: Sentence) -> list[str]:
    return [tag for _, tag in sentence]


Answer = Callable[[list[list[str | None]]], list[list[str]]]  # a word that is None is missing


def score(answer: Answer, sentences: list[Sentence], missing: float = 0.0) -> dict[str, float]:
    """The share of right tags and the F1 of entities, with a share of the words missing."""
    random = np.random.default_rng(0)
    given = [[None if random.uniform() < missing else word for word in words(s)] for s in sentences]
    found, true = answer(given), [tags(s) for s in sentences]
    right = sum(a == b for guess, truth in zip(found, true, strict=True) for a, b in zip(guess, truth, strict=True))
    return {"accuracy": right / sum(map(len, true)), "f1": span_score(found, true).f1}


class Net(NamedTuple):
    """A network of scores of tags, perhaps with a random field on top; its last word stands for missing ones."""

    layer: js.SequenceLayer
    crf: CRF | None
    missing: int

    def init(self, key: jax.Array) -> Any:
        return self.layer.init(key), self.crf and self.crf.init(key)

    def loss(self, params: Any, tokens: jax.Array, states: jax.Array, mask: jax.Array, key: jax.Array) -> jax.Array:
        _, scores = self.layer.unroll(params[0], tokens, mask=mask, key=key)
        if self.crf is None:
            return js.losses.cross_entropy(scores, states, mask).sum() / mask.sum()
        return self.crf.loss(params[1], scores, states, mask).sum() / mask.sum()

    def best(self, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        _, scores = self.layer.unroll(params[0], tokens, mask=mask)
        if self.crf is None:
            return scores.argmax(axis=-1)
        return chains.best_path(self.crf.chain(params[1], scores), mask).states


def make_net(model: str, rows: int, names: tuple[str, ...], hidden: int) -> Net:
    """The network of a model, with so many rows of words, the last one that of missing words."""
    embed = js.Embed(rows, hidden)
    if model == "classifier":
        return Net(js.Stack((embed, js.Dense(hidden, len(names)))), None, rows - 1)
    both = js.Bidirectional(js.LSTM(hidden, hidden), js.LSTM(hidden, hidden))
    dropout = js.Dropout(0.3)
    layer = js.Sequential((embed, dropout, both, dropout, js.Dense(2 * hidden, len(names))))
    crf = CRF(len(names), forbidden=forbidden(names, "BIO")) if model == "BiLSTM-CRF" else None
    return Net(layer, crf, rows - 1)


RATES = {"classifier": 0.03}  # one word at a time, it learns slowly at 0.003, the rate of the others


def optimizer(rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))


@functools.partial(jax.jit, static_argnums=(0, 1))
def update(net: Net, rate: float, params: Any, moments: Any, tokens: Any, states: Any, mask: Any, key: jax.Array):
    """A step of training, in which a tenth of the words is missing."""
    missing_key, key = jax.random.split(key)
    tokens = jnp.where(jax.random.bernoulli(missing_key, 0.1, tokens.shape), net.missing, tokens)
    gradients = jax.grad(net.loss)(params, tokens, states, mask, key)
    updates, moments = optimizer(rate).update(gradients, moments)
    return optax.apply_updates(params, updates), moments


@functools.partial(jax.jit, static_argnums=0)
def best(net: Net, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    return net.best(params, tokens, mask)


def answer(net: Net, params: Any, vocabulary: Words, names: tuple[str, ...], sentences: Any) -> list[list[str]]:
    """The tags that a network gives, to `ROWS` sentences of similar lengths at once."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    found: list[list[str]] = [[]] * len(sentences)
    for first in range(0, len(order), ROWS):
        chosen = order[first : first + ROWS]
        rows = [sentences[i] for i in chosen]
        tokens = np.zeros((ROWS, next((size for size in LENGTHS if size >= len(rows[-1])), len(rows[-1]))), int)
        for row, sentence in zip(tokens, rows, strict=False):
            ids = np.array([vocabulary.find(word) for word in sentence], int)
            row[: len(ids)] = np.where(ids < 0, net.missing, ids)
        lengths = np.array([len(sentence) for sentence in rows] + [0] * (ROWS - len(rows)))
        states = np.asarray(best(net, params, tokens, np.arange(tokens.shape[1]) < lengths[:, None]))
        for i, row in zip(chosen, states, strict=False):
            found[i] = [names[state] for state in row[: len(sentences[i])]]
    return found


def train_net(
    net: Net, corpus: Corpus, vocabulary: Words, names: tuple[str, ...], rate: float, steps: int, seed: int
) -> Answer:
    """Trains, and keeps the params of the best of a few checks."""
    index = {name: state for state, name in enumerate(names)}
    random, key = np.random.default_rng(seed), jax.random.key(seed)
    pairs = [([vocabulary.find(w) for w in words(s)], [index[t] for t in tags(s)]) for s in corpus.train]
    params = net.init(key)
    moments = optimizer(rate).init(params)
    record, kept = -1.0, params
    for step in range(1, steps + 1):
        tokens, states = np.zeros((2, BATCH, CUT), int)
        rows = [pairs[i] for i in random.integers(0, len(pairs), BATCH)]
        for row, (ids, own) in enumerate(rows):
            tokens[row, : len(ids)], states[row, : len(own)] = ids[:CUT], own[:CUT]
        mask = np.arange(CUT) < np.array([len(ids) for ids, _ in rows])[:, None]
        params, moments = update(net, rate, params, moments, tokens, states, mask, jax.random.fold_in(key, step))
        if step % max(steps // CHECKS, 1) == 0 or step == steps:
            f1 = score(functools.partial(answer, net, params, vocabulary, names), corpus.chosen_by)["f1"]
            if f1 > record:
                record, kept = f1, params
    return functools.partial(answer, net, kept, vocabulary, names)


def train_hmm(corpus: Corpus) -> tuple[Tagger, float]:
    """Counts, with the best of a few smoothings."""
    fits = [(fit_tagger(corpus.train, smoothing=smoothing), smoothing) for smoothing in SMOOTHING]
    return max(fits, key=lambda fit: score(fit[0].tag, corpus.chosen_by)["f1"])


def run_once(
    model: str, corpus: Corpus, names: tuple[str, ...], rows: int, hidden: int, steps: int, seed: int
) -> dict[str, Any]:
    """Trains a model once: its size, without the rows of words not seen, and its scores on the test sentences."""
    more: dict[str, Any] = {}
    if model == "HMM":
        tagger, smoothing = train_hmm(corpus)
        size, tag = sum(leaf.size for leaf in jax.tree.leaves(tagger.params)), tagger.tag
        nats = tagger.log_likelihood([words(s) for s in corpus.test]).sum() / sum(map(len, corpus.test))
        drawn = " ".join(f"{word}/{tag}" for word, tag in tagger.simulate(jax.random.key(seed), 12))
        more = {"smoothing": smoothing, "nats": -float(nats), "simulated": drawn}
    else:
        vocabulary = find_words([words(s) for s in corpus.train])
        net = make_net(model, rows, names, hidden)
        size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0))))
        size -= (rows - len(vocabulary) - 1) * hidden
        tag = train_net(net, corpus, vocabulary, names, RATES.get(model, 0.003), steps, seed)
    return {
        "parameters": size,
        "whole": score(tag, corpus.test),
        "missing": score(tag, corpus.test, MISSING),
        **more,
    }


def middle(runs: Sequence[dict[str, Any]], part: str, figure: str) -> str:
    """The median over seeds in per cent, and the range."""
    values = [100 * run[part][figure] for run in runs]
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def report(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The paragraphs and the table."""
    hidden, command = runs[0]["hidden"], "python -m benchmarks.tagging --conll FOLDER"
    lines = [
        "| sentences | model | parameters | seeds | accuracy % | entity F1 % | accuracy %, 20 % missing | "
        "entity F1 %, 20 % missing | nats a word |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for size in sorted({run["sentences"] for run in runs}):
        for model in MODELS:
            if not (own := [run for run in runs if (run["model"], run["sentences"]) == (model, size)]):
                continue
            figures = [middle(own, part, figure) for part in ("whole", "missing") for figure in ("accuracy", "f1")]
            nats = f"{statistics.median(run['nats'] for run in own):.2f}" if "nats" in own[0] else "-"
            parameters = f"{statistics.median(run['parameters'] for run in own):,.0f}"
            lines.append("| " + " | ".join([f"{size:,}", model, parameters, f"{len(own)}", *figures, nats]) + " |")
    drawn = [run for run in runs if "simulated" in run]
    largest = max(drawn, key=lambda run: (run["sentences"], -run["seed"]))["simulated"] if drawn else ""
    return [
        "# Generative and discriminative taggers by training size",
        tasks.where(command),
        "CoNLL-2003, English named entities, tags turned from IOB1 into IOB2; 400 sentences of `testa` choose, `testb` "
        "is reported. A seed draws the training sentences and starts the networks. Figures are medians over seeds (and "
        "ranges); an entity counts if its bounds and its type are right (conlleval). Accuracy is of tokens, most of "
        "which are in no entity.",
        "All models read the same: words seen at least twice in the training sentences, and for others classes by "
        "their shape and last three letters; no pretrained vectors, no characters. The HMM is counted, with the best "
        f"smoothing of {', '.join(map(str, SMOOTHING))}. The classifier sees the word alone; BiLSTMs have {hidden} "
        f"units each way, words {hidden}. Networks: Adam at 0.003 (the classifier {RATES['classifier']}), dropout 0.3 "
        "(BiLSTMs), a tenth of the words missing in training, "
        f"{', '.join(f'{steps} steps for {size}' for size, steps in STEPS.items())} and 1500 for all sentences, "
        f"{BATCH} sentences of at most {CUT} words a step; the best of five checks is kept. The CRF forbids what is no "
        "IOB2.",
        "With 20 % missing, that share of the test words is hidden, tags of hidden words count as well: the HMM sums "
        "over what they could be, the networks read a word that stands for missing ones. Nats a word are the "
        "negative log-likelihood of the test words under the HMM (rare words as their classes, so they are not "
        "comparable between sizes); the others have none, nor can they draw sentences.",
        "\n".join(lines),
        f"A sentence drawn from the HMM: {largest.replace('<', '&lt;')}",
    ]


def main(arguments: Sequence[str] | None = None) -> pathlib.Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conll", type=pathlib.Path, required=True, help="the folder with eng.train, testa, testb")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 500, 2000, 14041], help="training sentences")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="another budget, for all sizes")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    output = options.output / "tagging.md"
    stored = output.with_suffix(".json")
    runs = json.loads(stored.read_text()) if stored.exists() else []
    train, chosen_by, test = (read(options.conll / f"eng.{part}") for part in ("train", "testa", "testb"))
    corpus = Corpus(train, chosen_by[:: max(len(chosen_by) // 400, 1)][:400], test)
    names = tuple(sorted({tag for sentence in corpus.train for tag in tags(sentence)}))
    rows = len(find_words([words(s) for s in corpus.train])) + 1  # one size of the networks: they compile once
    for seed in range(options.seeds):
        order = np.random.default_rng(seed).permutation(len(corpus.train))
        for size in options.sizes:
            some = corpus._replace(train=[corpus.train[i] for i in order[:size]])
            steps = options.steps or STEPS.get(size, 1500)
            for model in options.models:
                key = dict(model=model, sentences=len(some.train), seed=seed, hidden=options.hidden)
                key |= {} if model == "HMM" else {"steps": steps, "rate": RATES.get(model, 0.003)}
                if any(key.items() <= run.items() for run in runs):
                    continue
                runs.append({**key, **run_once(model, some, names, rows, options.hidden, steps, seed)})
                print(runs[-1], flush=True)
                stored.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
                tasks.write(output, report([run for run in runs if run["hidden"] == options.hidden]))
    return output


if __name__ == "__main__":
    main()
