"""A world small enough to learn on a CPU: coloured shapes that move, captions that say so, held-out combinations.

scenes    every combination of colour, shape and motion; which are held out      vae    the VAE, trained on the scenes
detector  reads colour, shape and motion back from frames by rules               build  data, training, evaluation
"""
