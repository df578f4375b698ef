"""docs/schemas: the committed files are the code's, accept every shipped file, and refuse what a run refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mindspeed_wan.cli.schema import schema_texts
from mindspeed_wan.config.documents import read_json
from mindspeed_wan.config.schema import RunConfig

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"
SCHEMAS = {name.partition(".")[0]: json.loads(text) for name, text in schema_texts().items()}
SHIPPED = [
    *(("model", path) for path in sorted(EXAMPLES.glob("**/pretrain_model*.json"))),
    *(("data", path) for path in sorted(EXAMPLES.glob("**/data.json"))),
    *(("inference", path) for path in sorted(EXAMPLES.glob("**/inference_model.json"))),
    *(("fsdp2", path) for path in sorted(EXAMPLES.glob("**/fsdp2*.yaml"))),
    *(("cluster", path) for path in sorted(EXAMPLES.glob("**/cluster.yaml"))),
]
MISTAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "unknown key": ("model", {"predictor": {"num_head": 40}}),
    "wrong type": ("model", {"predictor": {"num_heads": "40"}}),
    "not a choice": ("model", {"task": "t2i"}),
    "out of range": ("data", {"dataset_param": {"basic_parameters": {"data_path": "x"},
                                                "preprocess_parameters": {"cfg": 1.5}}}),
    "missing key": ("data", {"dataset_param": {}}),
    "yaml, not a choice": ("fsdp2", {"param_dtype": "fp8"}),
    "cluster, no nodes": ("cluster", {"name": "x", "devices_per_node": 8, "device": "npu"}),
    "cluster, unknown block": ("cluster", {"name": "x", "nodes": 1, "devices_per_node": 8, "device": "npu", "lsf": {}}),
    "inference, unknown key": ("inference", {"prompt": "x", "save_path": "y", "prompts": "z"}),
}


def errors(name: str, value: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMAS[name]).iter_errors(value)]


def test_every_kind_of_file_is_shipped() -> None:
    assert {name for name, _ in SHIPPED} == set(SCHEMAS) - {"config"}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_schemas(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])


@pytest.mark.parametrize(("name", "path"), SHIPPED, ids=lambda value: getattr(value, "name", value))
def test_shipped_files_are_accepted(name: str, path: Path) -> None:
    value = yaml.safe_load(path.read_text(encoding="utf-8")) if path.suffix == ".yaml" else read_json(path)
    assert errors(name, value) == []
    assert errors(name, {"$schema": "./x.json", **value}) == []


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_refused(case: str) -> None:
    assert errors(*MISTAKES[case])


def test_the_resolved_configuration_is_accepted() -> None:
    assert errors("config", RunConfig().resolved()) == []
