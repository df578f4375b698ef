"""From a checked configuration to a run that is ready to train, in one visible order.

platform -> process groups -> model on the meta device, cut and given memory -> optimizer -> weights or checkpoint ->
encoders and data at the restored position -> writers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_wan.checkpoint.lock import FolderLock
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.models.wan.flops import latent_shape, training_flops
from mindspeed_wan.models.wan.model import WanDiT
from mindspeed_wan.models.wan.provider import build_wan
from mindspeed_wan.parallel.agreement import first_decides, is_first
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.grads import accumulate_in_fp32
from mindspeed_wan.parallel.groups import ParallelGroups, build_groups
from mindspeed_wan.parallel.pipeline import PipelinePlan
from mindspeed_wan.platforms import attention, ops
from mindspeed_wan.platforms.base import Platform
from mindspeed_wan.platforms.compiler import check_compiler
from mindspeed_wan.training import adapters, memory_options
from mindspeed_wan.training.ema import Ema
from mindspeed_wan.training.guard import Guard
from mindspeed_wan.training.loop import Run
from mindspeed_wan.training.lr_schedule import Schedule
from mindspeed_wan.training.metrics import MetricsWriter, Throughput, write_provenance
from mindspeed_wan.training.objective import Objective
from mindspeed_wan.training.optimizer import AdamW
from mindspeed_wan.training.pipeline import PipelineStep
from mindspeed_wan.training.restore import model_card, restore
from mindspeed_wan.training.saving import Saver
from mindspeed_wan.training.source import FeedOpener, OwnFeed
from mindspeed_wan.training.start import command_digest, leave_other_branches
from mindspeed_wan.training.step import TrainStep
from mindspeed_wan.training.validation import Validation
from mindspeed_wan.training.validation_videos import ValidationVideos


def prepare(config: RunConfig, platform: Platform, open_feed: FeedOpener = OwnFeed) -> Run:
    """Build everything a run needs. Collective; ``init_distributed`` has been called.

    Args:
        config: the resolved configuration.
        platform: where it runs.
        open_feed: makes the run's data; each rank reads and encodes its own unless told otherwise.

    Raises:
        WanError: what cannot work, before the first step.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    groups = build_groups(parallel_dims(config, world_size), platform,
                          timeout_minutes=config.parallel.distributed_timeout_minutes)
    if config.training.deterministic:
        make_deterministic()
    lock = FolderLock(config.checkpoint.save) if config.checkpoint.save is not None else None
    if lock is not None:
        first_decides(lock.acquire)
    wan = WanConfig.from_dict(config.model.wan.to_dict())
    if config.training.compile_blocks:
        check_compiler(platform)
    choose_attention(config, platform)
    memory_options.say_what_is_left_out(config, platform)
    model = build_model(config, wan, groups, platform)
    views = adapters.trained_views(config, model, groups)
    section = config.optimizer
    optimizer = AdamW(model.named_parameters(), betas=(section.beta1, section.beta2), eps=section.eps,
                      fused=section.fused, states=memory_options.optimizer_states(config, platform))
    ema = Ema(optimizer.masters(), config.training.ema_decay) if config.training.ema_decay is not None else None
    progress = restore(config, model, groups, optimizer, ema)
    progress.global_batch_size = config.global_batch(world_size)
    progress.command = command_digest(config)
    source = open_feed(config, groups, platform, progress)
    step = train_step(config, model, groups, platform)
    evaluates = config.training.eval_interval is not None and config.training.eval_iters > 0
    run = Run(
        config=config,
        platform=platform,
        step=step,
        optimizer=optimizer,
        schedule=schedule(config, world_size),
        progress=progress,
        features=source.features,
        source=source,
        rates=throughput(config, wan, world_size, platform),
        guard=Guard(config.training),
        first_rank=is_first(),
        ema=ema,
        evaluate=Validation(config, step, source.evaluation) if evaluates else None,
        show=ValidationVideos(config, model, groups, platform) if config.validation.prompts else None,
    )
    if lock is not None:
        files = adapters.AdapterFiles(config, model, groups, ema) if config.lora is not None else None
        _open_save_folder(run, views, model_card(config, wan), lock, files)
    return run


def choose_attention(config: RunConfig, platform: Platform) -> None:
    """Use the attention kernel that the configuration names.

    Raises:
        ConfigError: it is not installed, or not for this device and precision.
    """
    name = config.training.attention
    if name != "auto":
        attention.check_device(name, platform.device_type, _compute_dtype(config))
    ops.use_attention(name, needs_grad=True)


