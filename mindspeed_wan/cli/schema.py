"""`mindspeed-wan schema`: JSON Schema files, so that an editor completes and checks what users write."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option."""
    parser.add_argument("folder", type=Path, help="folder for the *.schema.json files")


def run(args: argparse.Namespace) -> int:
    """Write and name the files."""
    from mindspeed_wan.config.json_schema import write_file

    for name, text in schema_texts().items():
        write_file(args.folder / name, text)
        print(args.folder / name)
    return 0


def schema_texts() -> dict[str, str]:
    """Return the text of every schema by file name."""
    from mindspeed_wan.config.json_schema import FILES, schema_text
    from mindspeed_wan.inference.mm_file import InferenceFile
    from mindspeed_wan.planning.cluster.spec import ClusterSpec

    kinds: dict[str, tuple[type[BaseModel], str]] = {
        **FILES,
        "inference": (InferenceFile, "inference_model.json of inference_sora.py --mm-model"),
        "cluster": (ClusterSpec, "the description of mindspeed-wan cluster --spec"),
    }
    return {f"{name}.schema.json": schema_text(kind, title) for name, (kind, title) in kinds.items()}
