"""Samplers: plain functions that choose a token from logits, composed by application.

Filters go `logits -> logits` and put `-inf` at what they exclude; choices go `(key, logits) -> token`. All numbers are
traced, so changing one compiles nothing, and each row of logits may have its own.

>>> import jax, jax.numpy as jnp
>>> from jax.tree_util import Partial
>>> def nucleus(key, logits, *, temperature, k, p):
...     return categorical(key, top_p(top_k(logits / temperature, k), p))  # temperature > 0
>>> sample = Partial(nucleus, temperature=0.8, k=40, p=0.9)  # a pytree: its numbers are traced
>>> sample(jax.random.key(0), jnp.array([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0]])).tolist()
[1, 0]

Truncations: temperature, top_k, top_p, min_p, typical, epsilon, eta, top_n_sigma.
Choices: categorical, greedy, without_replacement, gumbel_softmax; gumbel adds their noise.

What depends on the text so far reads a memory, which `generate(..., history=...)` carries: histories are token_counts,
new_tokens, recent, text, automaton, several `together`, or your own. Rules that read them: repetition_penalty,
presence_penalty, frequency_penalty, no_repeat_ngrams, forbid, minimum_length, force, allow.

>>> def once(key, logits, counts, *, penalty):
...     return categorical(key, presence_penalty(logits, counts, penalty))
>>> once(jax.random.key(0), jnp.zeros((1, 2)), jnp.array([[0, 1]]), penalty=50.0).tolist()
[0]
"""

from .draws import categorical as categorical
from .draws import greedy as greedy
from .draws import gumbel as gumbel
from .draws import gumbel_softmax as gumbel_softmax
from .draws import without_replacement as without_replacement
from .histories import History as History
from .histories import Text as Text
from .histories import automaton as automaton
from .histories import new_tokens as new_tokens
from .histories import recent as recent
from .histories import text as text
from .histories import together as together
from .histories import token_counts as token_counts
from .rules import allow as allow
from .rules import forbid as forbid
from .rules import force as force
from .rules import frequency_penalty as frequency_penalty
from .rules import minimum_length as minimum_length
from .rules import no_repeat_ngrams as no_repeat_ngrams
from .rules import presence_penalty as presence_penalty
from .rules import repetition_penalty as repetition_penalty
from .truncation import epsilon as epsilon
from .truncation import eta as eta
from .truncation import min_p as min_p
from .truncation import temperature as temperature
from .truncation import top_k as top_k
from .truncation import top_n_sigma as top_n_sigma
from .truncation import top_p as top_p
from .truncation import typical as typical
