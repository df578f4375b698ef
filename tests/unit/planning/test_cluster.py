"""Job files: what each scheduler must find in them, and descriptions that are refused with their lines."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mindspeed_wan.cli.main import dispatch
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.planning.cluster.environment import node_environment
from mindspeed_wan.planning.cluster.render import TARGETS, render
from mindspeed_wan.planning.cluster.spec import ClusterSpec, Container, Mount, read_spec

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "wan2.2" / "cluster" / "cluster.yaml"

TEXT, NUMBER, SWITCH = str, int, bool
VARIABLES = [{"name": TEXT}]
POD = {
    "hostNetwork": SWITCH,
    "terminationGracePeriodSeconds": NUMBER,
    "securityContext": {"runAsUser": NUMBER, "runAsNonRoot": SWITCH},
    "containers": [{
        "name": TEXT, "image": TEXT, "command": [TEXT], "workingDir": TEXT, "env": VARIABLES,
        "resources": {"limits": dict, "requests": dict}, "volumeMounts": [{"name": TEXT, "mountPath": TEXT}],
    }],
    "volumes": [{"name": TEXT}],
}
METADATA = {"name": TEXT, "namespace": TEXT, "labels": dict}
REPLICA = {"replicas": NUMBER, "restartPolicy": TEXT, "template": {"spec": POD}}
SHAPES: dict[str, Any] = {
    "kubeflow": {"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA, "spec": {
        "nprocPerNode": TEXT, "runPolicy": {"backoffLimit": NUMBER, "cleanPodPolicy": TEXT},
        "pytorchReplicaSpecs": {"Master": REPLICA, "Worker": REPLICA}}},
    "volcano": {"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA, "spec": {
        "minAvailable": NUMBER, "schedulerName": TEXT, "maxRetry": NUMBER, "plugins": {"svc": list, "env": list},
        "policies": [{"action": TEXT}],
        "tasks": [{"name": TEXT, "replicas": NUMBER, "template": {"spec": {**POD, "restartPolicy": TEXT}}}]}},
    "ascendjob": {"apiVersion": TEXT, "kind": TEXT, "metadata": METADATA, "spec": {
        "schedulerName": TEXT, "successPolicy": TEXT,
        "runPolicy": {"backoffLimit": NUMBER, "schedulingPolicy": {"minAvailable": NUMBER, "queue": TEXT}},
        "replicaSpecs": {"Master": REPLICA, "Worker": REPLICA}}},
    "modelarts": {"kind": TEXT, "metadata": {"name": TEXT, "workspace_id": TEXT, "annotations": dict},
                  "algorithm": {"engine": {"image_url": TEXT}, "command": TEXT, "environments": dict},
                  "spec": {"resource": {"flavor_id": TEXT, "node_count": NUMBER},
                           "log_export_path": {"obs_url": TEXT},
                           "volumes": [{"nfs": {"nfs_server_path": TEXT, "local_path": TEXT, "read_only": SWITCH}}]}},
}
"""Required keys and their types, read off each API's reference; a list's one item describes all of its items."""


def mismatches(value: Any, shape: Any, place: str = "") -> list[str]:
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{place}: not an object"]
        missing = [f"{place}.{key}: missing" for key in shape if key not in value]
        return missing + [text for key in shape if key in value
                          for text in mismatches(value[key], shape[key], f"{place}.{key}")]
    if isinstance(shape, list):
        if not isinstance(value, list) or not value:
            return [f"{place}: not a list with items"]
        return [text for i, item in enumerate(value) for text in mismatches(item, shape[0], f"{place}[{i}]")]
    exact = isinstance(value, shape) and (shape is bool or not isinstance(value, bool))
    return [] if exact else [f"{place}: {value!r} is not {shape.__name__}"]


@pytest.fixture
def spec() -> ClusterSpec:
    return read_spec(EXAMPLE)


def rendered(spec: ClusterSpec, target: str, folder: Path) -> Any:
    return yaml.safe_load(render(spec, target, folder).read_text(encoding="utf-8"))  # JSON is YAML


@pytest.mark.parametrize("target", SHAPES)
def test_rendered_jobs_have_the_fields_of_their_api(target: str, spec: ClusterSpec, tmp_path: Path) -> None:
    assert mismatches(rendered(spec, target, tmp_path), SHAPES[target]) == []


def test_the_shape_check_can_fail() -> None:
    assert mismatches({"a": True}, {"a": int, "b": str}) == [".b: missing", ".a: True is not int"]


@pytest.mark.parametrize("target", SHAPES)
def test_every_node_gets_the_environment(target: str, spec: ClusterSpec, tmp_path: Path) -> None:
    expected = node_environment(spec)
    for environment in environments(rendered(spec, target, tmp_path)):
        assert expected.items() <= environment.items()


def environments(job: Any) -> list[dict[str, str]]:
    """Every container's variables, wherever they stand."""
    if isinstance(job, dict):
        listed = job.get("env")
        found = [{v["name"]: v.get("value", "") for v in listed}] if isinstance(listed, list) and listed else []
        found += [job["environments"]] if "environments" in job else []
        return found + [e for value in job.values() for e in environments(value)]
    return [e for item in job for e in environments(item)] if isinstance(job, list) else []


