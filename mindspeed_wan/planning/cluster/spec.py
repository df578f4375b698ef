"""A cluster job in one file: nodes, devices, layout, container, mounts, script, environment.

Every mistake is reported with its line. The layout is checked by ``ParallelDims``, so a job that would be refused on
the cluster is refused before it is queued.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mindspeed_wan.config.base import Device, Section
from mindspeed_wan.config.documents import Document, read_document
from mindspeed_wan.config.load import config_errors
from mindspeed_wan.config.validate import validate
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.models.wan.config import WanConfig
from mindspeed_wan.parallel.dims import ParallelDims
from mindspeed_wan.parallel.pipeline import PipelinePlan

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"(\d+-)?\d{1,2}:\d{2}:\d{2}")

Word = Annotated[str, Field(pattern=r"^\S+$")]
"""A name without spaces."""
KubernetesName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
"""Lower-case letters, digits, dashes and dots."""
MountPath = Annotated[str, Field(pattern=r"^/[^:,\n]*$")]
"""An absolute path without a colon or a comma, which separate mounts from each other."""


class Layout(Section):
    """How the model spreads over the ranks."""

    tensor: int = Field(default=1, ge=1)
    """Tensor parallel degree."""
    sequence_parallel: bool = False
    """Split tokens over the tensor ranks between matrix products."""
    context: int = Field(default=1, ge=1)
    """Context parallel degree."""
    ulysses: int | None = Field(default=None, ge=1)
    """Ulysses part of it; null: all. The rest is a ring."""
    pipeline: int = Field(default=1, ge=1)
    """Pipeline stages; needs fsdp2: false."""
    virtual: int = Field(default=1, ge=1)
    """Chunks of blocks on each stage."""
    expert_ranks: str | None = Field(default=None, pattern=r"^(even|[1-9]\d*,[1-9]\d*)$")
    """Both experts side by side (pretrain_both.sh): HIGH,LOW ranks or even; null: the script trains one expert."""
    fsdp2: bool = True
    """Shard parameters with the launch script's FSDP2 file."""
    micro_batch: int = Field(default=1, ge=1)
    """Clips per pass and data rank."""
    accumulation: int = Field(default=1, ge=1)
    """Passes per optimizer step."""


class Mount(Section):
    """One folder of the cluster inside the job."""

    target: MountPath
    """Where the job sees it."""
    source: MountPath | None = None
    """Folder of the node (shared file system): Slurm and Kubernetes."""
    claim: KubernetesName | None = None
    """Or: a PersistentVolumeClaim (Kubernetes)."""
    nfs: str | None = Field(default=None, pattern=r"^[^/\s]+:/\S*$")
    """SERVER:/PATH of the shared file system: ModelArts."""
    read_only: bool = False
    """Do not let the job write."""


class Container(Section):
    """The image of the job; without one, Slurm runs on the node itself."""

    image: Word
    """Image and tag."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When Kubernetes pulls it."""
    shared_memory_gib: int = Field(default=64, ge=1)
    """Size of /dev/shm for the data loaders."""
    host_network: bool = True
    """Use the node's network: HCCL and NCCL reach their adapters."""


class Network(Section):
    """Which adapters collectives use."""

    interface: Word | None = None
    """Name of the adapter for start-up and gloo (HCCL_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)."""
    infiniband: Word | None = None
    """NCCL_IB_HCA, such as mlx5."""


class Requeue(Section):
    """What happens when the job stops after saving (exit code 75) or loses a rank (6)."""

    limit: int = Field(default=20, ge=0)
    """How often it starts again."""
    grace_seconds: int = Field(default=600, ge=30)
    """Time to save after the scheduler's signal."""


class Slurm(Section):
    """What only Slurm reads."""

    partition: Word | None = None
    """--partition."""
    account: Word | None = None
    """--account."""
    qos: Word | None = None
    """--qos."""
    gres: Word | None = None
    """--gres per node; null: npu:N or gpu:N."""
    containers: Literal["pyxis", "apptainer"] = "pyxis"
    """How a container starts."""


