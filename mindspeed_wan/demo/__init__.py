"""The tiny world: a complete model folder, real clips, and the walk through every stage."""
