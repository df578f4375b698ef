"""The variables of the launch scripts under ``examples/``, and those in the environment that look like one misspelt.

A misspelt flag is an error; a variable that nothing reads is the shell's own business, so it is only told.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

VARIABLES = (
    *("DEVICE", "NPROC_PER_NODE", "NPUS_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("TP", "SP", "CP", "CP_ALGO", "ULYSSES_DEGREE", "PP", "VP", "EXPERT_RANKS", "MBS", "GRAD_ACC_STEP", "GBS"),
    *("MM_MODEL", "MM_DATA", "MM_TOOL", "FSDP_CONFIG", "LOAD_PATH", "SAVE_PATH", "SAVE_FILE", "CKPT_DIR"),
    *("LR", "MIN_LR", "LR_DECAY_STYLE", "WARMUP_ITERS", "WEIGHT_DECAY", "CLIP_GRAD", "TRAIN_ITERS", "LOG_INTERVAL"),
    *("SEED", "SAVE_INTERVAL", "KEEP_LAST", "PRECISION", "NUM_WORKERS", "TIMEOUT_MINUTES", "HANG_TIMEOUT_MINUTES"),
    *("MAX_RESTARTS", "GRACE_SECONDS", "LOG_FOLDER", "PYTHON", "LAUNCH_SCRIPT", "PROMPT", "IMAGE"),
    *("LORA_R", "LORA_ALPHA", "LORA_TARGETS", "LORA_HIGH", "LORA_LOW", "LORA_WEIGHT", "LORA_HIGH_WEIGHT"),
    "GPU_MEMORY_MODE",
)
"""What a user may set. Variables of schedulers, of CANN and of CUDA are not among them."""

_ALIKE = 0.85
"""``TPS`` is not taken for ``TP``, ``GRAD_ACC_STEPS`` is for ``GRAD_ACC_STEP``."""


def misspelt(names: Iterable[str]) -> list[str]:
    """Return one note for every variable that nothing reads but that is nearly one of the scripts'."""
    found = []
    for name in sorted(set(names) - set(VARIABLES)):
        close = difflib.get_close_matches(name, VARIABLES, n=1, cutoff=_ALIKE)
        if close:
            found.append(f"note: {name} is set, but nothing reads it; did you mean {close[0]}?")
    return found
