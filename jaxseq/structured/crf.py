"""Linear-chain conditional random fields: the layer on top of a tagger that scores whole sequences of tags."""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxseq.core import errors, masks, sharding
from jaxseq.core.layer import Layer
from jaxseq.structured.chains import Chain, log_partition, path_score


class Forbidden(NamedTuple):
    """What no path may do: begin in one of these states, go from the one to the other of a pair, end in one."""

    start: tuple[int, ...] = ()
    transition: tuple[tuple[int, int], ...] = ()
    end: tuple[int, ...] = ()


class CRFParams(NamedTuple):
    """Scores of the first tag, of pairs of neighbours and of the last tag."""

    start: Float[Array, "state"]
    transition: Float[Array, "from to"]
    end: Float[Array, "state"]


class CRF(Layer):
    """A conditional random field over sequences of tags z, given scores of each tag at each step.

    p(z | scores) ∝ exp(start[z_1] + Σ_t scores[t, z_t] + Σ_{t<T} transition[z_t, z_{t+1}] + end[z_T])

    `chain` makes the distribution, and the functions of `chains` answer what is asked of it: `best_path` (Viterbi),
    `best_paths`, `marginals`, `sample_path`, `entropy`. The params begin at 0, where each step is by itself. What is
    `forbidden` has probability 0 whatever the params are; the function `forbidden` finds that of a tagging scheme. Mask
    and resets (packed documents) mean the same as in `unroll`; a row without steps has one path, the empty one, so its
    loss is 0.

    Lafferty, McCallum and Pereira, Conditional Random Fields, ICML 2001, https://dl.acm.org/doi/10.5555/645530.655813.

    >>> import jax
    >>> from jaxseq.structured import chains
    >>> tags = ("O", "B", "I")
    >>> crf = CRF(len(tags), forbidden=forbidden(tags, "BIO"))
    >>> params = crf.init(jax.random.key(0))
    >>> scores = jnp.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    >>> path = chains.best_path(crf.chain(params, scores))
    >>> [tags[state] for state in path.states.tolist()]
    ['B', 'I']
    >>> f"{crf.loss(params, scores, path.states):.3f}"
    '0.524'
    """

    states: int
    _: dataclasses.KW_ONLY
    forbidden: Forbidden = Forbidden()

    def __post_init__(self) -> None:
        given = self.forbidden
        try:
            start, pairs, end = given
            moves = {(operator.index(i), operator.index(j)) for i, j in pairs}
            start, end = (tuple(sorted(set(map(operator.index, states)))) for states in (start, end))
            rules, named = Forbidden(start, tuple(sorted(moves)), end), [*start, *itertools.chain(*moves), *end]
        except (TypeError, ValueError):
            rules, named = Forbidden(), [-1]
        object.__setattr__(self, "forbidden", rules)
        super().__post_init__()
        if self.states < 1:
            raise ValueError(f"CRF needs states >= 1, got {self.states}.")
        if not all(0 <= state < self.states for state in named):
            raise ValueError(
                f"CRF needs Forbidden(start, transition, end) with states below {self.states}, and pairs of them as "
                f"transition, got {given!r}."
            )

    def init(self, key: Array) -> CRFParams:
        errors.check_key(self, key)
        return CRFParams(jnp.zeros(self.states), jnp.zeros((self.states, self.states)), jnp.zeros(self.states))

    def chain(self, params: CRFParams, scores: Float[Array, "*batch time state"]) -> Chain:
        """The distribution over paths, for the functions of `chains`; a score of -inf makes a tag impossible there."""
        errors.check_params(self, params)
        errors.check_features(self, scores, self.states, "scores")
        errors.check_dtype(self, scores, params.transition.dtype, "scores")
        start, transition, end = (
            jnp.asarray(potentials).at[_indices(states)].set(-jnp.inf) if states else potentials
            for states, potentials in zip(self.forbidden, params, strict=True)
        )
        return Chain(start, transition, scores, end)

    def loss(
        self,
        params: CRFParams,
        scores: Float[Array, "*batch time state"],
        tags: Int[Array, "*batch time"],
        mask: Bool[Array, "*batch time"] | None = None,
        *,
        reset: Bool[Array, "*batch time"] | None = None,
        parallel: bool = False,
    ) -> Float[Array, "*batch"]:
        """The negative log-probability in nats of the tags of each row.

        It is inf, with gradients of 0, where the tags are forbidden. What the tags score is taken off step by step, so
        that in float32 a loss is right to about 1e-7 of a step, and not of the whole text's score.

        Raises:
            ValueError: if shapes do not agree, or a tag on the mask is none of the states; where tags are traced, the
                loss is NaN instead.
        """
        _check_tags(self, tags, mask)
        return _loss(self, parallel, params, jnp.asarray(scores), jnp.asarray(tags), mask, reset)

    def partial_loss(
        self,
        params: CRFParams,
        scores: Float[Array, "*batch time state"],
        allowed: Bool[Array, "*batch time state"],
        mask: Bool[Array, "*batch time"] | None = None,
        *,
        reset: Bool[Array, "*batch time"] | None = None,
        parallel: bool = False,
    ) -> Float[Array, "*batch"]:
        """The negative log-probability in nats that the tags of each row are among those `allowed` at each step.

        For texts of which a part is labelled: all tags are allowed where none is known. It is inf, with gradients of 0,
        where no path is left. It is a difference of two sums over paths, and in float32 right to about 1e-7 of these
        (Tsuboi et al., Training Conditional Random Fields Using Incomplete Annotations, 2008,
        https://aclanthology.org/C08-1113).

        >>> import jax
        >>> crf = CRF(2)
        >>> allowed = jnp.array([[True, False], [True, True]])  # the first tag is 0, the second one is unknown
        >>> f"{crf.partial_loss(crf.init(jax.random.key(0)), jnp.zeros((2, 2)), allowed):.3f}"  # ln 2
        '0.693'
        """
        chain = self.chain(params, scores)
        allowed = jnp.asarray(allowed)
        if allowed.dtype != jnp.bool_ or allowed.shape != chain.emission.shape:
            raise ValueError(
                f"{self} needs boolean allowed [*batch, time, state] = {chain.emission.shape}, got "
                f"{errors.shape_of(allowed)}."
            )
        narrow = chain._replace(emission=jnp.where(allowed, chain.emission, -jnp.inf))
        score, log_z = (log_partition(c, mask, reset=reset, parallel=parallel) for c in (narrow, chain))
        return _surprise(score, log_z)


