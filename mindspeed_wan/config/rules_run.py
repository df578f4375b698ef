"""Rules about how the run is done: ranks, batch, optimizer, checkpoints. Each rule returns its mistakes."""

from __future__ import annotations

from pathlib import Path

from mindspeed_wan.config.rule import RuleRow, divisors, listed, mistake
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.errors import ConfigError

TRACKER = "latest_checkpointed_iteration.txt"
"""File beside the iterations of a checkpoint root."""


def pipeline_combines(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """What does not go with pipeline stages is refused."""
    parallel, found = config.parallel, []
    if parallel.pipeline == 1:
        if parallel.virtual_pipeline:
            message = f"{parallel.virtual_pipeline} virtual pipeline chunks without pipeline stages"
            return mistake(message, "leave it out, or raise --pipeline-model-parallel-size")
        return []
    if parallel.use_torch_fsdp2:
        message = (f"--pipeline-model-parallel-size {parallel.pipeline} with --use-torch-fsdp2: a stage runs many "
                   "micro-batches per step, and FSDP2 would gather its parameters anew for each")
        found += mistake(message, "use one of the two; tensor and context parallel go with both")
    if config.lora is not None and config.lora.dropout:
        message = "--lora-dropout with pipeline stages: several micro-batches are under way, and masks belong to one"
        found += mistake(message, "use --lora-dropout 0, or no pipeline")
    return found


def pipeline_splits_blocks(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Every chunk of every stage gets a block, and pipeline_num_layers counts all of them."""
    parallel, wan, rows = config.parallel, config.model.wan, config.model.pipeline_num_layers
    if parallel.pipeline == 1:
        return []
    stages, chunks, key = parallel.pipeline, parallel.virtual_pipeline or 1, "model:predictor.pipeline_num_layers"
    if not rows:
        if wan.num_layers >= stages * chunks:
            return []
        message = f"{wan.num_layers} blocks cannot be split into {stages} pipeline stages x {chunks} chunks"
        return mistake(message, f"use at most {wan.num_layers} in all")
    shown = [list(row) for row in rows] if len(rows) > 1 else list(rows[0])
    if {len(row) for row in rows} != {stages} or len(rows) != chunks:
        message = f"pipeline_num_layers {shown} is not {chunks} x {stages} numbers (virtual chunks x pipeline stages)"
        return mistake(message, "make it fit --pipeline-model-parallel-size and --virtual-pipeline-model-parallel-size,"
                       " or leave it out for an even split", key=key)
    if any(count < 1 for row in rows for count in row):
        return mistake(f"pipeline_num_layers {shown} has a stage without blocks", "give each at least 1", key=key)
    total = sum(map(sum, rows))
    if total != wan.num_layers:
        message = f"pipeline_num_layers {shown} adds up to {total} blocks, the model has {wan.num_layers}"
        return mistake(message, "correct the numbers", key=key)
    return []


def interleaving_divides(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Megatron's interleaved schedule passes micro-batches on in groups of as many as there are stages."""
    parallel = config.parallel
    if not parallel.virtual_pipeline or parallel.pipeline == 1 or ranks is None or ranks % parallel.model_parallel:
        return []
    count = config.gradient_accumulation(ranks)
    if count % parallel.pipeline == 0:
        return []
    message = (f"{count} micro-batches per step are not a multiple of {parallel.pipeline} pipeline stages, which "
               "virtual chunks need")
    step = config.training.micro_batch_size * parallel.data(ranks) * parallel.pipeline
    return mistake(message, f"make --global-batch-size a multiple of {step}")


def heads_divide(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Attention heads are shared by tensor and Ulysses ranks."""
    heads, parallel = config.model.wan.num_heads, config.parallel
    if heads % (parallel.tensor * parallel.ulysses) == 0:
        return []
    message = f"{heads} heads cannot be shared by {parallel.tensor} tensor x {parallel.ulysses} Ulysses ranks"
    return mistake(message, f"make tensor x Ulysses one of: {listed(divisors(heads))}")


def tensor_divides_ffn(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Tensor ranks share the feed-forward channels (the hidden channels follow from the heads)."""
    width, tensor = config.model.wan.ffn_dim, config.parallel.tensor
    if width % tensor == 0:
        return []
    message = f"ffn_dim {width} is not divisible by {tensor} tensor ranks"
    return mistake(message, "change --tensor-model-parallel-size", key="model:predictor.ffn_dim")


def context_algorithm(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """ulysses-degree-in-cp belongs to the hybrid algorithm and divides the context degree."""
    parallel = config.parallel
    degree = parallel.ulysses_degree_in_cp
    if parallel.context_parallel_algo != "hybrid_cp_algo":
        if degree is None or degree == parallel.ulysses:
            return []
        message = f"--ulysses-degree-in-cp {degree} is not read with {parallel.context_parallel_algo}"
        return mistake(message, "leave it out, or use hybrid_cp_algo")
    legal = listed(divisors(parallel.context))
    if degree is None:
        return mistake("hybrid_cp_algo needs --ulysses-degree-in-cp", f"add it with one of: {legal}")
    if parallel.context % degree:
        message = f"--ulysses-degree-in-cp {degree} does not divide --context-parallel-size {parallel.context}"
        return mistake(message, f"use one of: {legal}")
    return []


def sequence_parallel_needs_tensor(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Sequence parallelism works inside the tensor group."""
    if config.parallel.sequence_parallel and config.parallel.tensor == 1:
        fix = "leave --sequence-parallel out, or raise --tensor-model-parallel-size"
        return mistake("--sequence-parallel needs --tensor-model-parallel-size above 1", fix)
    return []


def ranks_factor(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """The ranks of the job are a multiple of tensor x context x pipeline."""
    parallel = config.parallel
    if ranks is None or ranks % parallel.model_parallel == 0:
        return []
    message = (
        f"{ranks} ranks cannot be split into groups of {parallel.model_parallel} "
        f"(tensor {parallel.tensor} x context {parallel.context} x pipeline {parallel.pipeline})"
    )
    fix = f"start a multiple of {parallel.model_parallel} ranks, or make the product one of: {listed(divisors(ranks))}"
    return mistake(message, fix)


def batch_divides(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """The global batch is a whole number of micro-batches on every data-parallel rank."""
    training, parallel = config.training, config.parallel
    if ranks is None or ranks % parallel.model_parallel or training.global_batch_size is None:
        return []
    size, micro, data = training.global_batch_size, training.micro_batch_size, parallel.data(ranks)
    step = micro * data
    if size % step == 0:
        return []
    message = f"--global-batch-size {size} is not a multiple of {step} (--micro-batch-size {micro} x {data} data ranks)"
    return mistake(message, f"use {max(step, round(size / step) * step)}")


def shards_divide(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """FSDP2's sharding_size divides data x context."""
    size, parallel = config.fsdp2.sharding_size, config.parallel
    if not parallel.use_torch_fsdp2 or not isinstance(size, int) or ranks is None or ranks % parallel.model_parallel:
        return []
    group = parallel.data(ranks) * parallel.context
    if group % size == 0:
        return []
    message = f"sharding_size {size} does not divide the {group} ranks of data x context"
    return mistake(message, f"use auto or one of: {listed(divisors(group))}", key="fsdp2:sharding_size")


def schedule_fits(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Warm-up ends before the decay does; rates and lengths make sense together."""
    optimizer, found = config.optimizer, []
    length = optimizer.decay_iters if optimizer.decay_iters is not None else config.training.train_iters
    if optimizer.warmup_iters >= length and optimizer.warmup_iters > 0:
        message = f"a warm-up of {optimizer.warmup_iters:g} iterations does not end before the decay of {length:g}"
        found += mistake(message, "lower --lr-warmup-iters or raise --lr-decay-iters")
    if optimizer.min_lr > optimizer.lr:
        message = f"--min-lr {optimizer.min_lr:g} is above --lr {optimizer.lr:g}"
        found += mistake(message, "lower --min-lr or raise --lr")
    if optimizer.warmup_init > optimizer.lr:
        message = f"--lr-warmup-init {optimizer.warmup_init:g} is above --lr {optimizer.lr:g}"
        found += mistake(message, "lower --lr-warmup-init")
    if optimizer.decay_style == "WSD" and not 0 < (optimizer.wsd_decay_iters or 0) <= length:
        message = "--lr-decay-style WSD does not say how long the final decay is"
        found += mistake(message, f"add --lr-wsd-decay-iters between 1 and {length:g}")
    return found


def weight_decay_fits(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """A scheduled weight decay has a start, an end and a shape."""
    optimizer = config.optimizer
    start, end, style = optimizer.start_weight_decay, optimizer.end_weight_decay, optimizer.weight_decay_incr_style
    if style == "constant":
        if start == end:  # both None, or the same number
            return []
        message = "--start-weight-decay and --end-weight-decay differ under a constant style"
        return mistake(message, "add --weight-decay-incr-style linear or cosine, or use --weight-decay alone")
    if start is None or end is None:
        message = f"--weight-decay-incr-style {style} needs a start and an end"
        return mistake(message, "add --start-weight-decay and --end-weight-decay")
    if end < start:
        return mistake(f"--end-weight-decay {end:g} is below --start-weight-decay {start:g}", "swap them")
    return []


def recompute_fits(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """No more blocks are recomputed than there are, and the details come with the switch itself."""
    recompute, blocks = config.training.recompute, config.model.wan.num_layers
    if recompute.granularity == "none":
        # --recompute-offload goes with the FSDP2 file's recompute_modules, too.
        alone = {"granularity", "offload"} if config.uses_fsdp2 and config.fsdp2.recompute_modules else {"granularity"}
        if recompute.model_fields_set - alone:
            message = "--recompute-method, --recompute-num-layers and the like do nothing by themselves"
            return mistake(message, "add --recompute-granularity full, or leave them out")
        return []
    if recompute.num_layers <= blocks:
        return []
    message = f"--recompute-num-layers {recompute.num_layers} is more than the model's {blocks} blocks"
    return mistake(message, f"use at most {blocks}")


def optimizer_state_fits(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """One way at a time to keep optimizer state small, and none that does nothing."""
    optimizer, found = config.optimizer, []
    if "offload_fraction" in optimizer.model_fields_set and not optimizer.cpu_offload:
        found += mistake("--optimizer-offload-fraction does nothing by itself", "add --optimizer-cpu-offload")
    if optimizer.cpu_offload and optimizer.name == "adam8bit":
        message = "--optimizer-cpu-offload with --optimizer adam8bit: 8-bit moments stay on the device"
        found += mistake(message, "offload fp32 moments (8 bytes a parameter leave), or keep 8-bit ones (2 stay)")
    if optimizer.cpu_offload and config.uses_fsdp2 and config.fsdp2.offload_to_cpu:
        message = "--optimizer-cpu-offload with offload_to_cpu of the FSDP2 file, which has the state on the host too"
        found += mistake(message, "use one of the two", key="fsdp2:offload_to_cpu")
    return found


def overlap_has_an_exchange(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Groups of heads overlap inside pure Ulysses attention only."""
    parallel = config.parallel
    chunks = parallel.ulysses_chunks
    if chunks == 1:
        return []
    if parallel.ulysses == 1 or parallel.ring > 1:
        what = "a ring, whose transfers overlap already" if parallel.ring > 1 else "one context rank"
        message = f"--ulysses-overlap-chunks {chunks} with {what}"
        return mistake(message, "leave it out, or use --context-parallel-algo ulysses_cp_algo")
    heads = config.model.wan.num_heads // (parallel.tensor * parallel.ulysses)
    if chunks <= max(heads, 1):
        return []
    return mistake(f"--ulysses-overlap-chunks {chunks}: a rank attends with {heads} heads", f"use at most {heads}")


def attention_trains(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """The kernel has a backward, and gives the log-sum-exp where a ring merges partial results."""
    name, ring = config.training.attention, config.parallel.ring
    if name == "sage":
        return mistake("--attention sage has no backward and cannot train",
                       "use auto, sdpa, cudnn, flash2 or flash3; keep sage for inference_sora.py")
    if ring > 1 and name not in ("auto", "sdpa", "npu"):
        message = f"--attention {name} with a ring of {ring}: it merges results of kernels that give their log-sum-exp"
        return mistake(message, "leave it out, or use --context-parallel-algo ulysses_cp_algo")
    return []


def saves_have_a_place(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """A save interval needs a folder."""
    checkpoint = config.checkpoint
    if checkpoint.save_interval and not checkpoint.save:
        message = f"--save-interval {checkpoint.save_interval} without --save"
        return mistake(message, "add --save, or leave --save-interval out")
    return []


def exits_can_save(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Stopping early without a place to save would lose the work."""
    training = config.training
    if (training.exit_interval or training.exit_duration_minutes) and not config.checkpoint.save:
        message = "the run is to stop early, and --save is not given: its work would be lost"
        return mistake(message, "add --save, or leave the exit flags out")
    return []


def rollback_has_a_place(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Going back needs whole checkpoints to go back to."""
    checkpoint = config.checkpoint
    if config.training.bad_step_policy != "rollback":
        return []
    if not (checkpoint.save and checkpoint.save_interval):
        return mistake("--bad-step-policy rollback needs --save and --save-interval", "add them, or use skip")
    if checkpoint.no_save_optim:
        return mistake("--bad-step-policy rollback needs the optimizer state", "leave --no-save-optim out, or use skip")
    return []


def start_is_said(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """Weights come from somewhere (--save too, when it holds a checkpoint), or random ones are asked for."""
    checkpoint = config.checkpoint
    can_resume = checkpoint.save is not None and not checkpoint.finetune and (Path(checkpoint.save) / TRACKER).is_file()
    if not (checkpoint.load or checkpoint.load_base_model or checkpoint.from_scratch or can_resume):
        return mistake("no weights to start from", "add --load DIR, or --from-scratch to start from random weights")
    if checkpoint.load and not checkpoint.load_base_model and checkpoint.from_scratch and config.lora is not None:
        return mistake("--load and --from-scratch both say where the base weights come from", "keep one of them")
    if checkpoint.load_base_model and checkpoint.from_scratch:
        return mistake("--load-base-model and --from-scratch contradict each other", "keep one of them")
    if checkpoint.ckpt_step is not None and not checkpoint.load:
        return mistake("--ckpt-step without --load", "add --load, or leave --ckpt-step out")
    return []


def base_model_needs_lora(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """--load-base-model belongs to LoRA runs."""
    if config.checkpoint.load_base_model and config.lora is None:
        fix = "use --load for full training, or add --lora-r and --lora-target-modules"
        return mistake("--load-base-model without LoRA", fix)
    return []


def base_dtype_fits(config: RunConfig, ranks: int | None) -> list[ConfigError]:
    """A base is not held in a type that the run then computes in by accident; kept layers need others that are not."""
    lora, found = config.lora, []
    if lora is None:
        return []
    if lora.base_dtype == "bf16" and config.training.precision == "fp32":
        found += mistake("--base-dtype bf16 in a run that computes in fp32", "add --bf16, or use --base-dtype fp32")
    if lora.base_keep and lora.base_dtype not in ("fp8", "int8"):
        found += mistake("--base-keep names layers to leave out of --base-dtype fp8 or int8", "add one, or remove it")
    return found


RULES: tuple[RuleRow, ...] = (
    (pipeline_combines, frozenset({"parallel", "lora"})),
    (pipeline_splits_blocks, frozenset({"parallel", "model"})),
    (interleaving_divides, frozenset({"parallel", "training"})),
    (heads_divide, frozenset({"parallel", "model"})),
    (tensor_divides_ffn, frozenset({"parallel", "model"})),
    (context_algorithm, frozenset({"parallel"})),
    (sequence_parallel_needs_tensor, frozenset({"parallel"})),
    (ranks_factor, frozenset({"parallel"})),
    (batch_divides, frozenset({"parallel", "training"})),
    (shards_divide, frozenset({"parallel", "fsdp2"})),
    (schedule_fits, frozenset({"optimizer", "training"})),
    (weight_decay_fits, frozenset({"optimizer"})),
    (recompute_fits, frozenset({"training", "model", "fsdp2", "parallel"})),
    (optimizer_state_fits, frozenset({"optimizer", "fsdp2", "parallel", "training"})),
    (overlap_has_an_exchange, frozenset({"parallel", "model"})),
    (attention_trains, frozenset({"training", "parallel"})),
    (saves_have_a_place, frozenset({"checkpoint"})),
    (exits_can_save, frozenset({"checkpoint", "training"})),
    (rollback_has_a_place, frozenset({"checkpoint", "training"})),
    (start_is_said, frozenset({"checkpoint"})),
    (base_model_needs_lora, frozenset({"checkpoint", "lora"})),
    (base_dtype_fits, frozenset({"lora", "training"})),
)
"""Every rule of this file, with the sections it reads."""
