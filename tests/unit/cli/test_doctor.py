"""The doctor: quick, right about this machine, and one fix per problem."""

import json
import resource
import subprocess
import sys
import threading

import pytest

from mindspeed_wan import platforms
from mindspeed_wan.cli import doctor
from mindspeed_wan.platforms import cann


@pytest.fixture(autouse=True)
def fresh_decision():
    platforms.reset_platform()
    yield
    platforms.reset_platform()


def by_name(findings):
    return {finding.name: finding for finding in findings}


def processor_seconds_of_children():
    """CPU time, because other tests and jobs share the machine; what a free machine would take is close to it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_the_whole_report_takes_less_than_five_seconds():
    start = processor_seconds_of_children()
    result = subprocess.run(
        [sys.executable, "-m", "mindspeed_wan.cli.main", "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert processor_seconds_of_children() - start < 5
    report = json.loads(result.stdout)
    assert report["usable"] == (result.returncode == 0)
    names = {finding["name"] for finding in report["findings"]}
    assert {"python", "torch", "platform", "megatron-core", "disk"} <= names


def test_a_healthy_machine_exits_0(capsys):
    parser = doctor.argparse.ArgumentParser()
    doctor.add_arguments(parser)
    code = doctor.run(parser.parse_args([]))
    output = capsys.readouterr().out
    assert (code == 0) == ("ready to train" in output)
    assert "platform" in output


def test_a_missing_required_package_is_a_problem_with_its_command(monkeypatch):
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "diffusers" else real(name))
    finding = by_name(doctor.check_packages())["diffusers"]
    assert finding.verdict == doctor.ERROR
    assert "no encoding videos" in finding.detail and "pip install 'diffusers>=0.35.1'" in finding.fix


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("0.11.0", doctor.ERROR), ("0.12.1", doctor.OK), ("0.17.1", doctor.OK), ("0.18.2", doctor.WARNING)],
)
def test_versions_are_judged_against_the_tested_range(version, verdict):
    requirement = doctor.Requirement("megatron-core", "0.12.1", "0.18")
    assert doctor._version_finding(requirement, version).verdict == verdict


def test_a_release_that_computes_something_wrong_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: "5.0.1" if name == "transformers" else "99")
    finding = by_name(doctor.check_packages())["transformers"]
    assert finding.verdict == doctor.WARNING and "zero embeddings" in finding.detail


def test_torch_npu_without_cann_is_reported_with_the_fix(monkeypatch):
    monkeypatch.setattr(cann, "torch_npu_installed", lambda: True)
    monkeypatch.setattr(cann, "missing_cann_library", lambda: "libhccl.so")
    monkeypatch.setenv(cann.AUTOLOAD_VARIABLE, "1")
    finding = by_name(doctor.check_torch())["torch_npu"]
    assert "libhccl.so" in finding.detail and "set_env.sh" in finding.fix


def test_npus_without_torch_npu_are_reported(monkeypatch):
    monkeypatch.setattr(cann, "ascend_devices", lambda: ["/dev/davinci0", "/dev/davinci1"])
    monkeypatch.setattr(cann, "torch_npu_installed", lambda: False)
    finding = by_name(doctor.check_accelerator_software())["ascend"]
    assert "2 NPU(s)" in finding.detail and "torch_npu" in finding.fix


def test_an_asked_for_device_that_is_absent_is_a_problem(monkeypatch):
    monkeypatch.setenv("MINDSPEED_WAN_DEVICE", "npu")
    finding = by_name(doctor.check_platform())["platform"]
    assert finding.verdict == doctor.ERROR and "npu" in finding.detail and "cpu" in finding.fix


def test_variables_that_hurt_are_named(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert by_name(doctor.check_environment()[:1])["environment"].verdict == doctor.WARNING


def test_a_host_name_that_does_not_resolve_is_a_warning_not_a_hang(monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(doctor.socket, "gethostbyname", lambda name: answered.wait(60))
    (finding,) = doctor.check_host_name(timeout=0.1)
    answered.set()
    assert finding.verdict == doctor.WARNING and "/etc/hosts" in finding.fix


def test_a_problem_makes_the_exit_code_3(monkeypatch, capsys):
    problem = doctor.Finding("disk", doctor.ERROR, "full", "delete something")
    monkeypatch.setattr(doctor, "examine", lambda: [problem])
    parser = doctor.argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert doctor.run(parser.parse_args([])) == 3
    output = capsys.readouterr().out
    assert "PROBLEM  disk  full" in output and "fix: delete something" in output and "1 problem(s)" in output
