"""Checkpoints on disk: safe reading, atomic writing, and the formats a training run saves and loads.

``manifest`` commits folders and checks their hashes; ``safe_load`` and ``torch_file`` read foreign files without
running code from them. Both work without torch until a torch object is asked for.
"""
