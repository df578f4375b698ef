"""An sbatch script: one launcher per node, requeued when it stopped after saving."""

from __future__ import annotations

import shlex

from mindspeed_wan.errors import EXIT_DISTRIBUTED, EXIT_REQUEUE, ConfigError
from mindspeed_wan.planning.cluster.environment import node_environment
from mindspeed_wan.planning.cluster.spec import ClusterSpec, Mount

_GRES = {"npu": "npu", "cuda": "gpu"}


def sbatch(spec: ClusterSpec) -> str:
    """Return the script.

    Raises:
        ConfigError: a mount that is no folder of the node.
    """
    for i, mount in enumerate(spec.mounts):
        if mount.source is None and spec.container is not None:
            raise ConfigError("Slurm mounts folders of the node", where=f"mounts[{i}]", fix="give source")
    return "\n".join([
        "#!/usr/bin/env bash",
        *(f"#SBATCH {option}" for option in _options(spec)),
        "# Rendered by `mindspeed-wan cluster render --target slurm`: change the description, not this file.",
        f"# The folder {spec.host_path(spec.logs)} must exist before the job is submitted.",
        "set -uo pipefail",
        "",
        *_exports(spec),
        'NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "export MASTER_ADDR=${NODES%%$'\\n'*}",
        "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
        "",
        "# One launcher per node. Slurm's warning reaches every rank, which saves and stops.",
        "trap 'kill -USR1 \"${!-}\"' USR1",
        "trap 'kill -TERM \"${!-}\"' TERM",
        f"{_srun(spec)} &",
        "STEP=$!",
        "while :; do",
        '    wait "$STEP"',
        '    kill -0 "$STEP" 2>/dev/null || break # a signal ended the wait, not the step',
        "done",
        'wait "$STEP" # its code, also where it ended while a signal was handled',
        "CODE=$?",
        "",
        f"if [[ $CODE == {EXIT_REQUEUE} || $CODE == {EXIT_DISTRIBUTED} ]] &&",
        f"    ((${{SLURM_RESTART_COUNT:-0}} < {spec.requeue.limit})); then",
        '    echo "exit code $CODE: queued again (restart ${SLURM_RESTART_COUNT:-0})"',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $CODE",
        "",
    ])  # fmt: skip


def _options(spec: ClusterSpec) -> list[str]:
    slurm, resources = spec.slurm, spec.resources
    options = [
        f"--job-name={spec.name}",
        f"--nodes={spec.nodes}",
        "--ntasks-per-node=1",
        "--exclusive",
        f"--output={shlex.quote(spec.host_path(spec.logs))}/%x-%j.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{spec.requeue.grace_seconds + 60}",
    ]
    gres = slurm.gres or (f"{_GRES[spec.device]}:{spec.devices_per_node}" if spec.device in _GRES else None)
    for name, value in (("gres", gres), ("partition", slurm.partition), ("account", slurm.account), ("qos", slurm.qos),
                        ("time", spec.time_limit), ("cpus-per-task", resources.cpus),
                        ("mem", f"{resources.memory_gib}G" if resources.memory_gib else None)):
        if value is not None:
            options.append(f"--{name}={value}")
    return options


def _exports(spec: ClusterSpec) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in node_environment(spec).items()]


def _srun(spec: ClusterSpec) -> str:
    words = ["srun", "--nodes", str(spec.nodes), "--ntasks-per-node", "1", "--kill-on-bad-exit=0",
             "--cpu-bind=none",  # the launcher's ranks share all cores of the task
             "--output", f"{spec.host_path(spec.logs)}/%x-%j-node%n.log", "--open-mode", "append"]
    # srun does not take over what sbatch was told (since Slurm 22.05).
    words += ["--cpus-per-task", str(spec.resources.cpus)] if spec.resources.cpus else []
    command = ["bash", f"{spec.workdir}/{spec.script}", *spec.arguments]
    if spec.container is not None and spec.slurm.containers == "pyxis":
        words += ["--container-image", _for_pyxis(spec.container.image), "--container-workdir", spec.workdir]
        mounts = ",".join(map(_binding, spec.mounts))
        words += ["--container-mounts", mounts] if mounts else []
    elif spec.container is not None:
        binds = [word for mount in spec.mounts for word in ("--bind", _binding(mount))]
        gpus = ["--nv"] if spec.device == "cuda" else []
        command = ["apptainer", "exec", *gpus, *binds, "--pwd", spec.workdir, _for_apptainer(spec.container.image),
                   *command]
    return shlex.join([*words, *command])


def _for_pyxis(image: str) -> str:
    """A registry ends with ``#``; without one the image is Docker Hub's, and a path is a squashfs file."""
    registry, slash, name = image.partition("/")
    if not slash or "#" in image or image.startswith((".", "/")):
        return image
    is_registry = "." in registry or ":" in registry or registry == "localhost"
    return f"{registry}#{name}" if is_registry else image


def _for_apptainer(image: str) -> str:
    """An image of a registry has a scheme; anything else is a file."""
    is_file = image.startswith((".", "/")) or image.endswith(".sif")
    return image if is_file or "://" in image else f"docker://{image}"


def _binding(mount: Mount) -> str:
    return f"{mount.source}:{mount.target}{':ro' if mount.read_only else ''}"
