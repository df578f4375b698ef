"""The four layouts of weights: each module reads a folder into ``Weights`` and lays out a target's files."""