def _indices(states: tuple[Any, ...]) -> Any:
    """States, or pairs of them, as an index of an array."""
    return tuple(np.array(states).reshape(len(states), -1).T)


def _surprise(score, log_z):
    return jnp.where(jnp.isneginf(score), jnp.inf, log_z - score)


def _check_tags(crf, tags, mask):
    if not errors.are_known(tags, mask):
        return
    tags = np.asarray(tags)
    keep = np.ones(tags.shape, bool) if mask is None else np.asarray(mask)
    if keep.shape != tags.shape or keep.dtype != bool:
        return  # path_score says so
    wrong = ((tags < 0) | (tags >= crf.states)) & keep
    if wrong.any():
        index = tuple(np.argwhere(wrong)[0].tolist())
        raise ValueError(
            f"CRF.loss got the tag {tags[index]} at {index}; there are {crf.states} states, from 0 on. If it pads, "
            "give the mask (length_mask(lengths, time))."
        )


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _loss(crf, parallel, params, scores, tags, mask, reset):
    chain = crf.chain(params, scores)
    score = path_score(chain, tags, mask, reset=reset)
    relative = _relative(chain, tags.astype(int), mask, reset)
    losses = log_partition(relative, mask, reset=reset, parallel=parallel)
    return jnp.where(jnp.isfinite(score), losses, lax.stop_gradient(-score))


def _relative(chain: Chain, tags: Array, mask: Any, reset: Any) -> Chain:
    """The chain less, at each step, what a path scores there: its `log_partition` is that of the chain less the score.

    The potentials that meet in a state are taken off in the order in which they are added, which cancels to 0 exactly.
    """
    states, emission = chain.emission.shape[-1], jnp.asarray(chain.emission)
    mask, reset = (None if flags is None else jnp.asarray(flags) for flags in (mask, reset))
    keep = jnp.ones_like(emission[..., 0], bool) if mask is None else mask
    places = sharding.placed(masks.places(keep.shape, mask, reset), jax.typeof(keep).sharding.spec)
    dtype = jnp.promote_types(emission.dtype, jnp.float32)
    start, transition, end = (jnp.asarray(part).astype(dtype) for part in (chain.start, chain.transition, chain.end))
    tags = jnp.clip(tags, 0, states - 1)
    before = jnp.take_along_axis(tags, jnp.maximum(places.preceding, 0), axis=-1)

    def finite(numbers, flags):
        return jnp.where(flags & jnp.isfinite(numbers), numbers, 0)

    own = finite(jnp.take_along_axis(emission, tags[..., None], axis=-1)[..., 0], keep)
    onward = sharding.rows(transition.reshape(-1), before * states + tags)
    arriving = jnp.where(places.first, sharding.rows(start, tags), onward)
    less = finite(arriving, keep), finite(sharding.rows(end, tags), places.last)
    emission = emission.astype(dtype) - own.astype(dtype)[..., None]
    return Chain(start, transition, emission - less[0][..., None] - less[1][..., None], end)


SCHEMES = {  # the prefixes that go on with an entity, and those after which it has to go on
    "BIO": ("I", ""),
    "IOB2": ("I", ""),
    "BIOES": ("IE", "BI"),
    "BILOU": ("IL", "BI"),
}


def forbidden(tags: Sequence[str], scheme: str) -> Forbidden:
    """What no sequence of tags such as "O", "B-PER", "I-PER" does, for `CRF(len(tags), forbidden=...)`.

    An entity begins with B and goes on with I of the same type, in all schemes; everything else is O. With "BIO", which
    is "IOB2", an entity of one step is a B. With "BIOES" the last step of longer ones is an E and that of a single step
    an S; "BILOU" calls these L and U.

    >>> forbidden(("O", "B-PER", "I-PER", "B-LOC"), "BIO")
    Forbidden(start=(2,), transition=((0, 2), (3, 2)), end=())
    """
    if scheme not in SCHEMES:
        raise ValueError(f"forbidden knows the schemes {', '.join(SCHEMES)}, got {scheme!r}.")
    letters = "BIO" if scheme == "IOB2" else scheme
    going_on, unfinished = SCHEMES[scheme]
    parts = [tag.split("-", maxsplit=1) for tag in tags]
    for tag, (prefix, *kind) in zip(tags, parts, strict=True):
        if prefix not in tuple(letters) or (prefix == "O" and kind):
            raise ValueError(
                f"forbidden needs tags such as 'O' and '{letters[0]}-PER' in the scheme {scheme}, got {tag!r}."
            )

    def follows(before, after):
        if after[0] in going_on:
            return before[0] in ("B", "I") and before[1:] == after[1:]
        return before[0] not in unfinished

    pairs = itertools.product(range(len(parts)), repeat=2)
    return Forbidden(
        tuple(i for i, (prefix, *_) in enumerate(parts) if prefix in going_on),
        tuple((i, j) for i, j in pairs if not follows(parts[i], parts[j])),
        tuple(i for i, (prefix, *_) in enumerate(parts) if prefix in unfinished),
    )
