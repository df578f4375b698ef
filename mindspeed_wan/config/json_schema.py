"""JSON Schema of the files users edit, for completion and checks in editors.

``schema(kind, title)`` works for any pydantic class of a file. ``mindspeed-wan schema FOLDER`` (``cli.schema``) writes
those of all files, the cluster description's included; docs/editors.md tells an editor where they are.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mindspeed_wan.config.fsdp2_file import Fsdp2File
from mindspeed_wan.config.mm_files import DataFile, ModelFile
from mindspeed_wan.config.schema import RunConfig
from mindspeed_wan.config.validate import SCHEMA_KEY
from mindspeed_wan.errors import ResourceError

DIALECT = "https://json-schema.org/draft/2020-12/schema"
FILES: dict[str, tuple[type[BaseModel], str]] = {
    "model": (ModelFile, "model.json of --mm-model: expert, encoders, flow matching"),
    "data": (DataFile, "data.json of --mm-data: clips, sizes, captions"),
    "fsdp2": (Fsdp2File, "fsdp2_config.yaml of --fsdp2-config-path"),
    "config": (RunConfig, "config.json that a run writes: every setting with its value"),
}
"""Schema name -> (class of the file, title)."""


def schema(kind: type[BaseModel], title: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a file; ``$schema`` itself is one of its keys."""
    made = kind.model_json_schema()
    made["title"] = title
    made["properties"] = {SCHEMA_KEY: {"type": "string", "description": "Where this schema is."}, **made["properties"]}
    return {"$schema": DIALECT, **made}


def schema_text(kind: type[BaseModel], title: str) -> str:
    """Return the schema as the text of its file."""
    return json.dumps(schema(kind, title), indent=2, ensure_ascii=False) + "\n"


def write_file(path: Path, text: str) -> None:
    """Write a generated file whole or not at all.

    Raises:
        ResourceError: nothing can be written there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot write: {error.strerror}", where=str(path),
                            fix="free some space, or choose a folder that you can write to") from None
