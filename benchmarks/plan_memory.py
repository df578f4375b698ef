"""Peak memory of real training steps and generations on the CPU, for the planner's model to be compared with.

What counts is every live tensor storage, seen by a dispatch mode: parameters, optimizer state, gradients, saved
activations, gathered parameters, buffers of collectives and temporaries between operators. What a kernel allocates
inside itself is not seen (nor planned).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mindspeed_wan.models.wan.config import WanConfig


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the model and the clip, and tensor parallelism."""

    name: str
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    latent: tuple[int, int, int]
    tensor: int = 1

    @property
    def config(self) -> WanConfig:
        """The DiT, of each expert."""
        return WanConfig(dim=self.dim, ffn_dim=self.ffn_dim, num_heads=self.num_heads, num_layers=self.num_layers,
                         text_dim=128)


@dataclass(frozen=True, kw_only=True)
class Case(Sizes):
    """One training job: the layout and what is recomputed."""

    sequence_parallel: bool = False
    context: int = 1
    algorithm: str = "ulysses_cp_algo"
    data: int = 1
    fsdp2: bool = False
    precision: str = "fp32"
    recompute: bool = False
    keep_attention: bool = False
    fp32_residual: bool = False
    micro_batch: int = 1
    lora_rank: int = 0
    adam8bit: bool = False

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tensor * self.context * self.data


