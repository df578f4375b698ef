"""How many ranks one video gets and what each does: world = stages x replicas x CFG x ring x Ulysses x TP. No torch.

Generation obeys these rules, and the planner plans by them.

A *replica* makes one video at a time. Inside it the CFG axis splits the two guidance branches, Ulysses and ring the
tokens, TP the weight matrices; FSDP2 and the parallel VAE use all of a replica's ranks. Ranks are numbered with TP
fastest, then context, then CFG, then replicas, which is Megatron's order with (replica, CFG) as its data axis.
Pipeline stages come last of all and share one video: there is one replica then.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_wan.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InferenceLayout:
    """Degrees of every axis; ``world_size`` ranks in all.

    Attributes:
        tensor: ranks that share each weight matrix.
        ulysses: ranks that exchange heads for tokens around attention.
        ring: ranks that pass keys and values on.
        cfg: 2 when the conditional and the unconditional branch run at the same time, else 1.
        pipeline: stages that each hold a part of the blocks.
        dit_fsdp: shard the DiT's weights over the replica.
        t5_fsdp: shard the text encoder's weights over the replica.
        vae_parallel: decode and encode with the halo VAE over the replica.
    """

    world_size: int = 1
    tensor: int = 1
    ulysses: int = 1
    ring: int = 1
    cfg: int = 1
    pipeline: int = 1
    dit_fsdp: bool = False
    t5_fsdp: bool = False
    vae_parallel: bool = False

    @property
    def context(self) -> int:
        """Ranks that share the tokens of one video."""
        return self.ulysses * self.ring

    @property
    def replica_size(self) -> int:
        """Ranks that make one video."""
        return self.cfg * self.context * self.tensor * self.pipeline

    @property
    def replicas(self) -> int:
        """Videos made at the same time."""
        return self.world_size // self.replica_size

    def replica_ranks(self, replica: int) -> list[int]:
        """Return the world ranks of a replica."""
        return list(range(replica * self.replica_size, (replica + 1) * self.replica_size))

    def cfg_ranks(self, rank: int) -> list[int]:
        """Return the world ranks that hold the guidance branches beside ``rank``, conditional first."""
        stride = self.context * self.tensor
        group, inside = divmod(rank, self.cfg * stride)  # a replica, or a stage of the only one
        return [group * self.cfg * stride + branch * stride + inside % stride for branch in range(self.cfg)]

    def place(self, rank: int) -> tuple[int, int]:
        """Return (replica, CFG branch) of ``rank``."""
        replica, inside = divmod(rank, self.replica_size)
        return replica, inside // (self.context * self.tensor) % self.cfg

    def describe(self) -> str:
        """Return one line such as ``8 ranks = 1 video x CFG 2 x Ulysses 4``."""
        axes = [("stages", self.pipeline), ("CFG", self.cfg), ("ring", self.ring), ("Ulysses", self.ulysses),
                ("TP", self.tensor)]
        parts = [f"{self.replicas} video{'s' if self.replicas > 1 else ''} at a time"]
        parts += [f"{name} {degree}" for name, degree in axes if degree > 1]
        shared = {"DiT FSDP2": self.dit_fsdp, "T5 FSDP2": self.t5_fsdp, "parallel VAE": self.vae_parallel}
        parts += [name for name, on in shared.items() if on]
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        return f"{ranks} = {' x '.join(parts)}"

    def problems(self, num_heads: int | None = None, num_videos: int | None = None) -> list[str]:
        """Return what is wrong with the layout, one sentence each, legal degrees listed; empty when it is fine."""
        found = [
            f"{name} is {value}, it must be at least 1"
            for name, value in (("--tensor_size", self.tensor), ("--ulysses_size", self.ulysses),
                                ("--ring_size", self.ring), ("--pipeline_model_parallel_size", self.pipeline))
            if value < 1
        ]
        if self.cfg not in (1, 2):
            found.append(f"--cfg_size is {self.cfg}; guidance has two branches, so it is 1 or 2")
        if found:
            return found
        if self.pipeline > 1:
            found += self._pipeline_problems()
        if self.world_size % self.replica_size:
            stages = f" x pipeline stages {self.pipeline}" if self.pipeline > 1 else ""
            found.append(
                f"world size {self.world_size} does not factor: cfg {self.cfg} x ulysses {self.ulysses} x ring "
                f"{self.ring} x TP {self.tensor}{stages} = {self.replica_size} does not divide it; for TP "
                f"{self.tensor} and ring {self.ring} legal (cfg, ulysses) are {self._legal(num_heads)}"
            )
        elif num_videos is not None and 0 < num_videos < self.replicas:
            found.append(
                f"world size {self.world_size} makes {self.replicas} videos at a time but only {num_videos} asked for; "
                f"for one video legal (cfg, ulysses) are {self._legal(num_heads, whole=True)}, or give more prompts"
            )
        if num_heads is not None and num_heads % (self.tensor * self.ulysses):
            legal = [d for d in range(1, num_heads + 1) if num_heads % d == 0]
            found.append(
                f"{num_heads} attention heads cannot be split by TP {self.tensor} x Ulysses {self.ulysses} = "
                f"{self.tensor * self.ulysses}; legal products are {', '.join(map(str, legal))}; use --ring_size or "
                "--cfg_size for the rest"
            )
        return found

    def _pipeline_problems(self) -> list[str]:
        found = []
        if self.dit_fsdp:
            found.append("--dit_fsdp with --pipeline_model_parallel_size: a stage's weights stay where they are, and "
                         "FSDP2 would gather them for every pass; use one of the two")
        if self.world_size % self.replica_size == 0 and self.replicas > 1:
            found.append(f"{self.world_size} ranks make {self.replicas} videos at a time, but pipeline stages make "
                         f"one; start {self.replica_size} ranks per job, or raise --ulysses_size or --cfg_size")
        return found

    def streaming_problems(self) -> list[str]:
        """Return why blocks cannot come from the host one by one (``--memory block``); empty where they can."""
        found = []
        if self.dit_fsdp:
            found.append("--memory block with --dit_fsdp: both move blocks around; choose one of them")
        if self.pipeline > 1:
            found.append("--memory block with --pipeline_model_parallel_size: each stage holds its blocks; use "
                         "--memory sequential to have one expert at a time on the device")
        return found

    def _legal(self, num_heads: int | None, *, whole: bool = False) -> str:
        """List (cfg, ulysses) pairs that fit the world size and the heads; ``whole`` uses every rank for one video."""
        pairs = []
        for cfg in (1, 2):
            for ulysses in range(1, self.world_size + 1):
                size = cfg * ulysses * self.ring * self.tensor * self.pipeline
                fits = size == self.world_size if whole else self.world_size % size == 0
                if fits and (num_heads is None or num_heads % (self.tensor * ulysses) == 0):
                    pairs.append(f"({cfg}, {ulysses})")
        others = "TP, ring or pipeline stages" if self.pipeline > 1 else "TP or ring"
        return " ".join(pairs) or f"none (change {others})"


def raise_problems(problems: list[str], *, where: str | None = None, fix: str | None = None) -> None:
    """Raise one ``ConfigError`` that lists every problem; return when there is none."""
    if len(problems) == 1:
        raise ConfigError(problems[0], where=where, fix=fix)
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} things cannot be run:{lines}", where=where, fix=fix)
