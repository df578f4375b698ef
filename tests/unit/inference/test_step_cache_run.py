"""Step caches inside real generation on a tiny folder: what is skipped, what that costs, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mindspeed_wan.diffusion.schedule import sigmas
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.inference.cache_options import CacheOptions
from mindspeed_wan.inference.calibration import read_table
from mindspeed_wan.inference.pipeline import WanGenerator
from mindspeed_wan.inference.step_cache import StepCache
from tests.helpers.tiny import tiny_pipeline_folder

ASK = {"size": (32, 48), "num_frames": 5, "steps": 12, "seed": 1, "decode": False, "prompt": "a red circle moves left"}


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> WanGenerator:
    folder = tiny_pipeline_folder(tmp_path_factory.mktemp("model"))
    return WanGenerator.from_pretrained(folder, dtype="fp32", device="cpu")


def _error(latents: torch.Tensor, exact: torch.Tensor) -> float:
    return float((latents - exact).norm() / exact.norm())


def test_plans_skip_and_a_plan_that_skips_nothing_is_the_exact_run(generator: WanGenerator, capsys) -> None:
    exact = generator(**ASK).latents
    for cache in (CacheOptions(method="taylorseer", interval=2), CacheOptions(method="magcache", threshold=0.3),
                  CacheOptions(method="teacache", coefficients=((1.0, 0.0),), threshold=1.0)):
        cached = generator(**ASK, cache=cache).latents
        said = capsys.readouterr().out
        assert f"{cache.method}: " in said and "0 of 12" not in said
        assert 0 < _error(cached, exact) < 1, cache.method  # random weights change a lot between steps
    never = CacheOptions(method="magcache", threshold=1e-9)
    torch.testing.assert_close(generator(**ASK, cache=never).latents, exact, rtol=0, atol=0)
    torch.testing.assert_close(generator(**ASK).latents, exact, rtol=0, atol=0)  # nothing is left behind


def test_calibrated_table_is_used(generator: WanGenerator, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    exact = generator(**ASK, cache=CacheOptions(calibrate=table)).latents
    torch.testing.assert_close(exact, generator(**ASK).latents, rtol=0, atol=0)
    cached = generator(**ASK, cache=CacheOptions(method="magcache", table=table, threshold=0.5, retention=0.1)).latents
    assert 0 < _error(cached, exact) < 1
    teacache = CacheOptions(method="teacache", table=table, threshold=9.0)
    assert 0 < _error(generator(**ASK, cache=teacache).latents, exact) < 1
    with pytest.raises(ConfigError, match="measured at 12 steps, shift 12, boundary 0.875; this run has 11"):
        generator(**{**ASK, "steps": 11}, cache=teacache)
    with pytest.raises(ConfigError, match="measured at shift 12, this run uses 5"):
        generator(**ASK, shift=5.0, cache=CacheOptions(method="magcache", table=table))


def test_decisions_on_a_model_are_those_of_the_rules_run_online(
    generator: WanGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the cached run a bystander decides at every step as the published code does, from what the model shows."""
    table = tmp_path / "table.json"
    generator(**ASK, cache=CacheOptions(calibrate=table))
    for cache in (CacheOptions(method="teacache", coefficients=((1.0, 0.0), (0.5, 0.0)), threshold=0.9),
                  CacheOptions(method="magcache", table=table, threshold=0.3, max_skips=2, retention=0.2)):
        online = _Online(cache)
        begin = StepCache.begin

        def watched(self: StepCache, step: int, expert: str, modulation, begin=begin, online=online) -> None:
            begin(self, step, expert, modulation)
            online.decide(step, expert, modulation, self.plan.compute[step])

        with monkeypatch.context() as patch:
            patch.setattr(StepCache, "begin", watched)
            generator(**ASK, cache=cache)
        assert online.expected == online.followed and not all(online.followed), cache.method


