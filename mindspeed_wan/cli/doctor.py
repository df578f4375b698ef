"""`mindspeed-wan doctor`: what this machine can run, and the fix for each problem, in a few seconds.

Every check returns findings; none raises. Packages are looked up by their metadata, because importing them all would
take a minute; torch is imported, because only that shows whether it works.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform as host
import resource
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mindspeed_wan import __version__
from mindspeed_wan.cli.doctor_devices import check_ascend, check_container, check_cpu, check_nvidia
from mindspeed_wan.cli.findings import ERROR, OK, WARNING, Finding
from mindspeed_wan.errors import EXIT_OK, EXIT_RESOURCE, WanError
from mindspeed_wan.platforms import DEVICE_VARIABLE, available_platforms, cann, get_platform

HELP = "what this machine can run, and the fix for what it cannot"

SHARED_MEMORY_NEEDED = 1 << 30
OPEN_FILES_NEEDED = 4096


@dataclass(frozen=True)
class Requirement:
    """A package, the versions that are known to work, and what is lost without it.

    ``broken`` is the beginning of versions that install and import but compute something wrong, and ``defect`` is what.
    """

    package: str
    at_least: str
    below: str | None = None
    lost: str = ""
    required: bool = True
    broken: str | None = None
    defect: str = ""


REQUIREMENTS = (
    Requirement("numpy", "1.26"),
    Requirement("pydantic", "2.10"),
    Requirement("pyyaml", "6.0"),
    Requirement("safetensors", "0.4.5"),
    Requirement("megatron-core", "0.12.1", "0.18", "training and generation"),
    Requirement("diffusers", "0.35.1", None, "encoding videos and captions, generation"),
    Requirement(
        "transformers",
        "4.51",
        lost="encoding captions, generation",
        broken="5.0.",
        defect="loads UMT5 with zero embeddings (huggingface/transformers#43992)",
    ),
    Requirement("av", "12.3", None, "reading and writing videos"),
    Requirement("ftfy", "6.2", None, "cleaning captions as Wan does"),
    Requirement("tensorboard", "2.16", None, "TensorBoard logs", required=False),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the doctor's options."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; exit code 0 only if training can run on the chosen platform."""
    findings = examine()
    usable = all(finding.verdict != ERROR for finding in findings)
    if args.json:
        print(json.dumps({"usable": usable, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print(render(findings))
    return EXIT_OK if usable else EXIT_RESOURCE


def examine() -> list[Finding]:
    """Run every check and return the findings in reading order."""
    checks: tuple[Callable[[], Iterable[Finding]], ...] = (
        check_python,
        check_torch,
        check_platform,
        check_accelerator_software,
        check_ascend,
        lambda: check_nvidia(torch_cuda=_torch_cuda()),
        check_cpu,
        check_container,
        check_packages,
        check_video_readers,
        check_attention,
        check_environment,
        check_machine,
        check_host_name,
    )
    return [finding for check in checks for finding in check()]


def render(findings: list[Finding]) -> str:
    """Return the findings as aligned text with a verdict at the end."""
    marks = {OK: "ok     ", WARNING: "warning", ERROR: "PROBLEM"}
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.verdict]}  {finding.name:<{width}}  {finding.detail}")
        if finding.fix:
            lines.append(f"{'':9}{'':<{width}}  fix: {finding.fix}")
    problems = sum(finding.verdict == ERROR for finding in findings)
    warnings = sum(finding.verdict == WARNING for finding in findings)
    verdict = "ready to train and to generate" if not problems else f"{problems} problem(s) to fix first"
    lines += ["", f"mindspeed-wan {__version__}: {verdict}" + (f", {warnings} warning(s)" if warnings else "")]
    return "\n".join(lines)


# ---- software ------------------------------------------------------------------------------------------------------


def check_python() -> list[Finding]:
    """Python 3.10 to 3.13 are supported."""
    version = host.python_version()
    supported = (3, 10) <= sys.version_info < (3, 14)
    detail = f"{version} on {host.system()} {host.machine()}"
    return [Finding("python", OK if supported else ERROR, detail, None if supported else "use Python 3.10 to 3.12")]


def check_torch() -> list[Finding]:
    """PyTorch imports, and its version is one of those tested."""
    problem = cann.keep_torch_importable()
    findings = []
    if problem:
        findings.append(Finding("torch_npu", WARNING, f"{problem}; `import torch` alone would fail", cann.CANN_FIX))
    try:
        torch = importlib.import_module("torch")
    except (ImportError, RuntimeError, OSError) as error:
        fix = "pip install torch==2.13.0"
        return [*findings, Finding("torch", ERROR, f"does not import: {str(error).splitlines()[0]}", fix)]
    findings.append(_version_finding(Requirement("torch", "2.7.1", "2.14"), str(torch.__version__)))
    return findings


def check_packages() -> list[Finding]:
    """The packages of the extra ``train``, by their metadata."""
    return [_version_finding(requirement, _installed(requirement.package)) for requirement in REQUIREMENTS]


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_finding(requirement: Requirement, version: str | None) -> Finding:
    from packaging.version import Version

    name = requirement.package
    wanted = f">={requirement.at_least}" + (f",<{requirement.below}" if requirement.below else "")
    install = f"pip install '{name}{wanted}'" + ("" if name == "torch" else "  (all at once: mindspeed-wan[train])")
    missing = ERROR if requirement.required else WARNING
    if version is None:
        lost = f": no {requirement.lost}" if requirement.lost else ""
        return Finding(name, missing, f"not installed{lost}", install)
    if Version(version) < Version(requirement.at_least):
        return Finding(name, missing, f"{version} is older than {requirement.at_least}", install)
    if requirement.broken and version.startswith(requirement.broken):
        return Finding(name, WARNING, f"{version} {requirement.defect}", f"pip install --upgrade {name}")
    if requirement.below and Version(version) >= Version(requirement.below):
        return Finding(name, WARNING, f"{version} is newer than what is tested (<{requirement.below})", install)
    return Finding(name, OK, version)


def check_video_readers() -> list[Finding]:
    """decord is faster than PyAV where it installs; PyAV is always enough."""
    decord = importlib.util.find_spec("decord") is not None
    return [Finding("video reader", OK, "decord" if decord else "PyAV (decord2 reads faster: pip install decord2)")]


def check_attention() -> list[Finding]:
    """Name the optional attention libraries that are installed."""
    modules = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "sage": "sageattention"}
    found = [name for name, module in modules.items() if importlib.util.find_spec(module) is not None]
    return [Finding("attention", OK, "PyTorch's own" + (f"; also {', '.join(found)}" if found else ""))]


