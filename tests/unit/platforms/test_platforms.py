"""One decision per process; what each platform answers; a forced device that is absent."""

import mmap
import os
import subprocess
import sys
import types

import pytest
import torch

from mindspeed_wan import platforms
from mindspeed_wan.errors import ConfigError, ResourceError
from mindspeed_wan.platforms import cann, cpu, cuda, ops
from tests.unit.platforms.fake_npu import FakeNpu, define_operators, fake_modules


@pytest.fixture(autouse=True)
def fresh_decision(monkeypatch):
    monkeypatch.delenv("MINDSPEED_WAN_DEVICE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    platforms.reset_platform()
    yield
    platforms.reset_platform()


@pytest.fixture
def npu(monkeypatch):
    fake = FakeNpu()
    for name, module in fake_modules(fake).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch, "npu", fake, raising=False)
    monkeypatch.setattr(cann, "missing_cann_library", lambda: None)
    library = define_operators()
    yield fake
    platforms.reset_platform()
    library._destroy()


def test_cpu_is_the_default_and_the_decision_is_made_once(monkeypatch):
    platform = platforms.get_platform()
    assert (platform.name, platform.device_type, platform.backend) == ("cpu", "cpu", "gloo")
    monkeypatch.setenv("MINDSPEED_WAN_DEVICE", "cpu")
    assert platforms.get_platform() is platform
    assert platforms.get_platform("cpu") is platform


def test_an_activated_platform_cannot_be_changed():
    platforms.get_platform("cpu").activate()
    with pytest.raises(ConfigError, match="already runs on 'cpu'"):
        platforms.get_platform("cuda")


def test_the_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("MINDSPEED_WAN_DEVICE", "npu")
    assert platforms.get_platform("cpu").name == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
@pytest.mark.parametrize("name", ["cuda", "npu"])
@pytest.mark.parametrize("source", ["argument", "environment"])
def test_an_absent_device_is_a_resource_error_that_names_the_cpu(name, source, monkeypatch):
    monkeypatch.setenv("MINDSPEED_WAN_DEVICE", name if source == "environment" else "")
    with pytest.raises(ResourceError, match=f"device '{name}' is not usable") as error:
        platforms.get_platform(name if source == "argument" else None)
    assert error.value.exit_code == 3
    assert "--device cpu" in str(error.value)
    assert ("MINDSPEED_WAN_DEVICE: " in str(error.value)) == (source == "environment")


def test_a_misspelt_device_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'cuda'"):
        platforms.get_platform("cude")


def test_cpu_activation_installs_one_shim_and_reset_removes_it():
    original = torch.cuda.current_device
    platform = platforms.get_platform("cpu").activate().activate()
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    assert platform.device(3) == torch.device("cpu")
    platforms.reset_platform()
    assert torch.cuda.current_device is original


def test_cpu_memory_figures_are_of_this_process_and_machine():
    platform = platforms.get_platform("cpu")
    platform.reset_peak_memory()
    before = platform.peak_memory_bytes()
    with mmap.mmap(-1, 64 << 20) as fresh:  # not from the heap, which may hold pages of earlier tests
        fresh.write(b"x" * (64 << 20))
        assert platform.peak_memory_bytes() - before > 48 << 20
    assert 0 < platform.free_memory_bytes() <= platform.total_memory_bytes()
    assert platform.supports_bf16 and platform.peak_flops(torch.bfloat16) is None


def test_a_container_limit_bounds_the_memory(monkeypatch):
    monkeypatch.setattr(cpu, "_cgroup_memory", lambda: (1 << 20, 3 << 18))
    platform = platforms.get_platform("cpu")
    assert platform.total_memory_bytes() == 1 << 20
    assert platform.free_memory_bytes() == 1 << 18


@pytest.mark.parametrize(
    ("device_name", "half"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362),
        ("NVIDIA GB200", 2500),
    ],
)
def test_peak_of_known_gpus(device_name, half):
    assert cuda.peak_of(device_name).half == half


def test_an_unknown_gpu_has_no_peak():
    assert cuda.peak_of("NVIDIA A1000 Laptop GPU") is None


def test_npu_is_preferred_and_activated_for_its_rank(npu, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    platform = platforms.get_platform()
    assert (platform.name, platform.device_type, platform.backend) == ("npu", "npu", "hccl")
    platform.activate()
    assert ("set_device", 1) in npu.calls and ("jit_compile", False) in npu.calls
    assert npu.config.allow_internal_format is False
    assert ops.kernels_in_use() == "npu"
    assert platform.peak_flops(torch.bfloat16) == 376e12 and platform.peak_flops(torch.float32) is None
    assert platform.free_memory_bytes() == 52 << 30 and platform.total_memory_bytes() == 64 << 30
    assert platform.supports_bf16
    platforms.reset_platform()
    assert ops.kernels_in_use() == "torch"


def test_a_rank_without_an_npu_is_told_how_many_there_are(npu, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ResourceError, match="local rank 2 has no NPU: 2 visible"):
        platforms.get_platform("npu").activate()


def test_the_mindspeed_adaptor_is_imported_only_on_request(npu, monkeypatch):
    monkeypatch.setenv("MINDSPEED_WAN_ADAPTOR", "1")
    with pytest.raises(ResourceError, match=r"core_v0\.12\.1"):
        platforms.get_platform("npu").activate()


def test_no_visible_npu_falls_back_to_the_next_platform(npu, monkeypatch):
    monkeypatch.setattr(npu, "is_available", lambda: False)
    assert platforms.get_platform().name != "npu"
    assert "no NPU is visible" in platforms.available_platforms()["npu"]


def test_torch_npu_without_cann_is_found_before_torch_breaks(tmp_path):
    """The real failure: an importable torch_npu whose libraries are missing makes `import torch` raise."""
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    metadata = tmp_path / "torch_npu-2.13.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    environment.pop("MINDSPEED_WAN_DEVICE", None)

    def run(code):
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    assert "Failed to load the backend extension: torch_npu" in run("import torch").stderr
    chosen = run(
        "from mindspeed_wan.platforms import *; import mindspeed_wan.platforms as p; print(p.get_platform().name)"
    )
    assert chosen.stdout.strip() in ("cpu", "cuda"), chosen.stderr
    forced = run("import mindspeed_wan.platforms as p; p.get_platform('npu')")
    assert "torch_npu is installed but CANN is not in reach" in forced.stderr
    assert "set_env.sh" in forced.stderr


def test_finding_out_imports_no_torch():
    code = "import mindspeed_wan.platforms, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_module_without_a_spec_counts_as_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    assert cann.torch_npu_installed()