def _compute_dtype(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.training.precision == "bf16" else torch.float32


def parallel_dims(config: RunConfig, world_size: int) -> ParallelDims:
    """Return the layout; without FSDP2 every data x context rank holds all parameters of its tensor shard."""
    parallel = config.parallel
    return ParallelDims(world_size=world_size, tensor=parallel.tensor, sequence_parallel=parallel.sequence_parallel,
                        context=parallel.context, ulysses=parallel.ulysses, pipeline=parallel.pipeline,
                        virtual=parallel.virtual_pipeline or 1, shard=config.shard_size(world_size))


def build_model(config: RunConfig, wan: WanConfig, groups: ParallelGroups, platform: Platform) -> WanDiT:
    """Build the sharded DiT with fp32 parameters (frozen ones: ``base_dtype``); its values are still undefined.

    bf16 goes through FSDP2 also where nothing is sharded: it keeps fp32 masters, gathers bf16 copies and reduces
    gradients in fp32. A pipeline stage holds bf16 parameters instead, whose masters are the optimizer's.
    """
    bf16, dims = config.training.precision == "bf16", groups.dims
    fsdp2: Any = None  # a Fsdp2Section; its Literal fields are narrower than the protocol's strings
    if config.parallel.use_torch_fsdp2 or (bf16 and dims.pipeline == 1):
        fsdp2 = config.fsdp2.model_copy(update={"param_dtype": config.training.precision})
    staged = dims.pipeline > 1
    plan = None
    if staged:
        plan = PipelinePlan.of(wan.num_layers, dims.pipeline, dims.virtual, config.model.pipeline_num_layers)
    model = build_wan(wan, groups=groups, platform=platform,
                      param_dtype=torch.bfloat16 if bf16 and staged else adapters.base_dtype(config),
                      fsdp2=fsdp2,
                      residual_dtype=torch.float32 if config.model.fp32_residual else None,
                      recompute=memory_options.recompute_plan(config, platform),
                      compile_blocks=config.training.compile_blocks, ulysses_chunks=config.parallel.ulysses_chunks,
                      modify=adapters.modifier(config), pipeline=plan)
    if staged:
        accumulate_in_fp32(model)
    return model


def train_step(config: RunConfig, model: WanDiT, groups: ParallelGroups, platform: Platform) -> TrainStep:
    """Return the step for this configuration."""
    world_size = groups.dims.world_size
    kind: Callable[..., TrainStep]
    kind = adapters.DropoutStep if config.lora is not None and config.lora.dropout else TrainStep
    if groups.dims.pipeline > 1:
        kind = partial(PipelineStep, platform=platform)
    return kind(
        model, Objective(config.diffusion, config.training.seed), groups,
        accumulation=config.gradient_accumulation(world_size), micro_batch_size=config.training.micro_batch_size,
        device=platform.device(), clip_norm=config.optimizer.clip_grad,
    )


def schedule(config: RunConfig, world_size: int) -> Schedule:
    """Return the learning-rate schedule in samples."""
    section, batch = config.optimizer, config.global_batch(world_size)
    start = section.start_weight_decay if section.start_weight_decay is not None else section.weight_decay
    end = section.end_weight_decay if section.end_weight_decay is not None else section.weight_decay
    return Schedule(
        max_lr=section.lr, min_lr=section.min_lr, init_lr=section.warmup_init,
        warmup_samples=section.warmup_iters * batch,
        decay_samples=(section.decay_iters or config.training.train_iters) * batch,
        decay_style=section.decay_style, wsd_samples=(section.wsd_decay_iters or 0) * batch,
        wsd_style=section.wsd_decay_style, start_weight_decay=start, end_weight_decay=end,
        weight_decay_style=section.weight_decay_incr_style,
        weight_decay_samples=config.training.train_iters * batch,
    )


def throughput(config: RunConfig, wan: WanConfig, world_size: int, platform: Platform) -> Throughput:
    """Return the rates of this run; FLOP are those of the configured clip size."""
    latent = latent_shape(config.data.num_frames, config.data.max_height, config.data.max_width)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    # A frozen base has no weight gradients: two of the three passes' worth of arithmetic.
    flops = training_flops(wan, latent) * (1.0 if config.lora is None else 2 / 3)
    return Throughput(flops_per_sample=flops, global_batch_size=config.global_batch(world_size),
                      world_size=world_size, peak_flops=platform.peak_flops(dtype))


def make_deterministic() -> None:
    """Use deterministic kernels only (``--deterministic``)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def _open_save_folder(run: Run, views: dict[str, Tensor], card: dict[str, object], lock: FolderLock,
                      files: adapters.AdapterFiles | None) -> None:
    """Clear the folder of other branches, write what produced the run and open its metrics on rank 0.

    An unwritable folder fails on every rank.
    """
    section = run.config.checkpoint
    save = str(section.save)
    told = first_decides(lambda: leave_other_branches(run.config))
    if told and run.first_rank:
        print(f" {told}", flush=True)
    run.saver = Saver(section, views, run.optimizer, run.ema, card, lock, files, start=run.progress.iteration)
    first_decides(lambda: write_provenance(save, run.config.resolved()))
    if run.first_rank:
        run.writer = MetricsWriter(save, start=run.progress.iteration,
                                   tensorboard_dir=run.config.logging.tensorboard_dir)
