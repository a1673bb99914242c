"""Structured models: dynamic programs over chains, and the Markov models, random fields and alignments they serve."""
