"""VideoX-Fun's A14B weights: its class name in the published folders, and pipelines whose ``transformer`` is LOW."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_wan.demo.stand_ins import write_stand_in
from mindspeed_wan_converters.cli import run
from mindspeed_wan_converters.sources import recognise

FUN = "models/Diffusion_Transformer/Wan2.2-Fun-A14B-InP"
LAYOUTS = {"published": ("high_noise_model", "low_noise_model"), "pipeline": ("transformer_2", "transformer")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_experts_are_told_apart_and_land_in_the_usual_folders(layout: str, tmp_path: Path) -> None:
    fun = write_stand_in("videox-fun", tmp_path / "x") / FUN
    high, low = LAYOUTS[layout]
    for published, name in zip(LAYOUTS["published"], (high, low)):
        (fun / published).rename(fun / name)
    source = recognise(fun)
    assert source.format == "original"
    assert source.experts == {"high": fun / high, "low": fun / low}
    assert recognise(fun / low).experts == {"low": fun / low}
    assert run(["original_to_hf", str(fun), str(tmp_path / "hf"), "--quiet"]) == 0
    assert run(["verify", str(tmp_path / "hf" / "transformer"), str(fun / high)]) == 0
