"""What users meet first: the help, its speed, the reference page, and no torch before the checks are done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_wan.config import docs, json_schema
from mindspeed_wan.config.documents import read_document
from mindspeed_wan.config.flag_table import USED
from mindspeed_wan.config.flag_table_inert import ALL_FLAGS, NOTED, REFUSED
from mindspeed_wan.config.flags import parse
from mindspeed_wan.config.help import WIDTH, help_text
from mindspeed_wan.config.mm_files import ModelFile
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.config.validate import validate
from tests.unit.config.world import World

ROOT = Path(__file__).parents[3]
NO_TORCH = """
import sys
from mindspeed_wan.config.flags import parse
try:
    parse(sys.argv[1:], {"WORLD_SIZE": "8"})
except SystemExit:
    pass
slow = {"torch", "numpy", "transformers", "diffusers", "megatron"} & set(sys.modules)
assert not slow, slow
if "--help" in sys.argv:
    assert "pydantic" not in sys.modules and "yaml" not in sys.modules
"""


def run_python(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter at the repository root."""
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_no_torch_is_imported(world: World):
    for argv in (["--help"], world.argv()):
        done = run_python(NO_TORCH, *argv)
        assert done.returncode == 0, done.stderr


def test_help_fits_and_is_complete():
    text = help_text()
    for name in ALL_FLAGS:
        assert name in text
    assert max(len(line) for line in text.splitlines()) <= WIDTH + 10
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0


def test_every_flag_says_what_it_does():
    assert len(ALL_FLAGS) == len(USED) + len(NOTED) + len(REFUSED)  # no name twice
    for flag in USED:
        assert flag.help and flag.target and flag.effect == "used"
        section, _, rest = flag.target.partition(".")
        if section in ("files", "extra"):
            continue
        assert _has(RunConfig, [section, *rest.split(".")]), flag
    for flag in (*NOTED, *REFUSED):
        assert flag.reason


def _has(kind: type, names: list[str]) -> bool:
    if names[0] == "lora":
        from mindspeed_wan.config.schema import LoraSection

        return names[1] in LoraSection.model_fields
    field = kind.model_fields.get(names[0])  # type: ignore[attr-defined]
    return field is not None and (len(names) == 1 or _has(field.annotation, names[1:]))


def test_reference_page_is_current():
    page = ROOT / "docs/reference/flags.md"
    assert page.read_text(encoding="utf-8") == docs.flags_page(), "python -m mindspeed_wan.config.docs " + str(page)


def test_json_schemas():
    model = json_schema.schema(*json_schema.FILES["model"])
    assert model["additionalProperties"] is False
    assert model["$defs"]["PredictorFile"]["properties"]["num_heads"]["description"] == "Attention heads."


def test_schema_key_is_no_mistake(tmp_path: Path):
    path = tmp_path / "model.json"
    path.write_text('{"$schema": "./model.schema.json", "task": "t2v"}')
    assert validate(ModelFile, read_document(path), {})[1] == []
    path.write_text('{"predictor": {"$schema": "x"}}')
    assert len(validate(ModelFile, read_document(path), {})[1]) == 1
