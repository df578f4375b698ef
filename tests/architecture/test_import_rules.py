"""The written architecture: which room may import which, and who may know which third party."""

from __future__ import annotations

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"mindspeed_wan": ROOT / "mindspeed_wan", "mindspeed_wan_converters": ROOT / "converters"}

# third party -> module patterns that may import it (anywhere in the file, functions included)
ALLOWED = {
    "torch_npu": ["mindspeed_wan.platforms.npu"],
    "mindspeed": ["mindspeed_wan.platforms.npu"],
    "megatron": [
        "mindspeed_wan.parallel.groups",
        "mindspeed_wan.models.wan.layers",
        "mindspeed_wan.training.*",
        "mindspeed_wan.checkpoint.megatron",
        "mindspeed_wan.platforms.*",
    ],
    "diffusers": ["mindspeed_wan.models.*", "mindspeed_wan.demo.*"],
    "transformers": ["mindspeed_wan.models.*", "mindspeed_wan.demo.*"],
    "mindspeed_wan_converters": ["mindspeed_wan_converters*", "mindspeed_wan.cli.*", "mindspeed_wan.demo.*"],
    "torchvision": [],
    "transformer_engine": [],
    "apex": [],
    "converters": [],
}
# modules that must stay free of torch, so that `--help` and the converters' tables answer at once
NO_TORCH = [
    "mindspeed_wan",
    "mindspeed_wan.errors",
    "mindspeed_wan.models.wan.config",
    "mindspeed_wan.models.wan.param_map",
    "mindspeed_wan.lora.spec",
    "mindspeed_wan.config.schema",
    "mindspeed_wan.config.flags",
    "mindspeed_wan.cli.main",
    "mindspeed_wan_converters.cli",
]


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *(p for p in parts if p != "__init__")))
            found[name] = path
    return found


def _imports(path: Path) -> set[tuple[str, int]]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add((node.module, node.lineno))
    return found


def test_third_parties_are_known_only_where_the_design_says() -> None:
    wrong = []
    for module, path in _modules().items():
        for target, line in _imports(path):
            allowed = ALLOWED.get(target.split(".")[0])
            if allowed is not None and not any(fnmatch.fnmatch(module, pattern) for pattern in allowed):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_rooms_import_downwards() -> None:
    """The layers and contracts of pyproject.toml, checked by import-linter."""
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", NO_TORCH)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('torch', 'megatron', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_importing_the_package_does_nothing() -> None:
    code = "import sys; before = set(sys.modules); import mindspeed_wan; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    new = [name for name in ast.literal_eval(done.stdout) if not name.startswith("__editable__")]
    assert new == ["mindspeed_wan"]


def test_every_package_has_an_init_with_a_docstring() -> None:
    missing = []
    for package, folder in PACKAGES.items():
        for directory in [folder, *(p for p in folder.rglob("*") if p.is_dir() and p.name != "__pycache__")]:
            if not any(directory.glob("*.py")):
                continue
            init = directory / "__init__.py"
            if not init.is_file() or not ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))):
                missing.append(f"{package}: {directory.relative_to(ROOT)}")
    assert not missing, "no docstring in __init__.py of " + ", ".join(missing)
