"""Applications, each in one file, each with real data of its own to run on."""
