"""Ascend NPUs with HCCL. The only file that imports torch_npu and MindSpeed, and only when an NPU is chosen."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from mindspeed_wan.errors import ResourceError
from mindspeed_wan.platforms.base import Platform
from mindspeed_wan.platforms.cann import (
    AUTOLOAD_VARIABLE,
    CANN_FIX,
    keep_torch_importable,
    torch_npu_installed,
)

if TYPE_CHECKING:
    import torch

ADAPTOR_VARIABLE = "MINDSPEED_WAN_ADAPTOR"
"""``1``: also import ``mindspeed.megatron_adaptor`` (needs a core_v0.12.1 source tree of Megatron-LM)."""

PEAKS = {"910B1": 400, "910B2": 376, "910B3": 313, "910B4": 280, "910_93": 376}
"""Dense bf16 TFLOP/s by the vendor's product names (910_93xx is one of the two dies of an A3 package)."""


class NpuPlatform(Platform):
    """One process per NPU, chosen by ``LOCAL_RANK``."""

    name = "npu"
    device_type = "npu"
    backend = "hccl"

    def problem(self) -> str | None:
        """Return why the NPU cannot be used: package, CANN, version match or device."""
        if not torch_npu_installed():
            return "torch_npu is not installed"
        problem = keep_torch_importable()
        if problem is not None:
            return problem
        try:
            _torch_npu()
        except (ImportError, RuntimeError, OSError) as error:
            return f"torch_npu does not import: {str(error).splitlines()[0]}"
        return None if _npu().is_available() else "torch_npu and CANN are there, but no NPU is visible"

    def problem_fix(self) -> str:
        """Return how to get a usable NPU."""
        if not torch_npu_installed():
            return "pip install the torch_npu that matches your torch (it needs CANN and a driver)"
        if os.environ.get(AUTOLOAD_VARIABLE) == "0":
            return CANN_FIX
        return "check `npu-smi info`, ASCEND_RT_VISIBLE_DEVICES and that torch_npu, torch and CANN match"

    def _activate(self) -> None:
        from mindspeed_wan.platforms import ops

        torch_npu = _torch_npu()
        # Megatron asks `torch.cuda` for devices and streams: let those calls answer for the NPU.
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
        if os.environ.get(ADAPTOR_VARIABLE) == "1":
            _import_adaptor()
        npu, rank = _npu(), self.local_rank()
        if rank >= npu.device_count():
            count = npu.device_count()
            raise ResourceError(
                f"local rank {rank} has no NPU: {count} visible", fix=f"start {count} ranks: NPUS_PER_NODE={count}"
            )
        npu.set_device(rank)
        # The VAE's 3-D convolutions fail with private formats, and shapes change too often to compile per shape.
        torch_npu.npu.config.allow_internal_format = False
        npu.set_compile_mode(jit_compile=False)
        ops.use("npu")

    def device_name(self) -> str:
        """Return the NPU's model name, for example ``Ascend910B2``."""
        return str(_npu().get_device_name(self.local_rank()))

    def synchronize(self) -> None:
        """Wait for this NPU's queued kernels."""
        _npu().synchronize()

    def empty_cache(self) -> None:
        """Give PyTorch's cached blocks back to the driver."""
        _npu().empty_cache()

    def peak_memory_bytes(self) -> int:
        """Return the peak of PyTorch's reserved memory on this NPU."""
        return int(_npu().max_memory_reserved())

    def reset_peak_memory(self) -> None:
        """Start a new peak measurement."""
        _npu().reset_peak_memory_stats()

    def free_memory_bytes(self) -> int:
        """Return what the driver reports free, plus what PyTorch holds but does not use."""
        npu = _npu()
        return int(npu.mem_get_info()[0] + npu.memory_reserved() - npu.memory_allocated())

    def total_memory_bytes(self) -> int:
        """Return the NPU's memory."""
        return int(_npu().mem_get_info()[1])

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Return the dense peak for bf16 and fp16; fp32 peaks are not published per model."""
        import torch

        if dtype not in (torch.bfloat16, torch.float16):
            return None
        name = self.device_name()
        return next((tflops * 1e12 for model, tflops in PEAKS.items() if model in name), None)

    @property
    def supports_bf16(self) -> bool:
        """True from the 910B generation on."""
        name = self.device_name()
        return "910B" in name or "910_9" in name or "950" in name


def _torch_npu() -> Any:
    return importlib.import_module("torch_npu")


def _npu() -> Any:
    import torch

    return torch.npu  # type: ignore[attr-defined]


def _import_adaptor() -> None:
    try:
        importlib.import_module("mindspeed.megatron_adaptor")
    except ImportError as error:
        raise ResourceError(
            f"{ADAPTOR_VARIABLE}=1, but mindspeed.megatron_adaptor does not import: {error}",
            fix="pip install git+https://gitcode.com/Ascend/MindSpeed.git@26.0.0_core_r0.12.1 and put a core_v0.12.1 "
            f"source tree of Megatron-LM on PYTHONPATH; or unset {ADAPTOR_VARIABLE}, which nothing here needs",
        ) from error