# ---- hardware ------------------------------------------------------------------------------------------------------


def check_platform() -> list[Finding]:
    """The platform that a run would use, and why it is not a better one."""
    try:
        reasons = available_platforms()
        platform = get_platform()
    except WanError as error:
        return [Finding("platform", ERROR, str(error.message), error.fix)]
    except (ImportError, RuntimeError, OSError) as error:
        return [Finding("platform", ERROR, f"torch cannot be asked: {str(error).splitlines()[0]}")]
    gigabytes = platform.total_memory_bytes() / 2**30
    detail = f"{platform.name} ({platform.backend}): {platform.device_name()}, {gigabytes:.0f} GiB"
    findings = [Finding("platform", OK, detail)]
    for name, reason in reasons.items():
        if reason is not None:
            findings.append(Finding(f"  not {name}", OK, reason))
    if not platform.supports_bf16:
        findings.append(Finding("bf16", WARNING, "this device does not compute bf16 natively", "train in fp32"))
    return findings


def check_accelerator_software() -> list[Finding]:
    """A device that the machine has but PyTorch cannot reach."""
    findings = []
    devices = cann.ascend_devices()
    if devices and not cann.torch_npu_installed():
        fix = "pip install the torch_npu that matches your torch, and source CANN's set_env.sh"
        findings.append(Finding("ascend", WARNING, f"{len(devices)} NPU(s) here, but torch_npu is missing", fix))
    torch = sys.modules.get("torch")
    if torch is not None and Path("/proc/driver/nvidia").exists() and torch.version.cuda is None:
        fix = "install a CUDA build of torch: pytorch.org/get-started"
        findings.append(Finding("nvidia", WARNING, f"an NVIDIA driver is here, but torch {torch.__version__}", fix))
    npu_version = _installed("torch_npu")
    if torch is not None and npu_version and _release(npu_version) != _release(str(torch.__version__)):
        fix = f"pip install torch_npu=={'.'.join(map(str, _release(str(torch.__version__))))}"
        detail = f"{npu_version} does not belong to torch {torch.__version__}"
        findings.append(Finding("torch_npu", WARNING, detail, fix))
    return findings


def _torch_cuda() -> str | None:
    """Return the CUDA that torch was built for."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.version.cuda


def _release(version: str) -> tuple[int, ...]:
    from packaging.version import Version

    return Version(version).release[:3]


# ---- surroundings --------------------------------------------------------------------------------------------------


def check_environment() -> list[Finding]:
    """Variables that are known to hurt."""
    findings = []
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        detail = "CUDA_DEVICE_MAX_CONNECTIONS=1 makes FSDP2's communication wait for its computation"
        findings.append(Finding("environment", WARNING, detail, "unset it, or set it to 2 or more"))
    asked = os.environ.get(DEVICE_VARIABLE)
    if asked:
        findings.append(Finding("environment", OK, f"{DEVICE_VARIABLE}={asked}"))
    return findings


def check_machine() -> list[Finding]:
    """Shared memory for the data loader's workers, open files, and disk space here."""
    findings = []
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < SHARED_MEMORY_NEEDED:
        size = shutil.disk_usage(shared).total / 2**20
        fix = "start the container with --shm-size=16g, or train with --num-workers 0"
        findings.append(Finding("/dev/shm", WARNING, f"{size:.0f} MiB: data loader workers die of bus errors", fix))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < OPEN_FILES_NEEDED:
        findings.append(Finding("open files", WARNING, f"the limit is {limit}", f"ulimit -n {OPEN_FILES_NEEDED * 16}"))
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    findings.append(Finding("disk", OK, f"{free:.0f} GiB free in {Path.cwd()} (an A14B expert takes 27 GiB in bf16)"))
    return findings


def check_host_name(timeout: float = 1.0) -> list[Finding]:
    """Gloo and torchrun look the host name up; a slow or failing lookup delays or hangs the start of a job."""
    answer: list[str] = []

    def look_up() -> None:
        try:
            answer.append(socket.gethostbyname(socket.gethostname()))
        except OSError as error:
            answer.append(f"fails: {error}")

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(timeout)
    if answer and not answer[0].startswith("fails"):
        return [Finding("host name", OK, f"{socket.gethostname()} is {answer[0]}")]
    problem = answer[0] if answer else f"takes longer than {timeout:.0f} s"
    fix = f"add '127.0.0.1 {socket.gethostname()}' to /etc/hosts, or set GLOO_SOCKET_IFNAME"
    return [Finding("host name", WARNING, f"looking up {socket.gethostname()} {problem}", fix)]
