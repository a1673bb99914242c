"""Writing text with a language model."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxseq import samplers
from jaxseq.core.cell import Cell, Params
from jaxseq.decoding import generate
from jaxseq.training.errors import require_flag
from jaxseq.training.text import Vocabulary

_LONGEST = 10_000_000


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to write new text."""

    prompt: str = ""
    """What the text begins with; by default it goes on from the beginning of the run's validation part."""
    characters: int = 500
    """How many characters to write."""
    temperature: float = 0.8
    """Below 1 likely characters become likelier, above 1 less so; 0 takes the likeliest."""
    top_k: int | None = None
    """Draw among this many likeliest characters only."""
    top_p: float = 1.0
    """Draw among the likeliest characters that have this probability together."""
    seed: int = 0
    """Another seed, another text."""


def check(sampling: Sampling) -> None:
    """Raises UserError, naming the flag, if a number makes no sense."""
    check_length(sampling, "characters")
    require_flag(sampling, 0 <= sampling.temperature < math.inf, "temperature", "at least 0")
    require_flag(sampling, sampling.top_k is None or sampling.top_k >= 1, "top_k", "at least 1")
    require_flag(sampling, 0 < sampling.top_p <= 1, "top_p", "more than 0 and at most 1")
    check_seed(sampling)


def check_length(config: Any, name: str) -> None:
    """Raises UserError unless the field `name` is a number of characters that may be written at once."""
    require_flag(config, 1 <= getattr(config, name) <= _LONGEST, name, f"at least 1 and at most {_LONGEST:,}")


def check_seed(config: Any) -> None:
    """Raises UserError if the field `seed` is none of the 2³² different seeds that a key of JAX is made from."""
    require_flag(config, 0 <= config.seed < 2**32, "seed", "at least 0 and less than 2**32")


def write(cell: Cell, params: Params, vocabulary: Vocabulary, sampling: Sampling, key: Key[Array, ""]) -> str:
    """The text with which a model goes on after the prompt."""
    draw = jax.tree_util.Partial(
        _draw,
        temperature=sampling.temperature,
        k=min(sampling.top_k or vocabulary.size, vocabulary.size),
        p=sampling.top_p,
    )
    prompt = jnp.asarray(vocabulary.encode(sampling.prompt))
    out = generate(cell, params, prompt, key=key, max_new_tokens=sampling.characters, sample=draw)
    return vocabulary.decode(np.asarray(out.tokens))


def _draw(
    key: Key[Array, ""], logits: Float[Array, "*batch vocab"], *, temperature: Any, k: Any, p: Any
) -> Int[Array, "*batch"]:
    logits = logits.at[..., 0].set(-jnp.inf)  # the unknown character cannot be written
    return samplers.categorical(key, samplers.top_p(samplers.top_k(samplers.temperature(logits, temperature), k), p))