@dataclass
class LivePeak(TorchDispatchMode):
    """Counts the bytes of live storages; ``peak`` is the most since ``reset``."""

    live: int = 0
    peak: int = 0
    _sizes: dict[int, int] = field(default_factory=dict)
    _resize: Any = None

    def __post_init__(self) -> None:
        super().__init__()

    def reset(self) -> None:
        """Start a new peak at what is live now."""
        self.peak = self.live

    def watch(self, tensor: Tensor) -> None:
        """Count a tensor made outside the mode."""
        for part in _plain_tensors(tensor):
            self._watch_storage(part.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.watch(leaf)
        return result

    def __enter__(self) -> LivePeak:
        self._resize = original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            outcome = original(storage, size)
            if id(storage) in self._sizes:
                self._set(id(storage), size)
            return outcome

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        super().__exit__(kind, error, traceback)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def _watch_storage(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._sizes:
            return
        weakref.finalize(storage, self._forget, key)
        self._set(key, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def _plain_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the tensors with memory of their own: a DTensor's local part."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        parts = (getattr(tensor, name) for name in names)
        return [leaf for part in parts if isinstance(part, Tensor) for leaf in _plain_tensors(part)]
    return [tensor] if tensor.device.type != "meta" else []


def measure_rank(rank: int, world_size: int, case: Case) -> dict[str, float]:
    """Run two optimizer steps as one rank; return bytes: ``states`` at rest, and the peaks of the second step."""
    from mindspeed_wan.config.schema import RunConfig
    from mindspeed_wan.models.wan.provider import init_weights
    from mindspeed_wan.parallel.grads import finish_grads
    from mindspeed_wan.parallel.groups import build_groups
    from mindspeed_wan.platforms import get_platform
    from mindspeed_wan.training import setup
    from mindspeed_wan.training.byte_states import ByteStates
    from mindspeed_wan.training.optimizer import AdamW, ResidentStates

    platform = get_platform("cpu")
    platform.activate()
    wan = case.config
    config = RunConfig(
        parallel={"tensor": case.tensor, "sequence_parallel": case.sequence_parallel, "context": case.context,
                  "context_parallel_algo": case.algorithm, "use_torch_fsdp2": case.fsdp2},
        model={"wan": wan.to_dict(), "fp32_residual": case.fp32_residual},
        training={"precision": case.precision, "micro_batch_size": case.micro_batch,
                  "recompute": {"granularity": "full" if case.recompute else "none",
                                "keep_attention": case.keep_attention}},
        lora={"r": case.lora_rank} if case.lora_rank else None,
    )
    tracker = LivePeak()
    with tracker:
        groups = build_groups(setup.parallel_dims(config, world_size), platform)
        model = setup.build_model(config, wan, groups, platform)
        init_weights(model, 0, groups)
        optimizer = AdamW(model.named_parameters(), states=ByteStates if case.adam8bit else ResidentStates)
        for tensor in (*model.parameters(), *optimizer.masters().values()):
            tracker.watch(tensor.detach())
        latents = torch.randn(case.micro_batch, wan.in_channels, *case.latent)
        text = torch.randn(case.micro_batch, wan.text_len, wan.text_dim)
        result: dict[str, float] = {}
        for _ in range(2):  # gradients and caches exist from the second step on
            states = tracker.live
            tracker.reset()
            velocity = model(latents, torch.full((case.micro_batch,), 500.0), text)
            loss = (velocity - latents[:, : wan.out_channels]).square().mean()
            del velocity
            result["saved"] = tracker.live - states
            loss.backward()
            del loss
            result["states"], result["step"] = states, tracker.peak
            result["gradients"] = tracker.live - states
            tracker.reset()
            finish_grads(model, groups, 1.0)
            optimizer.step(1e-3, 0.01)
            result["update"] = tracker.peak
            optimizer.zero_grad()
    return result


def measure(case: Case, run: Callable[..., list[Any]]) -> dict[str, float]:
    """Measure a case with ``tests.helpers.spawn.run_ranks``; returns rank 0's bytes."""
    return dict(run(measure_rank, case.world_size, case, init=case.world_size > 1)[0])


@dataclass(frozen=True, kw_only=True)
class GenerationCase(Sizes):
    """The denoising of one video: layout, memory mode, form of the weights."""

    ulysses: int = 1
    ring: int = 1
    cfg: int = 1
    pipeline: int = 1
    dit_fsdp: bool = False
    memory: str = "resident"
    quantize: str | None = None
    precision: str = "bf16"
    patches: int = 1

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tensor * self.ulysses * self.ring * self.cfg * self.pipeline

class _OneExpert:
    """A model that plays both experts: what is on the device when they take turns."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def use(self, name: str) -> Any:
        """Return the model."""
        return self._model


def measure_generation_rank(rank: int, world_size: int, case: GenerationCase) -> float:
    """Denoise one video as one rank, 6 steps over both experts; return the bytes of its peak on the device."""
    from functools import partial

    from mindspeed_wan.diffusion.schedule import sigmas
    from mindspeed_wan.diffusion.solvers import make_solver
    from mindspeed_wan.inference.block_stream import StreamedExperts
    from mindspeed_wan.inference.denoise import Conditions, Denoiser
    from mindspeed_wan.inference.experts import InferenceFsdp2, ResidentExperts
    from mindspeed_wan.inference.pipefusion import PipeFusion
    from mindspeed_wan.inference.pipeline_stages import StagedModel, WholeModel
    from mindspeed_wan.inference.runtime import DTYPES, start
    from mindspeed_wan.models.quantization import quantize_layers
    from mindspeed_wan.models.quantization_spec import QuantizationSpec
    from mindspeed_wan.models.wan.provider import build_wan
    from mindspeed_wan.parallel.inference_layout import InferenceLayout
    from mindspeed_wan.platforms import get_platform

    wan = case.config
    layout = InferenceLayout(world_size=world_size, tensor=case.tensor, ulysses=case.ulysses, ring=case.ring,
                             cfg=case.cfg, pipeline=case.pipeline, dit_fsdp=case.dit_fsdp)
    tracker = LivePeak()
    with tracker, torch.no_grad():
        runtime = start(get_platform("cpu"), layout, 5.0)

        def build() -> Any:
            spec = None if case.quantize is None else QuantizationSpec(case.quantize)
            sharding: Any = InferenceFsdp2() if case.dit_fsdp else None
            model = build_wan(
                wan, groups=runtime.groups, platform=runtime.platform, param_dtype=DTYPES[case.precision],
                residual_dtype=torch.float32, fsdp2=sharding,
                modify=None if spec is None else lambda model: (quantize_layers(model, spec), None)[1])
            for parameter in model.requires_grad_(False).parameters():
                tracker.watch(parameter)
                parameter.zero_()
            return model

        names = ("high", "low")
        experts: Any
        on_host = 0
        if case.memory == "sequential":
            experts = _OneExpert(build())
        else:
            models = {name: build() for name in names}
            experts = ResidentExperts(models)
            if case.memory == "block":
                on_host = sum(p.nbytes for model in models.values() for p in model.blocks.parameters())
                experts = StreamedExperts(models, runtime)
        groups = runtime.groups
        fusion = partial(PipeFusion, patches=case.patches, warmup=1) if case.patches > 1 else StagedModel
        runner = WholeModel() if groups.pp is None else fusion(groups)
        denoiser = Denoiser(experts, runtime, sigmas(6, 5.0), make_solver("unipc"), scales={"high": 4.0, "low": 3.0},
                            boundary=0.875, runner=runner)
        text = torch.randn(2, wan.text_len, wan.text_dim)
        tracker.reset()
        denoiser.run(torch.randn(1, wan.out_channels, *case.latent), Conditions(prompt=text[0], negative=text[1]))
    return float(tracker.peak - on_host)


def measure_generation(case: GenerationCase, run: Callable[..., list[Any]]) -> float:
    """Measure a case with ``tests.helpers.spawn.run_ranks``; returns the largest rank's bytes."""
    return float(max(run(measure_generation_rank, case.world_size, case, init=case.world_size > 1)))
