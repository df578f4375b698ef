"""What the doctor knows of each environment: Ascend driver and CANN, NVIDIA driver, CPU, container.

Each check reads files and variables only, so that it also answers where torch cannot be imported; ``root`` is the
machine's file system (tests give another). A check whose device is not there says nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from mindspeed_wan.cli.findings import OK, WARNING, Finding

_SHARED_NODES = ("davinci_manager", "devmm_svm", "hisi_hdc")
"""Device files that every process on an NPU opens besides its own /dev/davinciN."""
_CANN_FILES = ("ascend_toolkit_install.info", "version.cfg", "version.info")
_CUDA_DRIVERS = {12: 525, 13: 580}
"""CUDA major version -> oldest driver branch that runs it (NVIDIA's compatibility table)."""
_ROOT = Path("/")


def check_ascend(root: Path = _ROOT, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Device files and their permissions, driver, and the CANN whose variables are set."""
    devices = sorted((root / "dev").glob("davinci[0-9]*"))
    if not devices:
        return []
    return [*_device_files(root, devices), *_ascend_driver(root), *_cann(root, environment)]


def _device_files(root: Path, devices: list[Path]) -> Iterable[Finding]:
    missing = [name for name in _SHARED_NODES if not (root / "dev" / name).exists()]
    if missing:
        flags = " ".join(f"--device /dev/{name}" for name in missing)
        yield Finding("ascend devices", WARNING, f"/dev/{', /dev/'.join(missing)} missing", f"docker run {flags}")
    closed = [device for device in devices if not os.access(device, os.R_OK | os.W_OK)]
    if closed:
        group = closed[0].stat().st_gid
        yield Finding("ascend devices", WARNING, f"user {os.getuid()} may not open {closed[0]} (group {group})",
                      f"docker run --group-add {group}, or usermod -aG {group} on the machine")
    elif not missing:
        yield Finding("ascend devices", OK, f"{len(devices)} NPU(s), open to this user")


def _ascend_driver(root: Path) -> Iterable[Finding]:
    folder = root / "usr/local/Ascend/driver"
    version = _first(re.compile(r"^Version=(\S+)", re.MULTILINE | re.IGNORECASE), folder / "version.info")
    if not folder.is_dir():
        yield Finding("ascend driver", WARNING, "/usr/local/Ascend/driver is not here",
                      "docker run -v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro")
        return
    smi = "" if shutil.which("npu-smi") else ", npu-smi not in reach"
    yield Finding("ascend driver", OK, f"{version or 'version unknown'}{smi}")


def _cann(root: Path, environment: Mapping[str, str]) -> Iterable[Finding]:
    home = environment.get("ASCEND_HOME_PATH") or environment.get("ASCEND_TOOLKIT_HOME")
    if not home:
        installed = [path for path in ("cann", "ascend-toolkit") if (root / "usr/local/Ascend" / path).exists()]
        fix = (f"source /usr/local/Ascend/{installed[0]}/set_env.sh (the launchers do it)" if installed
               else "install CANN; docker/Dockerfile.cann has it")
        yield Finding("CANN", WARNING, "its variables are not set in this shell", fix)
        return
    pattern = re.compile(r"version\s*=\s*\[?\"?([0-9][\w.\-]*)", re.IGNORECASE)
    folders = (Path(home), *Path(home).glob("*-linux"))
    found = next((text for folder in folders for name in _CANN_FILES if (text := _first(pattern, folder / name))), None)
    yield Finding("CANN", OK, f"{found or 'version unknown'} in {home}")


def check_nvidia(root: Path = _ROOT, torch_cuda: str | None = None) -> list[Finding]:
    """The driver against the CUDA that torch was built for; ``torch_cuda`` is ``torch.version.cuda``."""
    file = root / "proc/driver/nvidia/version"
    driver = _first(re.compile(r"Kernel Module\s.*?\s(\d+\.\d[\d.]*)"), file)
    if driver is None:
        return []
    nodes = sorted((root / "dev").glob("nvidia[0-9]*"))
    if not nodes:
        return [Finding("nvidia driver", WARNING, f"{driver}, but no /dev/nvidia0 here",
                        "docker run --gpus all (NVIDIA Container Toolkit)")]
    oldest = _CUDA_DRIVERS.get(int(torch_cuda.partition(".")[0])) if torch_cuda else None
    if oldest is not None and int(driver.partition(".")[0]) < oldest:
        return [Finding("nvidia driver", WARNING, f"{driver} is too old for torch's CUDA {torch_cuda}",
                        f"update the driver to {oldest} or later, or install torch for an older CUDA")]
    return [Finding("nvidia driver", OK, f"{driver}, {len(nodes)} GPU(s)")]


def check_cpu(root: Path = _ROOT) -> list[Finding]:
    """Cores this process may use, and whether bf16 is computed by the hardware."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pattern = re.compile(r"^(?:flags|Features)\s*:\s*(.*)$", re.MULTILINE)
    flags = (_first(pattern, root / "proc/cpuinfo") or "").split()
    units = next((name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags), None)
    bf16 = f"bf16 by {units}" if units else "bf16 is emulated: fp32 is faster here"
    return [Finding("cpu", OK, f"{cores} core(s), {bf16}")]


def check_container(root: Path = _ROOT, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Inside a container: which user, and whether caches can be written."""
    marks = ((root / ".dockerenv").exists(), (root / "run/.containerenv").exists(),
             "KUBERNETES_SERVICE_HOST" in environment)
    if not any(marks):
        return []
    kind = "a pod" if marks[2] else "a container"
    found = [Finding("container", OK, f"{kind}, user {os.getuid()}, Python {sys.prefix}")]
    home = Path(environment.get("HOME", "/"))
    if not os.access(home, os.W_OK):
        found.append(Finding("container", WARNING, f"HOME={home} cannot be written: no compile caches",
                             "run as the image's user, or set HOME to a folder of this user"))
    return found


def _first(pattern: re.Pattern[str], file: Path) -> str | None:
    """Return the first group of the first match in a small text file."""
    try:
        match = pattern.search(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return match[1] if match else None
