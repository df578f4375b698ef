"""What the doctor says of Ascend, NVIDIA, CPU and container machines, on file systems made for the purpose."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mindspeed_wan.cli.doctor_devices import check_ascend, check_container, check_cpu, check_nvidia
from mindspeed_wan.cli.findings import OK, WARNING, Finding


def write(root: Path, *files: str, **texts: str) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(texts.get(name, ""))


def ascend_machine(root: Path) -> None:
    write(root, "dev/davinci0", "dev/davinci1", "dev/davinci_manager", "dev/devmm_svm", "dev/hisi_hdc")
    (root / "usr/local/Ascend/driver").mkdir(parents=True)
    (root / "usr/local/Ascend/driver/version.info").write_text("Version=25.2.0\nascendhal_version=7.35.23\n")
    home = root / "usr/local/Ascend/cann/aarch64-linux"
    home.mkdir(parents=True)
    (home / "ascend_toolkit_install.info").write_text("package_name=Ascend-cann-toolkit\nversion=8.3.RC1\n")


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_an_ascend_machine_in_order(tmp_path: Path) -> None:
    ascend_machine(tmp_path)
    found = by_name(check_ascend(tmp_path, {"ASCEND_HOME_PATH": str(tmp_path / "usr/local/Ascend/cann")}))
    assert {name: finding.verdict for name, finding in found.items()} == dict.fromkeys(
        ("ascend devices", "ascend driver", "CANN"), OK)
    assert "2 NPU(s)" in found["ascend devices"].detail
    assert "25.2.0" in found["ascend driver"].detail and "8.3.RC1" in found["CANN"].detail


def test_variables_that_are_not_loaded(tmp_path: Path) -> None:
    ascend_machine(tmp_path)
    finding = by_name(check_ascend(tmp_path, {}))["CANN"]
    assert finding.verdict == WARNING and "source /usr/local/Ascend/cann/set_env.sh" in str(finding.fix)


def test_a_container_without_its_device_files_and_driver(tmp_path: Path) -> None:
    write(tmp_path, "dev/davinci0", "dev/devmm_svm")
    found = by_name(check_ascend(tmp_path, {}))
    assert "--device /dev/davinci_manager --device /dev/hisi_hdc" in str(found["ascend devices"].fix)
    assert "-v /usr/local/Ascend/driver" in str(found["ascend driver"].fix)
    assert "Dockerfile.cann" in str(found["CANN"].fix)


def test_devices_of_another_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ascend_machine(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: "davinci" not in str(path))
    finding = by_name(check_ascend(tmp_path, {}))["ascend devices"]
    assert finding.verdict == WARNING and f"--group-add {os.getgid()}" in str(finding.fix)


@pytest.mark.parametrize(("driver", "cuda", "nodes", "verdict", "text"), [
    ("570.86.15", "12.8", 8, OK, "8 GPU(s)"),
    ("570.86.15", "13.0", 8, WARNING, "580 or later"),
    ("520.61.05", "12.8", 8, WARNING, "525 or later"),
    ("570.86.15", "12.8", 0, WARNING, "--gpus all"),
    ("570.86.15", None, 1, OK, "1 GPU(s)"),
])
def test_nvidia_driver(driver: str, cuda: str | None, nodes: int, verdict: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build\nGCC version: 11.4\n")
    write(tmp_path, *(f"dev/nvidia{i}" for i in range(nodes)))
    (finding,) = check_nvidia(tmp_path, cuda)
    assert finding.verdict == verdict and text in f"{finding.detail} {finding.fix}"


@pytest.mark.parametrize(("flags", "text"), [("fpu amx_bf16 avx512_bf16", "amx_bf16"), ("fpu avx2", "emulated")])
def test_cpu(flags: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    (finding,) = check_cpu(tmp_path)
    assert text in finding.detail


def test_a_container_whose_home_cannot_be_written(tmp_path: Path) -> None:
    write(tmp_path, ".dockerenv")
    found = check_container(tmp_path, {"HOME": str(tmp_path / "nowhere")})
    assert [finding.verdict for finding in found] == [OK, WARNING]
    assert check_container(tmp_path / "other", {}) == []


def test_other_machines_are_not_spoken_of(tmp_path: Path) -> None:
    assert check_ascend(tmp_path, {}) == [] and check_nvidia(tmp_path, "12.8") == []
