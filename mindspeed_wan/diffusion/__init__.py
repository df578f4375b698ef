"""Diffusion mathematics shared by training and inference: torch only, no model, no configuration, no rank.

============== ==========================================================================================
flow_matching  the straight path from data to noise: x_t, its velocity, the per-sample loss
timesteps      the flow shift, sigma ranges of the experts, sigma distributions, index -> sigma
weighting      loss weights as a function of sigma
randomness     bit-stable counter-based noise: the same bits on every layout, platform and torch version
schedule       inference sigma grids by name (official, diffusers, diffsynth)
solvers        UniPC, DPM++ 2M and Euler as pure steps over an explicit state
guidance       classifier-free guidance
sampler        the denoising loop over an unseen velocity function
============== ==========================================================================================

``sigma`` is the noise fraction in [0, 1], ``t = 1000 * sigma`` the model's timestep, velocity ``noise - x0``.
"""
