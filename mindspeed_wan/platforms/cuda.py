"""NVIDIA GPUs with NCCL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mindspeed_wan.errors import ResourceError
from mindspeed_wan.platforms.base import Platform

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Peak:
    """Dense peaks of one GPU model in TFLOP/s: bf16/fp16 on tensor cores, TF32, plain fp32."""

    half: float
    tf32: float
    fp32: float


PEAKS = {
    "GB200": Peak(2500, 1250, 80),
    "GB300": Peak(2500, 1250, 80),
    "B200": Peak(2250, 1125, 75),
    "B300": Peak(2250, 1125, 75),
    "H200": Peak(989, 494, 67),
    "H800": Peak(989, 494, 67),
    "H100 NVL": Peak(835, 417, 60),
    "H100 PCIe": Peak(756, 378, 51),
    "H100": Peak(989, 494, 67),
    "H20": Peak(148, 74, 44),
    "A100": Peak(312, 156, 19.5),
    "A800": Peak(312, 156, 19.5),
    "A40": Peak(149.7, 74.8, 37.4),
    "A10": Peak(125, 62.5, 31.2),
    "L40S": Peak(362, 183, 91.6),
    "L40": Peak(181, 90.5, 90.5),
    "L20": Peak(119.5, 59.8, 59.8),
    "L4": Peak(121, 60, 30.3),
    "RTX 5090": Peak(209.5, 104.8, 104.8),
    "RTX 4090": Peak(165.2, 82.6, 82.6),
    "RTX 3090": Peak(71, 35.6, 35.6),
}
"""From NVIDIA's data sheets, without sparsity; GeForce with fp32 accumulation. Longest matching name wins."""


class CudaPlatform(Platform):
    """One process per GPU, chosen by ``LOCAL_RANK``."""

    name = "cuda"
    device_type = "cuda"
    backend = "nccl"

    def problem(self) -> str | None:
        """Return why CUDA cannot be used: a build without it, no driver, or no GPU."""
        import torch

        if torch.version.cuda is None:
            return f"PyTorch {torch.__version__} is a build without CUDA"
        if not torch.cuda.is_available():
            return f"PyTorch {torch.__version__} finds no NVIDIA GPU or no driver for CUDA {torch.version.cuda}"
        return None

    def problem_fix(self) -> str:
        """Return how to get a usable CUDA."""
        return "check `nvidia-smi`, CUDA_VISIBLE_DEVICES, and install a CUDA build of torch (pytorch.org/get-started)"

    def _activate(self) -> None:
        import torch

        count, rank = torch.cuda.device_count(), self.local_rank()
        if rank >= count:
            raise ResourceError(
                f"local rank {rank} has no GPU: {count} visible", fix=f"start {count} ranks: NPROC_PER_NODE={count}"
            )
        torch.cuda.set_device(rank)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self._use_chosen_kernels()

    def device_name(self) -> str:
        """Return the GPU's model name."""
        import torch

        return str(torch.cuda.get_device_name(self.device()))

    def synchronize(self) -> None:
        """Wait for this GPU's queued kernels."""
        import torch

        torch.cuda.synchronize(self.device())

    def empty_cache(self) -> None:
        """Give PyTorch's cached blocks back to the driver."""
        import torch

        torch.cuda.empty_cache()

    def peak_memory_bytes(self) -> int:
        """Return the peak of PyTorch's reserved memory on this GPU."""
        import torch

        return int(torch.cuda.max_memory_reserved(self.device()))

    def reset_peak_memory(self) -> None:
        """Start a new peak measurement."""
        import torch

        torch.cuda.reset_peak_memory_stats(self.device())

    def free_memory_bytes(self) -> int:
        """Return what the driver reports free, plus what PyTorch holds but does not use."""
        import torch

        device = self.device()
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)

    def total_memory_bytes(self) -> int:
        """Return the GPU's memory."""
        import torch

        return int(torch.cuda.get_device_properties(self.device()).total_memory)

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Return the data sheet's dense peak; fp32 counts TF32 where torch is set to use it."""
        import torch

        peak = peak_of(self.device_name())
        if peak is None:
            return None
        if dtype in (torch.bfloat16, torch.float16):
            return peak.half * 1e12
        if dtype == torch.float32:
            return (peak.tf32 if torch.get_float32_matmul_precision() != "highest" else peak.fp32) * 1e12
        return None

    @property
    def supports_bf16(self) -> bool:
        """True from Ampere on."""
        import torch

        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def peak_of(device_name: str) -> Peak | None:
    """Return the peaks of the longest model name contained in ``device_name``, or ``None``."""
    words = f" {device_name} "
    matches = [name for name in PEAKS if f" {name} " in words.replace("-", " ").replace("/", " ")]
    return PEAKS[max(matches, key=len)] if matches else None
