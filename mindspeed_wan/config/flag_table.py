"""The command line as a table: every flag of the MindSpeed-MM launchers, Megatron's usual ones, and ours.

``effect`` says what a flag does here: ``used`` sets the value at ``target`` (a dotted path of ``RunConfig``, or a name
under ``files`` or ``extra`` that ``load`` works out); ``noted`` is accepted, changes nothing, and the run says so
once; ``refused`` stops the run with the reason and what to use instead. Flags without an effect are in
``flag_table_inert``. Plain data: nothing is imported, so ``--help`` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["switch", "int", "float", "text", "texts"]


@dataclass(frozen=True)
class Flag:
    """One row.

    ``kind``: switch takes no value and sets ``value``; texts takes one or more. ``reason``: why a flag is noted or
    refused (or why its ``choices`` are so few), and what to use instead. ``accepts``: values of a refused flag that
    mean what happens here anyway. ``own``: not one of Megatron's or MindSpeed-MM's.
    """

    name: str
    kind: Kind
    target: str
    help: str
    group: str = ""
    choices: tuple[str, ...] = ()
    value: Any = True
    effect: Literal["used", "noted", "refused"] = "used"
    reason: str = ""
    accepts: tuple[str, ...] = ()
    own: bool = False


def _group(title: str, *flags: tuple[Any, ...] | Flag) -> tuple[Flag, ...]:
    rows = [flag if isinstance(flag, Flag) else Flag(*flag) for flag in flags]
    return tuple(Flag(**{**row.__dict__, "group": title}) for row in rows)


FILES = _group(
    "files",
    ("--mm-model", "text", "files.model", "model.json: expert, encoders, flow matching"),
    ("--mm-data", "text", "files.data", "data.json: clips, sizes, captions, order"),
    Flag("--valid-mm-data", "text", "files.valid", "clips of the validation loss (default: the first training clips)",
         own=True),
    ("--fsdp2-config-path", "text", "files.fsdp2", "YAML that says what FSDP2 shards and recomputes"),
)

EXPERT = _group(
    "expert and noise (each overrides the model file)",
    Flag("--expert", "text", "extra.expert", "which expert to train (pretrain_sora.py: both as well)",
         choices=("high", "low"), own=True),
    Flag("--expert-ranks", "text", "extra.expert_ranks",
         "with --expert both: ranks of each, HIGH,LOW or even (default: in turn, on all)",
         own=True),
    Flag("--boundary", "float", "extra.boundary", "sigma at which the experts change (T2V 0.875, I2V 0.9)", own=True),
    Flag("--timestep-weighting", "text", "diffusion.weighting", "loss weight by sigma", own=True,
         choices=("none", "mm", "sigma_sqrt", "cosmap")),
    Flag("--timestep-density", "text", "diffusion.density", "density of the unshifted sigma", own=True,
         choices=("uniform", "logit_normal")),
    Flag("--timestep-grid", "text", "diffusion.grid", "any sigma, or the 1000 training indices", own=True,
         choices=("continuous", "index")),
)  # fmt: skip

PARALLEL = _group(
    "ranks",
    ("--tensor-model-parallel-size", "int", "parallel.tensor", "ranks that share each weight matrix"),
    ("--sequence-parallel", "switch", "parallel.sequence_parallel", "shard activations over the tensor ranks too"),
    ("--context-parallel-size", "int", "parallel.context", "ranks that share the tokens of one clip"),
    Flag("--context-parallel-algo", "text", "parallel.context_parallel_algo",
         "attention across those ranks: all-to-all over heads, ring, or both",
         choices=("ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo")),
    ("--ulysses-degree-in-cp", "int", "parallel.ulysses_degree_in_cp", "Ulysses part of hybrid_cp_algo"),
    Flag("--ulysses-overlap-chunks", "int", "parallel.ulysses_chunks",
         "groups of heads: one is exchanged while another attends (default: 1, no overlap)", own=True),
    ("--pipeline-model-parallel-size", "int", "parallel.pipeline", "stages that each hold a part of the blocks"),
    ("--virtual-pipeline-model-parallel-size", "int", "extra.virtual_pipeline", "chunks of blocks per pipeline stage"),
    ("--num-layers-per-virtual-pipeline-stage", "int", "extra.layers_per_chunk", "the same as blocks per chunk"),
    ("--use-torch-fsdp2", "switch", "parallel.use_torch_fsdp2", "shard parameters and optimizer state (fully_shard)"),
    ("--distributed-timeout-minutes", "float", "parallel.distributed_timeout_minutes",
     "minutes to wait for another rank before the job fails"),
    Flag("--device", "text", "training.device", "default: the first of npu, cuda, cpu that is there", own=True,
         choices=("npu", "cuda", "cpu")),
    Flag("--world-size", "int", "extra.world_size", "with --dry-run: check the layout for this many ranks", own=True),
)  # fmt: skip

BATCH = _group(
    "batch and length",
    ("--micro-batch-size", "int", "training.micro_batch_size", "clips per forward pass and data-parallel rank"),
    ("--global-batch-size", "int", "training.global_batch_size", "clips per optimizer step over all ranks"),
    ("--train-iters", "int", "training.train_iters", "optimizer steps of the whole run"),
    ("--train-samples", "int", "extra.train_samples", "the same in clips"),
    ("--seed", "int", "training.seed", "seed of data order, noise, sigmas and initialisation"),
    ("--num-workers", "int", "training.num_workers", "data loader processes per rank"),
    ("--exit-interval", "int", "training.exit_interval", "save and stop at an iteration divisible by this"),
    ("--exit-duration-in-mins", "float", "training.exit_duration_minutes", "save and stop after this many minutes"),
    ("--eval-interval", "int", "training.eval_interval", "iterations between validation losses"),
    ("--eval-iters", "int", "training.eval_iters", "global batches per validation loss"),
    Flag("--max-bad-fraction", "float", "data.max_bad_fraction", "share of clips that may be unreadable", own=True),
    Flag("--dry-run", "switch", "training.dry_run", "resolve and check everything, train nothing", own=True),
)

PRECISION = _group(
    "precision and memory",
    Flag("--bf16", "switch", "extra.precision", "compute in bf16 (master weights and reduction: fp32)", value="bf16"),
    Flag("--downcast-to-bf16", "switch", "extra.precision", "the same as --bf16", value="bf16"),
    Flag("--fp32", "switch", "extra.precision", "compute in fp32, whatever the files say", value="fp32", own=True),
    Flag("--recompute-granularity", "text", "training.recompute.granularity", "recompute blocks in the backward pass",
         choices=("full",), reason="use full; --recompute-skip-core-attention keeps attention"),
    Flag("--recompute-method", "text", "training.recompute.method", "every block, or the first ones only",
         choices=("uniform", "block")),
    ("--recompute-num-layers", "int", "training.recompute.num_layers", "how many first blocks, with block"),
    Flag("--recompute-every", "int", "training.recompute.every_k", "every k-th of these blocks only", own=True),
    ("--recompute-skip-core-attention", "switch", "training.recompute.keep_attention",
     "keep the results of attention, recompute the rest"),
    Flag("--recompute-offload", "switch", "training.recompute.offload",
         "keep the inputs of recomputed blocks in host memory", own=True),
    Flag("--compile", "switch", "training.compile_blocks", "compile the blocks with torch.compile", own=True),
    Flag("--attention", "text", "training.attention", "attention kernel by name; default auto", own=True,
         choices=("auto", "sdpa", "torch_flash", "torch_efficient", "torch_math", "cudnn", "flash2", "flash3", "sage",
                  "npu")),
    Flag("--deterministic", "switch", "training.deterministic", "same job, same bits (slower)", own=True),
    ("--deterministic-mode", "switch", "training.deterministic", "Megatron's name for --deterministic"),
    ("--use-deter-comp", "switch", "training.deterministic", "MindSpeed-MM's name for --deterministic"),
    ("--npu-deterministic", "switch", "training.deterministic", "MindSpeed's name for --deterministic"),
    Flag("--bad-step-policy", "text", "training.bad_step_policy", "after NaN, Inf or a spike of the loss", own=True,
         choices=("stop", "skip", "rollback")),
    Flag("--max-bad-steps", "int", "training.max_bad_steps", "so many bad steps in a row end the run", own=True),
    Flag("--loss-spike-factor", "float", "training.loss_spike_factor",
         "a loss above this many times its moving average is a bad step", own=True),
    Flag("--ema-decay", "float", "training.ema_decay", "keep a moving average of the weights", own=True),
)  # fmt: skip

OPTIMIZER = _group(
    "optimizer",
    ("--lr", "float", "optimizer.lr", "peak learning rate"),
    ("--min-lr", "float", "optimizer.min_lr", "learning rate after the decay"),
    Flag("--lr-decay-style", "text", "optimizer.decay_style", "shape of the decay",
         choices=("constant", "linear", "cosine", "inverse-square-root", "WSD")),
    ("--lr-decay-iters", "int", "optimizer.decay_iters", "iterations until --min-lr (default: --train-iters)"),
    ("--lr-decay-samples", "int", "extra.lr_decay_samples", "the same in clips, with --train-samples"),
    ("--lr-warmup-iters", "int", "optimizer.warmup_iters", "iterations of linear warm-up"),
    ("--lr-warmup-samples", "int", "extra.lr_warmup_samples", "the same in clips, with --train-samples"),
    ("--lr-warmup-fraction", "float", "extra.lr_warmup_fraction", "warm-up as a fraction of the decay iterations"),
    ("--lr-warmup-init", "float", "optimizer.warmup_init", "learning rate at the start of the warm-up"),
    Flag("--lr-wsd-decay-style", "text", "optimizer.wsd_decay_style", "shape of WSD's final decay",
         choices=("exponential", "linear", "cosine", "minus_sqrt")),
    ("--lr-wsd-decay-iters", "int", "optimizer.wsd_decay_iters", "iterations of WSD's final decay"),
    ("--lr-wsd-decay-samples", "int", "extra.lr_wsd_decay_samples", "the same in clips, with --train-samples"),
    ("--weight-decay", "float", "optimizer.weight_decay", "decoupled weight decay"),
    ("--start-weight-decay", "float", "optimizer.start_weight_decay", "weight decay at the start, when scheduled"),
    ("--end-weight-decay", "float", "optimizer.end_weight_decay", "weight decay at the end, when scheduled"),
    Flag("--weight-decay-incr-style", "text", "optimizer.weight_decay_incr_style", "shape in between",
         choices=("constant", "linear", "cosine")),
    ("--adam-beta1", "float", "optimizer.beta1", "first-moment decay"),
    ("--adam-beta2", "float", "optimizer.beta2", "second-moment decay"),
    ("--adam-eps", "float", "optimizer.eps", "added to the root of the second moment"),
    ("--clip-grad", "float", "optimizer.clip_grad", "cut the global gradient norm to this; 0 does not"),
    Flag("--optimizer", "text", "extra.optimizer", "AdamW under both of Megatron's names, or with moments in 8 bits",
         choices=("adam", "adamw", "adam8bit")),
    ("--optimizer-cpu-offload", "switch", "optimizer.cpu_offload", "keep the optimizer's state in host memory"),
    ("--optimizer-offload-fraction", "float", "optimizer.offload_fraction", "how much of it (default: all)"),
    Flag("--optimizer-selection", "text", "extra.optimizer_selection", "AdamW, fused where the device can",
         choices=("fused_torch_adamw", "fused_adamw", "torch_adamw")),
)  # fmt: skip

CHECKPOINT = _group(
    "checkpoints",
    ("--load", "text", "checkpoint.load", "checkpoint root to start or resume from"),
    ("--save", "text", "checkpoint.save", "checkpoint root to write to"),
    ("--save-interval", "int", "checkpoint.save_interval", "iterations between saves (the end is always saved)"),
    Flag("--from-scratch", "switch", "checkpoint.from_scratch", "start from random weights on purpose", own=True),
    ("--finetune", "switch", "checkpoint.finetune", "take the weights of --load only; start at iteration 0"),
    ("--no-load-optim", "switch", "checkpoint.no_load_optim", "do not load optimizer state"),
    ("--no-save-optim", "switch", "checkpoint.no_save_optim", "smaller checkpoints that cannot be resumed exactly"),
    Flag("--ckpt-format", "text", "checkpoint.ckpt_format", "format of saves; --load reads every format",
         choices=("torch_dcp",), reason="save torch_dcp; mm-convert dcp_to_mm makes MindSpeed-MM's mp_rank files"),
    ("--ckpt-step", "int", "checkpoint.ckpt_step", "load this iteration instead of the newest"),
    ("--async-save", "switch", "checkpoint.async_save", "write while training goes on"),
    Flag("--keep-last", "int", "checkpoint.keep_last", "keep this many newest checkpoints", own=True),
    Flag("--strict-resume", "switch", "checkpoint.strict_resume", "never fall back to an older checkpoint", own=True),
    Flag("--verify", "switch", "checkpoint.verify", "check SHA-256 of every file on load", own=True),
)  # fmt: skip

LORA = _group(
    "LoRA (any of these trains adapters instead of all weights)",
    ("--lora-r", "int", "lora.r", "rank"),
    ("--lora-alpha", "float", "lora.alpha", "the update is scaled by alpha / r"),
    ("--lora-dropout", "float", "lora.dropout", "dropout before the A matrix"),
    ("--lora-target-modules", "texts", "extra.lora_target_modules", "modules that get adapters; commas or spaces"),
    ("--load-base-model", "text", "checkpoint.load_base_model", "base weights, when --load holds an adapter"),
    Flag("--base-dtype", "text", "lora.base_dtype", "hold the frozen base in this type (default: the compute type)",
         choices=("bf16", "fp32", "fp8", "int8"), own=True),
    Flag("--base-keep", "texts", "lora.base_keep", "block layers that fp8 and int8 leave alone: blocks.0 ffn.2",
         own=True),
    Flag("--lora-rslora", "switch", "lora.rslora", "scale by alpha / sqrt(r)", own=True),
    Flag("--lora-format", "text", "lora.format", "format of the adapter file beside each save", own=True,
         choices=("diffusers", "kohya", "kohya2", "comfy", "diffsynth", "lightx2v", "mm")),
    Flag("--lora-rank-pattern", "texts", "extra.lora_rank_pattern", "other ranks for some modules: ffn.0=64", own=True),
)

VALIDATION = _group(
    "validation videos",
    Flag("--validation-prompts", "text", "validation.prompts", "file: a prompt a line, or JSON with prompt and image",
         own=True),
    Flag("--validation-video-interval", "int", "validation.video_interval", "iterations between validation videos",
         own=True),
    Flag("--validation-other-expert", "text", "validation.other_expert",
         "weights of the expert that is not trained, for its steps", own=True),
    Flag("--validation-steps", "int", "validation.steps", "sampling steps (default: the task's)", own=True),
    Flag("--validation-shift", "float", "validation.shift", "flow shift of sampling (default: the task's)", own=True),
    Flag("--validation-guidance", "float", "validation.guidance", "guidance scale, 1 is without (default: the task's)",
         own=True),
    Flag("--validation-negative-prompt", "text", "validation.negative_prompt", "default: empty", own=True),
)  # fmt: skip

LOGGING = _group(
    "logging",
    ("--log-interval", "int", "logging.log_interval", "iterations between log lines"),
    ("--tensorboard-dir", "text", "logging.tensorboard_dir", "default: <save>/tensorboard"),
)

USED: tuple[Flag, ...] = (
    FILES + EXPERT + PARALLEL + BATCH + PRECISION + OPTIMIZER + CHECKPOINT + LORA + VALIDATION + LOGGING
)  # fmt: skip
