"""What parallel code has to know about one parameter. The model fills it from its parameter table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ParamLayout:
    """How tensor parallelism treats one parameter.

    Read from ``param_map``, never from attributes of the parameter: Megatron does not set them without its own
    initialisation, and ``fully_shard`` drops them.

    Args:
        tp_axis: the dimension split over the tensor ranks, ``None`` when every tensor rank holds all of it.
        tp_partial: each tensor rank computes only a part of the gradient; ``finish_grads`` adds the parts up.
    """

    tp_axis: int | None = None
    tp_partial: bool = False