def test_pods_are_one_per_node_and_not_root(spec: ClusterSpec, tmp_path: Path) -> None:
    job = rendered(spec, "kubeflow", tmp_path)["spec"]["pytorchReplicaSpecs"]
    assert job["Master"]["replicas"] + job["Worker"]["replicas"] == spec.nodes
    pod = job["Worker"]["template"]["spec"]
    assert pod["containers"][0]["name"] == "pytorch"  # the operator looks for it
    assert pod["containers"][0]["resources"]["limits"]["huawei.com/Ascend910"] == 8
    assert pod["securityContext"]["runAsUser"] >= 1000
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_a_saved_job_is_started_again(spec: ClusterSpec, tmp_path: Path) -> None:
    volcano = rendered(spec, "volcano", tmp_path)["spec"]["policies"]
    assert {policy["exitCode"] for policy in volcano if policy["action"] == "RestartJob" and "exitCode" in policy} == \
        {75, 6}
    kubeflow = rendered(spec, "kubeflow", tmp_path)["spec"]["pytorchReplicaSpecs"]["Master"]
    assert kubeflow["restartPolicy"] == "ExitCode"
    assert int(environments(kubeflow)[0]["RETRY_EXIT_CODE"]) > 127  # below, Kubeflow gives up
    assert rendered(spec, "ascendjob", tmp_path)["metadata"]["labels"]["fault-retry-times"] == "20"
    annotations = rendered(spec, "modelarts", tmp_path)["metadata"]["annotations"]
    assert annotations["fault-tolerance/job-retry-num"] == "20"


def test_one_node_needs_no_workers(spec: ClusterSpec, tmp_path: Path) -> None:
    one = spec.model_copy(update={"nodes": 1})
    assert list(rendered(one, "kubeflow", tmp_path)["spec"]["pytorchReplicaSpecs"]) == ["Master"]
    assert list(rendered(one, "ascendjob", tmp_path)["spec"]["replicaSpecs"]) == ["Master"]


@pytest.mark.parametrize("containers", ["pyxis", "apptainer", None])
def test_sbatch_script_is_valid_bash(containers: str | None, spec: ClusterSpec, tmp_path: Path) -> None:
    slurm = spec.slurm.model_copy(update={"containers": containers or "pyxis"})
    changed = spec.model_copy(update={"slurm": slurm, "container": spec.container if containers else None})
    path = render(changed, "slurm", tmp_path)
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, check=False).returncode == 0
    text = path.read_text(encoding="utf-8")
    folder = "/shared/wan/logs" if containers else "/data/logs"  # Slurm itself runs outside the container
    assert f"#SBATCH --output={folder}/%x-%j.log" in text
    assert ("apptainer exec" in text) == (containers == "apptainer")
    assert ("--container-image" in text) == (containers == "pyxis")


