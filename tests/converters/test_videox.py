"""VideoX-Fun's A14B folders: Wan-AI's names inside ``transformer`` (low) and ``transformer_2`` (high)."""

from __future__ import annotations

from pathlib import Path

from mindspeed_wan.demo.stand_ins import write_stand_in
from mindspeed_wan_converters.cli import run
from mindspeed_wan_converters.sources import recognise


def test_the_experts_are_told_apart_and_land_in_the_usual_folders(tmp_path: Path) -> None:
    fun = write_stand_in("videox-fun", tmp_path / "x") / "models/Diffusion_Transformer/Wan2.2-Fun-A14B-InP"
    source = recognise(fun)
    assert source.format == "original"
    assert source.experts == {"high": fun / "transformer_2", "low": fun / "transformer"}
    assert recognise(fun / "transformer").experts == {"low": fun / "transformer"}
    assert run(["original_to_hf", str(fun), str(tmp_path / "hf"), "--quiet"]) == 0
    assert run(["verify", str(tmp_path / "hf" / "transformer"), str(fun / "transformer_2")]) == 0
