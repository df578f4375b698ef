"""From a description to the files of one target, and how to submit them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_wan.checkpoint.manifest import write_text_atomic
from mindspeed_wan.planning.cluster.kubernetes import ascend_job, pytorch_job, volcano_job
from mindspeed_wan.planning.cluster.modelarts import training_job
from mindspeed_wan.planning.cluster.slurm import sbatch
from mindspeed_wan.planning.cluster.spec import ClusterSpec

_HEADER = "# Rendered by `mindspeed-wan cluster render --target {target}`: change the description, not this file.\n"


@dataclass(frozen=True)
class Target:
    """A scheduler: its file, what writes it, how the file is submitted."""

    file: str
    text: Callable[[ClusterSpec], str]
    submit: str


def _yaml(target: str, build: Callable[[ClusterSpec], dict[str, Any]]) -> Callable[[ClusterSpec], str]:
    def text(spec: ClusterSpec) -> str:
        import yaml

        return _HEADER.format(target=target) + yaml.safe_dump(build(spec), sort_keys=False, width=120)

    return text


def _json(spec: ClusterSpec) -> str:
    return json.dumps(training_job(spec), indent=2) + "\n"


_REQUEST = "POST it to https://modelarts.REGION.myhuaweicloud.com/v2/PROJECT_ID/training-jobs"

TARGETS: dict[str, Target] = {
    "slurm": Target("job.sbatch", sbatch, "sbatch {path}"),
    "kubeflow": Target("pytorchjob.yaml", _yaml("kubeflow", pytorch_job), "kubectl apply -f {path}"),
    "volcano": Target("vcjob.yaml", _yaml("volcano", volcano_job), "kubectl apply -f {path}"),
    "ascendjob": Target("ascendjob.yaml", _yaml("ascendjob", ascend_job), "kubectl apply -f {path}"),
    "modelarts": Target("training_job.json", _json, _REQUEST + " ({path})"),
}


def render(spec: ClusterSpec, target: str, folder: Path) -> Path:
    """Write the file of one target into ``folder`` and return its path."""
    chosen = TARGETS[target]
    text = chosen.text(spec)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / chosen.file
    write_text_atomic(path, text)
    return path