@pytest.mark.parametrize(("containers", "image", "word"), [
    ("pyxis", "registry.example.com/team/wan:cann", "registry.example.com#team/wan:cann"),
    ("pyxis", "localhost:5000/wan:1", "localhost:5000#wan:1"),
    ("pyxis", "library/wan:1", "library/wan:1"),
    ("pyxis", "registry.example.com#wan:1", "registry.example.com#wan:1"),
    ("pyxis", "/images/wan.sqsh", "/images/wan.sqsh"),
    ("apptainer", "registry.example.com/wan:1", "docker://registry.example.com/wan:1"),
    ("apptainer", "/images/wan.sif", "/images/wan.sif"),
    ("apptainer", "oras://registry.example.com/wan:1", "oras://registry.example.com/wan:1"),
])
def test_images_are_spelt_as_each_container_runtime_reads_them(containers: str, image: str, word: str,
                                                               spec: ClusterSpec, tmp_path: Path) -> None:
    slurm = spec.slurm.model_copy(update={"containers": containers})
    resources = spec.resources.model_copy(update={"cpus": 96})
    changed = spec.model_copy(update={"slurm": slurm, "container": Container(image=image), "resources": resources})
    (line,) = [line for line in render(changed, "slurm", tmp_path).read_text().splitlines() if line.startswith("srun")]
    words = shlex.split(line.removesuffix(" &"))
    assert word in words
    assert words[words.index("--cpus-per-task") + 1] == "96"


FAKE_SRUN = """#!/usr/bin/env bash
trap 'exit 75' USR1
echo "$@" >> "$CALLS"
touch "$CALLS.started"
for i in $(seq 100); do sleep 0.05; done
exit ${SRUN_CODE:-0}
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'node07\\nnode08\\n'; else echo "scontrol $*" >> "$CALLS"; fi
"""


@pytest.fixture
def slurm_commands(tmp_path: Path) -> dict[str, str]:
    """srun that saves on SIGUSR1 and scontrol that writes down what it is asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin", "CALLS": str(tmp_path / "calls"), "SLURM_JOB_ID": "1234",
            "SLURM_JOB_NODELIST": "node[07-08]"}


@pytest.mark.parametrize(("restarts", "requeued"), [("0", True), ("20", False)])
def test_the_warning_signal_requeues_until_the_limit(restarts: str, requeued: bool, spec: ClusterSpec, tmp_path: Path,
                                                     slurm_commands: dict[str, str]) -> None:
    script = render(spec, "slurm", tmp_path)
    job = subprocess.Popen(["bash", str(script)], env={**slurm_commands, "SLURM_RESTART_COUNT": restarts})
    started = Path(slurm_commands["CALLS"] + ".started")
    for _ in range(200):
        if started.exists():
            break
        subprocess.run(["sleep", "0.05"], check=True)
    job.send_signal(10)  # SIGUSR1, as --signal=B:USR1 sends it
    assert job.wait(30) == 75
    assert ("scontrol requeue 1234" in Path(slurm_commands["CALLS"]).read_text()) == requeued


def test_a_wrong_flag_is_not_requeued(spec: ClusterSpec, tmp_path: Path, slurm_commands: dict[str, str]) -> None:
    Path(slurm_commands["PATH"].split(":")[0], "srun").write_text("#!/bin/sh\nexit 2\n")
    script = render(spec, "slurm", tmp_path)
    done = subprocess.run(["bash", str(script)], env=slurm_commands, check=False, timeout=30)
    assert done.returncode == 2
    assert not Path(slurm_commands["CALLS"]).exists()


def test_words_reach_the_job_as_they_are(spec: ClusterSpec, tmp_path: Path, slurm_commands: dict[str, str]) -> None:
    """Spaces, quotes and dollar signs in mounts, variables and arguments; Kubernetes' own ``$(NAME)`` is escaped."""
    odd = "a b'c\"d$HOME`id`$(hostname)"
    changed = spec.model_copy(update={
        "arguments": [odd], "env": {"LOAD_PATH": odd}, "logs": "/data/my logs",
        "mounts": [Mount(source="/shared/my wan", target="/data", read_only=True)]})
    script = render(changed, "slurm", tmp_path)
    assert "#SBATCH --output='/shared/my wan/my logs'/%x-%j.log" in script.read_text(encoding="utf-8")
    folder = Path(slurm_commands["PATH"].split(":")[0])
    (folder / "srun").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$LOAD_PATH" "$@" > "$CALLS"\n')
    assert subprocess.run(["bash", str(script)], env=slurm_commands, check=False, timeout=30).returncode == 0
    first, *words = Path(slurm_commands["CALLS"]).read_text().splitlines()
    assert first == words[-1] == odd and "/shared/my wan:/data:ro" in words
    container = rendered(changed, "volcano", tmp_path)["spec"]["tasks"][0]["template"]["spec"]["containers"][0]
    assert container["command"][-1] == odd.replace("$(", "$$(")
    assert {"name": "LOAD_PATH", "value": odd.replace("$(", "$$(")} in container["env"]


