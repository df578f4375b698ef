"""The sections: complete descriptions, one source for the architecture, a round trip through JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
from pydantic import BaseModel, ValidationError

from mindspeed_wan.config import schema
from mindspeed_wan.config.expert_range import OFFICIAL_BOUNDARY
from mindspeed_wan.config.fsdp2_file import Fsdp2File
from mindspeed_wan.config.mm_files import WHY, DataFile, ModelFile
from mindspeed_wan.config.schema import ParallelSection, RunConfig, WanSection
from mindspeed_wan.config.validate import dotted, key_paths, section_at
from mindspeed_wan.models.wan.config import BOUNDARY, WanConfig


def test_architecture_is_the_models_own():
    ours = {name: field.default for name, field in WanSection.model_fields.items()}
    theirs = {field.name: field.default for field in dataclasses.fields(WanConfig)}
    assert ours == theirs
    assert WanConfig.from_dict(WanSection(in_channels=36).to_dict()) == WanConfig(in_channels=36)


def test_boundaries_are_the_models_own():
    assert OFFICIAL_BOUNDARY == BOUNDARY


def test_resolved_reads_back_and_is_json():
    config = RunConfig(lora=schema.LoraSection(rank_pattern={"ffn.0": 4}), notes=("x",))
    assert RunConfig(**json.loads(json.dumps(config.resolved()))) == config


def test_sections_are_frozen_and_closed():
    with pytest.raises(ValidationError):
        RunConfig().training.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        RunConfig(trainning={})  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", [RunConfig, ModelFile, DataFile, Fsdp2File])
def test_every_key_is_described(kind: type[BaseModel]):
    for path in key_paths(kind):
        owner = section_at(kind, path[:-1])
        assert owner is not None
        assert owner.model_fields[str(path[-1])].description, dotted(path)


def test_reasons_belong_to_existing_keys():
    known = {dotted(path) for kind in (ModelFile, DataFile) for path in key_paths(kind)}
    assert set(WHY) <= known


@pytest.mark.parametrize(
    ("algorithm", "degree", "ulysses", "ring"),
    [("ulysses_cp_algo", None, 4, 1), ("megatron_cp_algo", None, 1, 4), ("hybrid_cp_algo", 2, 2, 2)],
)
def test_context_split(algorithm: str, degree: int | None, ulysses: int, ring: int):
    parallel = ParallelSection(context=4, context_parallel_algo=algorithm, ulysses_degree_in_cp=degree)
    assert (parallel.ulysses, parallel.ring) == (ulysses, ring)


def test_batch_arithmetic():
    config = RunConfig(
        parallel=ParallelSection(tensor=2, context=2, use_torch_fsdp2=True),
        training=schema.TrainingSection(micro_batch_size=2, global_batch_size=8),
    )
    assert config.parallel.data(8) == 2
    assert config.gradient_accumulation(8) == 2
    assert config.shard_size(8) == 4
    assert RunConfig().global_batch(4) == 4
