"""The cells: one file, one idea."""
