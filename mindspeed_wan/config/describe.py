"""The resolved configuration as a few lines a person reads before a run (``pretrain_sora.py --dry-run``)."""

from __future__ import annotations

from mindspeed_wan.config.schema import RunConfig

_WIDTH = 12


def describe(config: RunConfig, ranks: int | None = None) -> str:
    """Return what will be trained, on what, how and where to, then the notes.

    ``ranks`` is the size of the job, ``config.world_size`` by default; where neither is known, what depends on it is
    left out.
    """
    ranks = ranks or config.world_size
    rows = [
        ("expert", _expert(config)),
        ("model", _model(config)),
        ("adapters", _adapters(config)),
        ("encoders", _encoders(config)),
        ("clips", _clips(config)),
        ("ranks", _ranks(config, ranks)),
        ("batch", _batch(config, ranks)),
        ("optimizer", _optimizer(config)),
        ("memory", _memory(config)),
        ("start", _start(config)),
        ("save", _save(config)),
        ("validation", _validation(config)),
        ("files", ", ".join(config.sources.values()) or "none"),
    ]
    lines = [f"{name:<{_WIDTH}}{text}" for name, text in rows if text]
    lines += [f"{'note':<{_WIDTH}}{note}" for note in config.notes]
    return "\n".join(lines)


def _expert(config: RunConfig) -> str:
    diffusion = config.diffusion
    low, high = diffusion.sigma_range
    name = f"{diffusion.expert} noise" if diffusion.expert else "all noise levels"
    density = diffusion.density.replace("_", "-")
    return (
        f"{config.model.task} {name}, sigma {low:g} to {high:g}, shift {diffusion.shift:g}, "
        f"{density} density, weighting {diffusion.weighting}"
    )


def _model(config: RunConfig) -> str:
    wan = config.model.wan
    return f"{wan.num_layers} blocks, {wan.dim} wide, {wan.num_heads} heads, {wan.in_channels} input channels"


def _adapters(config: RunConfig) -> str:
    lora = config.lora
    return f"LoRA rank {lora.r}, alpha {lora.alpha:g} on {', '.join(lora.target_modules)}" if lora else ""


def _encoders(config: RunConfig) -> str:
    model = config.model
    vae = "cached latents" if model.load_video_features else f"VAE {model.vae.path} ({model.vae.dtype})"
    text = model.text_encoder
    words = "cached text" if model.load_text_features else f"UMT5 {text.path} ({text.dtype})"
    return f"{vae}; {words}"


def _clips(config: RunConfig) -> str:
    data = config.data
    size = f"{data.max_height}x{data.max_width}" if data.force_resolution else f"up to {data.max_pixels} pixels"
    return f"{data.data_path}, {data.num_frames} frames of {size}, empty captions {data.caption_dropout:.0%}"


def _ranks(config: RunConfig, ranks: int | None) -> str:
    parallel = config.parallel
    parts = [f"tensor {parallel.tensor}{' + sequence' if parallel.sequence_parallel else ''}"]
    parts.append(f"context {parallel.context} (Ulysses {parallel.ulysses} x ring {parallel.ring})")
    if parallel.pipeline > 1:
        parts.append(_stages(config, ranks))
    if ranks:
        parts += [f"data {parallel.data(ranks)}", f"of {ranks} in all"]
        if parallel.use_torch_fsdp2:
            parts.insert(3, f"FSDP2 over {config.shard_size(ranks)}")
    elif parallel.use_torch_fsdp2:
        parts.append(f"FSDP2 over {config.fsdp2.sharding_size or 1}")
    return ", ".join(parts)


def _stages(config: RunConfig, ranks: int | None) -> str:
    """Return the stages, and how much of a step they wait for each other."""
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    text = f"pipeline {stages}{f' x {chunks} chunks' if chunks > 1 else ''}"
    if not ranks:
        return text
    work = config.gradient_accumulation(ranks) * chunks
    return f"{text} (idle {(stages - 1) / (work + stages - 1):.0%})"


def _batch(config: RunConfig, ranks: int | None) -> str:
    training = config.training
    text = f"{training.micro_batch_size} per pass"
    if ranks:
        text += f", {config.gradient_accumulation(ranks)} passes, {config.global_batch(ranks)} per step"
    elif training.global_batch_size:
        text += f", {training.global_batch_size} per step"
    return f"{text}; {training.train_iters} steps, seed {training.seed}"


def _optimizer(config: RunConfig) -> str:
    optimizer = config.optimizer
    warmup = f", warm-up {optimizer.warmup_iters:g}" if optimizer.warmup_iters else ""
    states = ", moments in 8 bits" if optimizer.name == "adam8bit" else ""
    if optimizer.cpu_offload:
        states = f", {optimizer.offload_fraction:.0%} of its state in host memory"
    return (
        f"AdamW{states}, lr {optimizer.lr:g} to {optimizer.min_lr:g} {optimizer.decay_style}{warmup}, "
        f"weight decay {optimizer.weight_decay:g}, clip {optimizer.clip_grad:g}"
    )


def _memory(config: RunConfig) -> str:
    training = config.training
    recompute = training.recompute
    if config.parallel.use_torch_fsdp2 and config.fsdp2.recompute_modules:
        kept = f"recompute {', '.join(config.fsdp2.recompute_modules)}"
    elif recompute.granularity == "none":
        kept = "activations kept"
    else:
        kept = f"recompute {'all' if recompute.method == 'uniform' else f'the first {recompute.num_layers}'} blocks"
        kept += f", one in {recompute.every_k}" if recompute.every_k > 1 else ""
        kept += " but attention" if recompute.keep_attention else ""
    kept += ", their inputs in host memory" if recompute.offload else ""
    kept += ", compiled blocks" if training.compile_blocks else ""
    kept += f", attention by {training.attention}" if training.attention != "auto" else ""
    ema = f", EMA {training.ema_decay:g}" if training.ema_decay else ""
    lora = config.lora
    weights = f"frozen {lora.base_dtype or training.precision} base, fp32 adapters" if lora else "fp32 master weights"
    return f"{training.precision} compute, {weights}, {kept}{ema}"


def _start(config: RunConfig) -> str:
    checkpoint = config.checkpoint
    if checkpoint.from_scratch and not checkpoint.load:
        return "random weights"
    if config.lora is not None and not checkpoint.load_base_model:
        return f"fresh adapters on base weights {checkpoint.load}"
    base = f", on base weights {checkpoint.load_base_model}" if checkpoint.load_base_model else ""
    return f"{checkpoint.load or 'nothing'}{' (weights only)' if checkpoint.finetune else ''}{base}"


def _save(config: RunConfig) -> str:
    checkpoint = config.checkpoint
    if not checkpoint.save:
        return "nowhere"
    every = f"every {checkpoint.save_interval} steps and " if checkpoint.save_interval else ""
    return f"{checkpoint.save}, {every}at the end, {checkpoint.ckpt_format}"


def _validation(config: RunConfig) -> str:
    training, given, parts = config.training, config.validation, []
    if training.eval_interval and training.eval_iters:
        clips = config.valid_data.data_path if config.valid_data is not None else "the first training clips"
        parts.append(f"loss every {training.eval_interval} steps on {training.eval_iters} batches of {clips}")
    if given.prompts:
        other = given.other_expert or "none"
        parts.append(f"videos of {given.prompts} every {given.video_interval} steps, other expert {other}")
    return "; ".join(parts)
