"""What the flags that trade time for memory mean for this run: recomputation and the optimizer's state.

On a CPU there is no second memory to move things to: offloading is left out there, and the run says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.parallel.agreement import is_first
from mindspeed_wan.parallel.recompute import RecomputePlan
from mindspeed_wan.platforms.base import Platform
from mindspeed_wan.training.byte_states import ByteStates
from mindspeed_wan.training.host_states import HostStates
from mindspeed_wan.training.optimizer import ResidentStates, States


def recompute_plan(config: RunConfig, platform: Platform) -> RecomputePlan | None:
    """Return which blocks are recomputed: as the flags say, else as the FSDP2 file does, else none."""
    section = config.training.recompute
    offload = section.offload and has_own_memory(platform)
    if section.granularity == "full":
        first = section.num_layers if section.method == "block" else None
        return RecomputePlan(first=first, every_k=section.every_k, keep_attention=section.keep_attention,
                             offload=offload)
    if config.uses_fsdp2 and config.fsdp2.recompute_modules:
        return RecomputePlan(patterns=config.fsdp2.recompute_modules, offload=offload)
    return None


def optimizer_states(config: RunConfig, platform: Platform) -> Callable[[Mapping[str, Tensor]], States]:
    """Return what makes the keeper of the optimizer's state."""
    section = config.optimizer
    if section.name == "adam8bit":
        return partial(ByteStates, seed=config.training.seed)
    if section.cpu_offload and has_own_memory(platform):
        return partial(HostStates, fraction=section.offload_fraction)
    return ResidentStates


def has_own_memory(platform: Platform) -> bool:
    """Return whether the device's memory is not the host's."""
    return platform.device_type != "cpu"


def say_what_is_left_out(config: RunConfig, platform: Platform) -> None:
    """Print which offloading a run on a CPU leaves out."""
    if has_own_memory(platform) or not is_first():
        return
    asked = {"--recompute-offload": config.training.recompute.offload,
             "--optimizer-cpu-offload": config.optimizer.cpu_offload}
    for flag, is_asked in asked.items():
        if is_asked:
            print(f" {flag} has no effect on a CPU: everything is in host memory already", flush=True)