class _Online:
    """TeaCache's and MagCache's decisions step by step, with the state their authors keep, cleared at the switch."""

    def __init__(self, cache: CacheOptions) -> None:
        self.cache, self.expert, self.place = cache, "", 0
        schedule = sigmas(ASK["steps"], 12.0, "official", "unipc")
        self.lengths = dict(zip(("high", "low"), schedule.expert_steps(0.875)))
        self.ratios = read_table(cache.table).ratios if cache.table else ()
        self.expected: list[bool] = []
        self.followed: list[bool] = []

    def decide(self, step: int, expert: str, modulation, followed: bool) -> None:
        if expert != self.expert:
            self.expert, self.place, self.sum, self.ratio, self.skips, self.before = expert, 0, 0.0, 1.0, 0, None
        compute = self._teacache(step, modulation(step)) if self.cache.method == "teacache" else self._magcache(step)
        self.expected.append(compute)
        self.followed.append(followed)
        self.place += 1

    def _teacache(self, step: int, now: torch.Tensor) -> bool:
        before, self.before = self.before, now
        if before is None or step < 5:
            return True
        slope = self.cache.coefficients[self.expert == "low"][0]
        self.sum += slope * float((now - before).abs().mean() / before.abs().mean())
        if self.sum < self.cache.threshold:
            return False
        self.sum = 0.0
        return True

    def _magcache(self, step: int) -> bool:
        passes, low = 2 * self.lengths[self.expert] * self.cache.retention, self.expert == "low"
        if self.place == 0 or (2 * self.place <= passes if low else 2 * self.place < int(passes)):
            return True
        self.ratio, self.skips = self.ratio * self.ratios[step], self.skips + 1
        self.sum += abs(1 - self.ratio)
        if self.sum < self.cache.threshold and self.skips <= self.cache.max_skips:
            return False
        self.ratio, self.skips, self.sum = 1.0, 0, 0.0
        return True


@pytest.mark.parametrize(("cache", "message"), [
    (CacheOptions(method="magcash"), "use one of"),
    (CacheOptions(method="teacache"), "no TeaCache polynomial is published for t2v-A14B"),
    (CacheOptions(method="magcache", threshold=-1), "above 0"),
    (CacheOptions(method="magcache", table=Path("none.json")), "does not exist"),
    (CacheOptions(method="taylorseer", interval=1), "out of range"),
    (CacheOptions(method="magcache", calibrate=Path("x.json")), "drop --step_cache"),
])
def test_settings_that_cannot_be_are_explained(generator: WanGenerator, cache: CacheOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generator(**ASK, cache=cache)


def test_calibration_by_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mindspeed_wan.inference.calibration import read_table
    from mindspeed_wan.inference.generate import main

    table = tmp_path / "table.json"
    words = ["--ckpt_dir", str(tiny_pipeline_folder()), "--size", "48*32", "--frame_num", "5", "--device", "cpu",
             "--dtype", "fp32", "--sample_steps", "12", "--contact_sheet", "false"]
    words = [*words, "--prompt", "a"]
    assert main([*words, "b", "--save_path", str(tmp_path / "c"), "--calibrate_cache", str(table)]) == 0
    both = read_table(table)
    assert len(both.ratios) == 12 and len(both.polynomials) == 2
    assert main([*words, "--save_path", str(tmp_path / "d"), "--calibrate_cache", str(table)]) == 0
    assert read_table(table).ratios[1] != both.ratios[1]  # two prompts were averaged
    for method in ("magcache", "teacache"):
        words_of = ["--step_cache", method, "--cache_table", str(table), "--cache_threshold", "9"]
        assert main([*words, *words_of, "--save_path", str(tmp_path / method)]) == 0
        assert f"{method}: 0 of" not in capsys.readouterr().out
    # A finished video is measured all the same, and what too few steps cannot give is said before they run.
    few = [*words, "--sample_steps", "4", "--save_path", str(tmp_path / "few")]
    assert main(few) == 0 and main([*few, "--calibrate_cache", str(table)]) == 0
    assert "too few for TeaCache's polynomials (3 of each expert are needed)" in capsys.readouterr().out
    assert read_table(table).num_steps == 4 and not read_table(table).polynomials


def test_a_measured_again_table_is_another_video(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    settings = []
    for text in ("{}", "{ }", "{}"):
        table.write_text(text)
        settings.append(CacheOptions(method="magcache", table=table).settings())
    assert settings[0] == settings[2] != settings[1]


def test_flags_reach_the_cache(tmp_path: Path) -> None:
    from mindspeed_wan.inference.flags import parse

    options = parse(["--ckpt_dir", str(tmp_path), "--prompt", "x", "--step_cache", "magcache",
                     "--cache_threshold", "0.1", "--cache_max_skips=3"], world_size=1)
    assert options.cache == CacheOptions(method="magcache", threshold=0.1, max_skips=3)
    with pytest.raises(ConfigError, match="use one of none, teacache, magcache, taylorseer"):
        parse(["--ckpt_dir", str(tmp_path), "--prompt", "x", "--step_cache", "magic"], world_size=1)