class Kubernetes(Section):
    """What Kubeflow, Volcano and MindCluster read."""

    namespace: KubernetesName = "default"
    """Namespace."""
    queue: KubernetesName | None = None
    """Volcano queue."""
    resource: Word | None = None
    """Device resource; null: huawei.com/Ascend910 or nvidia.com/gpu."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes to use."""
    priority_class: KubernetesName | None = None
    """PriorityClass."""
    user: int = Field(default=1000, ge=1)
    """User id inside the container; not root."""
    driver_mounts: bool = True
    """Mount Ascend's driver and npu-smi from the node (device npu)."""


class ModelArts(Section):
    """What ModelArts reads."""

    flavor: Word
    """Flavor id of a node."""
    pool: Word | None = None
    """Dedicated resource pool."""
    workspace: str = "0"
    """Workspace id."""
    log_url: str = Field(pattern=r"^obs://|^/")
    """OBS folder for logs."""


class Resources(Section):
    """Host side of a node."""

    cpus: int | None = Field(default=None, ge=1)
    """Cores of the job on a node; null leaves it to the scheduler."""
    memory_gib: int | None = Field(default=None, ge=1)
    """Host memory of the job on a node."""


class ClusterSpec(Section):
    """A job on a cluster."""

    name: str
    """Lower-case letters, digits and dashes, at most 40."""
    nodes: int = Field(ge=1)
    """Machines."""
    devices_per_node: int = Field(ge=1)
    """Ranks on each."""
    device: Device
    """npu, cuda or cpu."""
    script: str = "examples/wan2.2/A14B/t2v/pretrain_high.sh"
    """Launch script, relative to workdir."""
    arguments: list[str] = Field(default_factory=list)
    """Further flags of the script."""
    workdir: str = Field(default="/workspace/mindspeed-wan", pattern=r"^/")
    """Checkout of this repository as the job sees it."""
    logs: str = Field(default="/workspace/logs", pattern=r"^/")
    """Folder for the nodes' logs, on a shared file system."""
    env: dict[str, str] = Field(default_factory=dict)
    """Variables of the launch script (LOAD_PATH, SAVE_PATH, LR ...); they win over what is rendered."""
    time_limit: str | None = None
    """[DAYS-]HOURS:MINUTES:SECONDS."""
    layout: Layout = Layout()
    """Parallel degrees."""
    container: Container | None = None
    """Image."""
    mounts: list[Mount] = Field(default_factory=list)
    """Folders."""
    network: Network = Network()
    """Adapters."""
    resources: Resources = Resources()
    """Host resources."""
    requeue: Requeue = Requeue()
    """Starting again."""
    slurm: Slurm = Slurm()
    """Slurm only."""
    kubernetes: Kubernetes = Kubernetes()
    """Kubernetes only."""
    modelarts: ModelArts | None = None
    """ModelArts only."""

    @property
    def ranks(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.devices_per_node

    @property
    def expert_worlds(self) -> tuple[int, ...]:
        """Ranks that train one expert together, for each expert of the job."""
        split = self.layout.expert_ranks
        if split is None:
            return (self.ranks,)
        return (self.ranks // 2, self.ranks // 2) if split == "even" else tuple(map(int, split.split(",")))

    @property
    def dims(self) -> ParallelDims:
        """The layout on the ranks of the job, or of its high-noise expert."""
        return self._dims(self.expert_worlds[0])

    def _dims(self, world_size: int) -> ParallelDims:
        layout = self.layout
        return ParallelDims(world_size=world_size, tensor=layout.tensor, sequence_parallel=layout.sequence_parallel,
                            context=layout.context, ulysses=layout.ulysses, pipeline=layout.pipeline,
                            virtual=layout.virtual, shard=None if layout.fsdp2 else 1)

    def check_layout(self) -> None:
        """Raise ``ConfigError`` if the ranks do not divide into this layout."""
        if sum(self.expert_worlds) != self.ranks:
            raise ConfigError(f"expert_ranks {self.layout.expert_ranks} are not the job's {self.ranks} ranks",
                              fix=f"for example {self.ranks // 2},{self.ranks - self.ranks // 2}")
        if self.layout.pipeline > 1 and self.layout.fsdp2:
            raise ConfigError("pipeline stages and FSDP2 exclude each other", fix="write fsdp2: false")
        model = WanConfig()  # every A14B and 14B expert has these heads, channels and blocks
        for world in self.expert_worlds:
            self._dims(world).validate(num_heads=model.num_heads, ffn_dim=model.ffn_dim)
        stages, accumulation = self.layout.pipeline, self.layout.accumulation
        PipelinePlan.even(model.num_layers, stages, self.layout.virtual)
        if self.layout.virtual > 1 and accumulation % stages:
            raise ConfigError(f"accumulation {accumulation} is not a multiple of {stages} pipeline stages, which"
                              " virtual chunks need", fix=f"use {-(-accumulation // stages) * stages}")
        if self.layout.expert_ranks is not None and "_both" not in Path(self.script).name:
            raise ConfigError(f"expert_ranks {self.layout.expert_ranks}, but {self.script} trains one expert",
                              fix="use a script such as examples/wan2.2/A14B/t2v/pretrain_both.sh")

    def host_path(self, path: str) -> str:
        """Return where the node has a path of the job, for what runs outside the container."""
        if self.container is None:
            return path
        for mount in sorted(self.mounts, key=lambda mount: -len(mount.target)):
            target = mount.target.rstrip("/")
            if mount.source is not None and (path == target or path.startswith(f"{target}/")):
                return mount.source.rstrip("/") + path[len(target):]
        return path


def read_spec(path: str | Path) -> ClusterSpec:
    """Read and check a description.

    Raises:
        ConfigError: every mistake of the file, each with ``file:line``.
    """
    document = read_document(path)
    spec, errors = validate(ClusterSpec, document, {})
    if spec is not None:
        errors = _rules(spec, document)
    if errors or spec is None:
        raise config_errors(errors)
    return spec


def _rules(spec: ClusterSpec, document: Document) -> list[ConfigError]:
    """Return what is wrong across keys."""
    found = []
    if not _NAME.fullmatch(spec.name):
        found.append(ConfigError(f"name '{spec.name}' is not a job name", where=document.where(("name",)),
                                 fix="use lower-case letters, digits and dashes, at most 40, a letter first"))
    if spec.time_limit is not None and not _TIME.fullmatch(spec.time_limit):
        found.append(ConfigError(f"time_limit '{spec.time_limit}' is not [DAYS-]HOURS:MINUTES:SECONDS",
                                 where=document.where(("time_limit",)), fix="for example 24:00:00, in quotes"))
    for name in spec.env:
        if not _VARIABLE.fullmatch(name):
            found.append(ConfigError(f"'{name}' is not a variable name", where=document.where(("env", name))))
    targets = [mount.target.rstrip("/") for mount in spec.mounts]
    for i, mount in enumerate(spec.mounts):
        where = document.where(("mounts", i))
        if mount.source is not None and mount.claim is not None:
            found.append(ConfigError("give either source or claim", where=where))
        if mount.source is None and mount.claim is None and mount.nfs is None:
            found.append(ConfigError(f"{mount.target}: nothing is mounted there", where=where,
                                     fix="give source, claim or nfs"))
        if targets.index(targets[i]) < i:
            found.append(ConfigError(f"{mount.target} is mounted twice", where=where))
    try:
        spec.check_layout()
    except ConfigError as error:
        found.append(ConfigError(error.message, where=document.where(("layout",)), fix=error.fix))
    return found
