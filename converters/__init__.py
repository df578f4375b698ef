"""Weights from any Wan layout to any other: Diffusers, Wan-AI's own, MindSpeed-MM ``mp_rank`` files, torch DCP.

Installed as ``mindspeed_wan_converters`` with the commands ``mm-convert`` and ``wan-convert``. The way of a
conversion: ``formats/*`` read a folder's tables into ``Weights`` (names, shapes, where the bytes lie; nothing is
loaded), ``checks`` hold them against the model's table of parameters, ``formats/*`` lay out the target's files as
lists of constants and tensor slices, and ``writer`` streams those into a staging folder that is committed whole.
"""
