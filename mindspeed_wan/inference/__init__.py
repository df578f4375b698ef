"""From a prompt to a video: options, weights, experts, sampler loop, VAE over ranks, files.

``generate.main`` is what ``inference_sora.py`` runs; ``pipeline.WanGenerator`` is the Python API.
"""
