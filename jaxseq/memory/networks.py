"""End-to-end memory networks: questions about stories."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import errors
from jaxseq.core.layer import Layer
from jaxseq.core.sharding import placed, rows


class MemoryNetworkParams(NamedTuple):
    """The parameters of a memory network; `hop_kernel` is None where embeddings are tied from hop to hop."""

    embeddings: Float[Array, "table vocab size"]
    ages: Float[Array, "age_table memory size"]
    hop_kernel: Float[Array, "input output"] | None


class Answer(NamedTuple):
    """What a memory network says: logits of the words, and what each hop looked at."""

    logits: Float[Array, "*batch vocab"]
    weights: Float[Array, "*batch hop sentence"]


class MemoryNetwork(Layer):
    """End-to-end memory network: it looks at the sentences of a story several times, and answers with a word.

        m_i = Σ_j l_j A x_ij + T_A(i),   c_i = Σ_j l_j C x_ij + T_C(i),   u = Σ_j l_j B q_j
        each hop:  p = softmax(u · m_i),   o = Σ p_i c_i,   u' = u + o     (layer-wise: u H + o)
        logits = u' Wᵀ

    A, B, C, W are tables of word vectors, x_ij and q_j words, and T tables of the age i of a sentence, 0 for the
    last one. `tying="adjacent"`: A of a hop is C of the hop before, B the first A and W the last C. `"layer-wise"`:
    all hops share A and C, and H stands between them as in a recurrent network. All tables start from N(0, 0.1²).
    `encoding="position"` weighs feature k of d of word j of J by l_kj = 1 + (2k - d - 1)(2j - J - 1) / (d J),
    `"bag"` by 1. The paper prints (1 - j/J) - (k/d)(1 - 2j/J), about half of that; the authors' code
    (https://github.com/facebook/MemNN) has these weights, and with half of them no linear start succeeds at the
    paper's rates.

    `empty_places=True`: the places of memory that hold no sentence, `memory_size` less the sentences, stand in the
    softmax too, with a score of 0 and nothing to read, so that a hop can look at nothing, as in the authors'
    code.

    S. Sukhbaatar, A. Szlam, J. Weston and R. Fergus, End-to-end memory networks, NeurIPS 2015.

    >>> network = MemoryNetwork(vocab_size=20, size=8, memory_size=10)
    >>> params = network.init(jax.random.key(0))
    >>> story, question = jnp.ones((4, 6, 5), int), jnp.ones((4, 3), int)
    >>> logits, weights = network.answer(params, story, question)
    >>> logits.shape, weights.shape
    ((4, 20), (4, 3, 6))
    """

    vocab_size: int
    size: int
    memory_size: int
    _: dataclasses.KW_ONLY
    hops: int = 3
    tying: Literal["adjacent", "layer-wise"] = "adjacent"
    encoding: Literal["position", "bag"] = "position"
    empty_places: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hops < 1:
            raise ValueError(f"MemoryNetwork needs hops >= 1, got {self.hops}.")
        for name, choices in (("tying", ("adjacent", "layer-wise")), ("encoding", ("position", "bag"))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"MemoryNetwork needs {name}={' or '.join(map(repr, choices))}, got {getattr(self, name)!r}."
                )

    def init(self, key: Array) -> MemoryNetworkParams:
        errors.check_key(self, key)
        keys = jax.random.split(key, 3)
        adjacent = self.tying == "adjacent"
        tables, ages = (self.hops + 1, self.hops + 1) if adjacent else (4, 2)
        return MemoryNetworkParams(
            0.1 * jax.random.normal(keys[0], (tables, self.vocab_size, self.size)),
            0.1 * jax.random.normal(keys[1], (ages, self.memory_size, self.size)),
            None if adjacent else 0.1 * jax.random.normal(keys[2], (self.size, self.size)),
        )

    def axes(self) -> Any:
        kernel = None if self.tying == "adjacent" else PartitionSpec("input", "output")
        specs = PartitionSpec("table", "vocab", "size"), PartitionSpec("table", "memory", "size"), kernel
        return MemoryNetworkParams._make(specs)

    def answer(
        self,
        params: MemoryNetworkParams,
        story: Int[Array, "*batch sentence word"],
        question: Int[Array, "*batch question_word"],
        *,
        mask: Bool[Array, "*batch sentence word"] | None = None,
        question_mask: Bool[Array, "*batch question_word"] | None = None,
        linear: bool | Bool[Array, ""] = False,
        noise: float = 0.1,
        key: Array | None = None,
    ) -> Answer:
        """The logits of the answer, and the weights of the sentences at each hop.

        Args:
            params: what `init` made.
            story: the words of each sentence, the oldest sentence first, of at most `memory_size` sentences. A token
                out of range reads the nearest word there is, as in `Embed`.
            question: the words of the question.
            mask: False where a sentence has no word; one without words is not there, and does not count in the ages of
                those before it. What the tokens are there has no effect. Of a story of none the weights are 0.
            question_mask: the same of the question.
            linear: without the softmax over sentences, as training starts ("linear start"); may be traced.
            noise: the chance that an empty sentence comes after a sentence, which changes the ages of those before.
            key: for that noise; None means no noise.

        Raises:
            ValueError, TypeError: if a shape or dtype is not what the network needs.
        """
        if not 0 <= noise <= 1:
            raise ValueError(f"{self} needs a chance of noise, from 0 to 1, got {noise!r}.")
        if key is not None:
            errors.check_key(self, key)
        given = jax.tree.map(jnp.asarray, (params, story, question, mask, question_mask))
        params, story, question, told, asked = self._check(*given)  # the masks, filled in
        present = told.any(axis=-1)
        ages = self._ages(present, noise, key)
        tables, times = (placed(part, PartitionSpec(None, None, None)) for part in params[:2])  # whole on every device
        sentences = self._encode(tables, story, told)  # [*batch, sentence, table, size]
        if self.tying == "adjacent":
            hops, asks, says = [(hop, hop + 1) for hop in range(self.hops)], 0, self.hops
        else:
            hops, asks, says = [(0, 1)] * self.hops, 2, 3
        (u,) = jnp.moveaxis(self._encode(tables[asks : asks + 1], question, asked), -2, 0)
        seen, lowest = [], jnp.finfo(u.dtype).min
        free = (self.memory_size - present.sum(axis=-1, keepdims=True)) * int(self.empty_places)
        elsewhere = jnp.where(free > 0, jnp.log(jnp.maximum(free, 1).astype(u.dtype)), lowest)  # exp(0) of each
        for a, c in hops:
            keys, values = (sentences[..., table, :] + rows(times[table], ages) for table in (a, c))
            scores = jnp.einsum("...sd,...d->...s", keys, u)
            soft = jax.nn.softmax(jnp.concatenate([jnp.where(present, scores, lowest), elsewhere], axis=-1))[..., :-1]
            weights = jnp.where(present, jnp.where(linear, scores, soft), 0)
            looked = jnp.einsum("...s,...sd->...d", weights, values)
            u = (u if params.hop_kernel is None else u @ params.hop_kernel) + looked
            seen.append(weights)
        return Answer(jnp.einsum("...d,vd->...v", u, tables[says]), jnp.stack(seen, axis=-2))

    def _encode(self, tables: Array, tokens: Array, mask: Array) -> Float[Array, "*batch table size"]:
        """The vectors of sentences `[*batch, word]` in each of the tables."""
        words = rows(jnp.moveaxis(tables, 0, 1), jnp.where(mask, tokens, 0))  # [*batch, word, table, size]
        scale = jnp.broadcast_to(mask[..., None], (*mask.shape, self.size)).astype(tables.dtype)
        if self.encoding == "position":
            count = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
            place = (2 * mask.cumsum(axis=-1) - count - 1) / count
            feature = (2 * jnp.arange(1, self.size + 1) - self.size - 1) / self.size
            scale = scale * (1 + place[..., None] * jnp.broadcast_to(feature, scale.shape)).astype(scale.dtype)
        return jnp.einsum("...wtd,...wd->...td", words, scale)

    def _ages(self, present: Bool[Array, "*batch sentence"], noise: float, key: Array | None) -> Array:
        """How many sentences, and empty ones drawn at random, come after each sentence; at most the table's last."""
        count = present.astype(jnp.int32)
        after = count.sum(axis=-1, keepdims=True) - count.cumsum(axis=-1)
        if key is not None:
            blank = (jax.random.bernoulli(key, noise, present.shape) & present).astype(jnp.int32)
            after = after + jnp.flip(jnp.flip(blank, axis=-1).cumsum(axis=-1), axis=-1)
        return jnp.minimum(after, self.memory_size - 1)

    def _check(self, params: Any, story: Array, question: Array, mask: Any, question_mask: Any) -> tuple[Any, ...]:
        """Raises unless all arrays fit each other; gives them, with masks."""
        errors.check_params(self, params)
        errors.check_tokens(self, story)
        errors.check_tokens(self, question)
        if story.ndim < 2 or question.ndim < 1 or story.shape[:-2] != question.shape[:-1]:
            raise ValueError(
                f"{self} reads a story [*batch, sentence, word] and a question [*batch, word], got "
                f"{errors.shape_of(story)} and {errors.shape_of(question)}."
            )
        if story.shape[-2] > self.memory_size:
            raise ValueError(
                f"{self} remembers {self.memory_size} sentences, but the story has {story.shape[-2]}: give the last "
                "ones alone."
            )
        masks = []
        for name, given, tokens in (("mask", mask, story), ("question_mask", question_mask, question)):
            if given is None:
                given = jnp.ones(tokens.shape, bool)
            elif given.dtype != jnp.bool_ or given.shape != tokens.shape:
                raise ValueError(
                    f"{self} needs a {name} of bool{list(tokens.shape)}, True at words, got {errors.shape_of(given)}."
                )
            masks.append(given)
        return params, story, question, *masks
