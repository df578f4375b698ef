"""How one model spreads over ranks: sizes (dims), process groups, tokens, attention across ranks, FSDP2, gradients.

Nothing here knows the Wan DiT: models hand in modules, patterns of module names and a table of ``ParamLayout``.
"""
