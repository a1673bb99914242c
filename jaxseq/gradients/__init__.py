"""Gradients through time: how they start, how far they reach, and other ways to compute them."""