def test_the_code_is_the_jobs_own_where_it_ends_during_a_signal(tmp_path: Path) -> None:
    """The job saves and ends while entry.sh still passes the signal on."""
    script = tmp_path / "job.sh"
    script.write_text("trap 'exit 75' USR1\ntouch \"$0.started\"\nwhile :; do sleep 0.05; done\n")
    slow = tmp_path / "slow.sh"  # a trap that takes longer than the job's save
    entry = ROOT / "examples" / "wan2.2" / "cluster" / "entry.sh"
    slow.write_text(entry.read_text().replace('kill -USR1 "${!-}" 2>/dev/null', 'kill -USR1 "${!-}"; sleep 1'))
    job = subprocess.Popen(["bash", str(slow), str(script)])
    while not Path(f"{script}.started").exists():
        subprocess.run(["sleep", "0.05"], check=True)
    job.send_signal(10)
    assert job.wait(30) == 75


def test_rings_and_plain_data_parallel_reach_the_script(spec: ClusterSpec) -> None:
    layout = spec.layout.model_copy(update={"context": 8, "ulysses": 2, "fsdp2": False})
    variables = node_environment(spec.model_copy(update={"layout": layout}))
    assert variables["CP_ALGO"] == "hybrid_cp_algo" and variables["ULYSSES_DEGREE"] == "2"
    assert variables["FSDP_CONFIG"] == ""
    ring = spec.layout.model_copy(update={"context": 8, "ulysses": 1})
    assert node_environment(spec.model_copy(update={"layout": ring}))["CP_ALGO"] == "megatron_cp_algo"


def test_pipeline_stages_and_both_experts_reach_the_script(spec: ClusterSpec) -> None:
    staged = spec.layout.model_copy(update={"pipeline": 2, "virtual": 5, "fsdp2": False})
    variables = node_environment(spec.model_copy(update={"layout": staged}))
    assert (variables["PP"], variables["VP"], variables["FSDP_CONFIG"]) == ("2", "5", "")
    both = spec.model_copy(update={"layout": spec.layout.model_copy(update={"expert_ranks": "24,8"}),
                                   "script": "examples/wan2.2/A14B/t2v/pretrain_both.sh"})
    both.check_layout()
    assert node_environment(both)["EXPERT_RANKS"] == "24,8" and both.dims.world_size == 24
    assert not {"PP", "VP", "EXPERT_RANKS"} & set(node_environment(spec))


