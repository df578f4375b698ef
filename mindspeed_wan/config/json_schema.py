"""JSON Schema of the files users edit, for completion and checks in editors.

``python -m mindspeed_wan.config.json_schema FOLDER`` writes model.schema.json, data.schema.json and
fsdp2.schema.json; VS Code reads them through ``json.schemas`` and ``yaml.schemas``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mindspeed_wan.config.fsdp2_file import Fsdp2File
from mindspeed_wan.config.mm_files import DataFile, ModelFile
from mindspeed_wan.errors import ConfigError, run_main

FILES: dict[str, type[BaseModel]] = {"model": ModelFile, "data": DataFile, "fsdp2": Fsdp2File}
"""Schema name -> class of the file."""


def json_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of ``model``, ``data`` or ``fsdp2``."""
    schema = FILES[name].model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def write_schemas(folder: Path) -> list[Path]:
    """Write one ``<name>.schema.json`` per file kind and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in FILES:
        path = folder / f"{name}.schema.json"
        partial = path.with_suffix(".json.tmp")
        partial.write_text(json.dumps(json_schema(name), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        written.append(path)
    return written


def main(argv: list[str] | None = None) -> int:
    """Write the schemas to the folder named on the command line."""
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 1 or words[0].startswith("-"):
        raise ConfigError("one folder is needed", fix="python -m mindspeed_wan.config.json_schema FOLDER")
    for path in write_schemas(Path(words[0])):
        print(path)
    return 0


if __name__ == "__main__":
    run_main(main)