@pytest.mark.parametrize(("changes", "message"), [
    ({"pipeline": 2}, "exclude each other"),
    ({"expert_ranks": "24,16"}, "32 ranks"),
    ({"expert_ranks": "30,2"}, "do not factor"),
    ({"virtual": 2, "fsdp2": False}, "without pipeline stages"),
    ({"pipeline": 2, "virtual": 2, "fsdp2": False}, "accumulation 1 is not a multiple of 2 pipeline stages"),
    ({"pipeline": 8, "virtual": 6, "context": 1, "fsdp2": False}, "40 blocks cannot be split"),
    ({"expert_ranks": "even"}, "trains one expert"),
])
def test_layouts_of_stages_and_experts_are_checked(changes: dict[str, Any], message: str, spec: ClusterSpec) -> None:
    wrong = spec.model_copy(update={"layout": spec.layout.model_copy(update=changes)})
    with pytest.raises(ConfigError, match=message):
        wrong.check_layout()


def test_the_descriptions_environment_wins(spec: ClusterSpec) -> None:
    assert node_environment(spec.model_copy(update={"env": {"CP": "8"}}))["CP"] == "8"


@pytest.mark.parametrize(("change", "line", "message"), [
    ("nodes: 4|nodes: 0", 4, "must be at least 1"),
    ("devices_per_node: 8|devices_per_nodes: 8", 5, "did you mean 'devices_per_node'"),
    ("device: npu |device: tpu ", 6, "'npu', 'cuda' or 'cpu'"),
    ("name: wan-t2v-high|name: Wan_T2V", 3, "not a job name"),
    ('"24:00:00"|86400', 12, "text in quotes"),
    ('"24:00:00"|"a day"', 12, "DAYS"),
    ("context: 4|context: 16", 14, "does not divide 40 attention heads"),
    ("context: 4|context: 5", 14, "do not factor"),
    ("source: /shared/wan, |claim: wan, source: /shared/wan, ", 28, "either source or claim"),
    ('source: /shared/wan, target: /data, nfs: "192.168.0.10:/wan"|target: /data', 28, "nothing is mounted there"),
    ("source: /shared/wan|source: '/shared/wan:x'", 28, "mounts"),
    ("target: /data, |target: '/da,ta', ", 28, "mounts"),
    ("namespace: wan|namespace: 'Wan Space'", 38, "namespace"),
    ("partition: npu|partition: 'a b'", 36, "partition"),
    ("target: /data|target: data", 28, "mounts"),
    ("LOAD_PATH:|LOAD-PATH:", 20, "not a variable name"),
])
def test_mistakes_name_their_line(change: str, line: int, message: str, tmp_path: Path) -> None:
    old, new = change.split("|")
    text = EXAMPLE.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path = tmp_path / "cluster.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_spec(path)
    assert f"cluster.yaml:{line}" in str(error.value)
    assert message in str(error.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("name: x\nnodes: -1\ndevices_per_node: 8\ndevice: npu\nlayout: {tensr: 2}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_spec(path)
    assert "cluster.yaml:2" in str(error.value) and "cluster.yaml:5" in str(error.value)


def test_targets_say_what_they_miss(spec: ClusterSpec, tmp_path: Path) -> None:
    bare = spec.model_copy(update={"container": None})
    for target in ("kubeflow", "volcano", "ascendjob", "modelarts"):
        with pytest.raises(ConfigError, match="needs an image"):
            render(bare, target, tmp_path)
    with pytest.raises(ConfigError, match="flavor"):
        render(spec.model_copy(update={"modelarts": None}), "modelarts", tmp_path)
    for target, mount, message in (("slurm", {"claim": "data"}, "folders of the node"),
                                   ("modelarts", {"source": "/shared"}, "network file systems")):
        with pytest.raises(ConfigError, match=message):
            render(spec.model_copy(update={"mounts": [Mount(target="/data", **mount)]}), target, tmp_path)
    with pytest.raises(ConfigError, match="runs on npu"):
        render(spec.model_copy(update={"device": "cuda"}), "ascendjob", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_command_renders_every_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["cluster", "render", "--target", "all", "--spec", str(EXAMPLE), "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {target.file for target in TARGETS.values()}
    assert "sbatch" in capsys.readouterr().out
    assert json.loads((tmp_path / "training_job.json").read_text())["spec"]["resource"]["node_count"] == 4
    assert dispatch(["cluster", "check", "--spec", str(EXAMPLE)]) == 0
