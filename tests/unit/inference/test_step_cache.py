"""Step caches: plans equal the reference rules run online, nothing crosses the switch, a table returns itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_wan.diffusion.schedule import SigmaSchedule, sigmas
from mindspeed_wan.errors import ConfigError
from mindspeed_wan.inference import calibration, step_cache
from mindspeed_wan.inference.cache_options import CacheOptions
from mindspeed_wan.inference.cache_tables import MAGNITUDES, POLYNOMIALS

T2V = sigmas(40, 12.0, "official", "unipc")
I2V = sigmas(40, 5.0, "official", "unipc")


def _online_magcache(task: str, ratios: list[float], switch: int, threshold: float, k: int, retention: float
                     ) -> list[bool]:
    """The authors' loop over passes (two a step; here the conditional ones), its state dropped at the switch."""
    split, total = 2 * switch, 2 * len(ratios)
    decisions, state = [], (1.0, 0, 0.0)
    for cnt in range(0, total, 2):
        if cnt == split:
            state = (1.0, 0, 0.0)
        if task.startswith("i2v"):
            retained = cnt < int(split + (total - split) * retention)
        else:
            retained = cnt < int(split * retention) or split <= cnt <= (total - split) * retention + split
        skip = False
        if not retained and cnt not in (0, split):
            r, n, err = state
            r, n = r * ratios[cnt // 2], n + 1
            err += abs(1 - r)
            skip = err < threshold and n <= k
            state = (r, n, err) if skip else (1.0, 0, 0.0)
        decisions.append(not skip)
    return decisions


@pytest.mark.parametrize(("threshold", "k", "retention"), [
    (0.06, 2, 0.4), (0.06, 2, 0.1), (0.04, 2, 0.2), (0.24, 6, 0.2), (0.06, 2, 0.5), (0.1, 3, 0.0),
])
@pytest.mark.parametrize("task", ["t2v-A14B", "i2v-A14B"])
@pytest.mark.parametrize("steps", [40, 50, 33, 8, 4])
def test_magcache_plan_equals_the_rule_run_online(task: str, steps: int, threshold: float, k: int, retention: float):
    table = MAGNITUDES[task]
    schedule, reference = (sigmas(n, table.shift, "official", "unipc") for n in (steps, table.num_steps))
    spans = step_cache.expert_spans(schedule, table.boundary)
    ratios = step_cache.ratios_for(table, schedule, reference, table.boundary)
    options = CacheOptions(method="magcache", threshold=threshold, max_skips=k, retention=retention)
    cache = options.build(task, schedule, shift=table.shift, boundary=table.boundary, grid="official", solver="unipc")
    expected = _online_magcache(task, ratios, spans[1].start, threshold, k, retention)
    assert isinstance(cache, step_cache.StepCache) and list(cache.plan.compute) == expected
    assert steps < 30 or cache.plan.num_skipped > 0


def test_the_published_recipe_keeps_ten_and_six_steps_of_t2v() -> None:
    """What the authors' code gives for E006K2R04 at 40 steps: 26 high steps, int(52 * 0.4) = 20 passes."""
    cache = CacheOptions(method="magcache").build("t2v-A14B", T2V, shift=12.0, boundary=0.875, grid="official",
                                                  solver="unipc")
    assert isinstance(cache, step_cache.StepCache)
    assert cache.plan.compute[:12] == (True,) * 10 + (False,) * 2
    assert cache.plan.compute[26:33] == (True,) * 6 + (False,)


def test_published_tables_belong_to_the_official_schedules() -> None:
    assert [len(s) for s in step_cache.expert_spans(T2V, 0.875)] == [26, 14]
    assert [len(s) for s in step_cache.expert_spans(I2V, 0.900)] == [15, 25]
    for task, schedule in (("t2v-A14B", T2V), ("i2v-A14B", I2V)):
        table = MAGNITUDES[task]
        switch = step_cache.expert_spans(schedule, table.boundary)[1].start
        assert len(table.ratios) == 40 and math.isnan(table.ratios[switch])
        assert not any(map(math.isnan, table.ratios[:switch] + table.ratios[switch + 1 :]))


def test_a_table_returns_itself_and_composes_on_fewer_steps() -> None:
    table = MAGNITUDES["t2v-A14B"]
    same = step_cache.ratios_for(table, T2V, T2V, 0.875)
    for step, (a, b) in enumerate(zip(same, table.ratios)):
        assert math.isnan(b) or a == pytest.approx(b, rel=1e-9), step
    half = sigmas(20, 12.0, "official", "unipc")
    fewer = step_cache.ratios_for(table, half, T2V, 0.875)
    high = step_cache.expert_spans(half, 0.875)[0]
    # The change over the whole high expert is the same, however many steps cross it.
    long = math.prod(table.ratios[1 : 1 + 2 * (len(high) - 1)])
    assert math.prod(fewer[high.start + 1 : high.stop]) == pytest.approx(long, rel=0.01)


def test_table_of_another_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="boundary 0.875"):
        step_cache.ratios_for(MAGNITUDES["t2v-A14B"], T2V, T2V, 0.9)
    low_only = SigmaSchedule((0.5, 0.2, 0.0), (500.0, 200.0))
    with pytest.raises(ConfigError, match="uses 1 experts, the MagCache table 2"):
        step_cache.ratios_for(MAGNITUDES["t2v-A14B"], low_only, T2V, 0.875)


def test_teacache_plan_equals_the_rule_run_online() -> None:
    generator = torch.Generator().manual_seed(0)
    spans = step_cache.expert_spans(T2V, 0.875)
    walk = torch.randn(40, 1, 6, 8, generator=generator).cumsum(0) * 0.02 + torch.randn(1, 6, 8, generator=generator)
    changes = step_cache.modulation_changes(list(walk), spans)
    plan = step_cache.teacache_plan(changes, spans, polynomial=(1.0, 0.0), threshold=0.1, num_forced_start=5)
    accumulated, expected = 0.0, []
    for step in range(40):
        if step < 5 or step == spans[1].start:
            accumulated = 0.0
            expected.append(True)
            continue
        accumulated += float((walk[step] - walk[step - 1]).abs().mean() / walk[step - 1].abs().mean())
        expected.append(accumulated >= 0.1)
        if expected[-1]:
            accumulated = 0.0
    assert list(plan.compute) == expected and plan.num_skipped > 0
    more = step_cache.teacache_plan(changes, spans, polynomial=(1.0, 0.0), threshold=0.3)
    assert more.num_skipped > plan.num_skipped
    assert all(len(c) == 5 for c in POLYNOMIALS.values())


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(2, 60), shift=st.sampled_from([3.0, 5.0, 12.0]), boundary=st.sampled_from([None, 0.875, 0.9]),
       interval=st.integers(2, 6), threshold=st.floats(0.01, 2.0))
def test_no_plan_crosses_the_switch(steps, shift, boundary, interval, threshold) -> None:
    schedule = sigmas(steps, shift, "official", "unipc")
    spans = step_cache.expert_spans(schedule, boundary)
    assert [step for span in spans for step in span] == list(range(steps))
    plans = [step_cache.taylorseer_plan(spans, interval=interval),
             step_cache.magcache_plan([0.99] * steps, spans, threshold=threshold, max_skips=4, retention=0.1),
             step_cache.teacache_plan([0.05] * steps, spans, polynomial=(1.0, 0.0), threshold=threshold)]
    for plan in plans:
        assert len(plan.compute) == steps and all(plan.compute[span.start] for span in spans)


def _drive(cache, functions, plan_steps: int, switch: int, modulation=None) -> list[torch.Tensor]:
    """Run the cache over steps of a model whose residual at step i is ``functions(i)``."""
    outputs = []
    for step in range(plan_steps):
        cache.begin(step, "high" if step < switch else "low", modulation)
        x = torch.full((2, 1, 3), float(step))
        outputs.append(cache.around("cond")(x, lambda y, step=step: y + functions(step)) - x)
    return outputs


def test_reuse_gives_the_last_change_and_forgets_at_the_switch() -> None:
    plan = step_cache.CachePlan("magcache", (True, False, False, True, False, True, False))
    outputs = _drive(step_cache.StepCache(plan), lambda i: torch.full((2, 1, 3), 10.0 * (i + 1)), 7, switch=5)
    assert [float(o[0, 0, 0]) for o in outputs] == [10, 10, 10, 40, 40, 60, 60]
    # A plan that wrongly skips an expert's first step still computes: nothing of the other expert is remembered.
    wrong = step_cache.CachePlan("magcache", (True, False, True, False))
    outputs = _drive(step_cache.StepCache(wrong), lambda i: torch.full((2, 1, 3), 10.0 * (i + 1)), 4, switch=3)
    assert float(outputs[3][0, 0, 0]) == 40


@pytest.mark.parametrize("order", [1, 2])
def test_taylor_is_exact_on_a_line(order: int) -> None:
    spans = [range(0, 12)]
    plan = step_cache.taylorseer_plan(spans, interval=2, order=order, num_forced_start=order + 2)

    def line(step: int) -> torch.Tensor:
        return torch.full((2, 1, 3), 3.0 * step + 1)

    outputs = _drive(step_cache.StepCache(plan), line, 12, switch=12)
    assert plan.num_skipped >= 3
    for step, out in enumerate(outputs):
        torch.testing.assert_close(out, line(step))


def test_branches_do_not_share_their_memory() -> None:
    cache = step_cache.StepCache(step_cache.CachePlan("magcache", (True, False)))
    x = torch.zeros(1, 1, 1)
    cache.begin(0, "high", None)
    cache.around("cond")(x, lambda y: y + 1)
    cache.around("uncond")(x, lambda y: y + 2)
    cache.begin(1, "high", None)
    assert float(cache.around("cond")(x, lambda y: y + 9)) == 1
    assert float(cache.around("uncond")(x, lambda y: y + 9)) == 2
    cache.begin(0, "high", None)  # the next video starts with nothing
    assert float(cache.around("cond")(x, lambda y: y + 5)) == 5


def test_recorder_measures_ratio_and_polynomial_and_its_file_comes_back(tmp_path: Path) -> None:
    schedule = sigmas(12, 5.0, "official", "unipc")
    spans = step_cache.expert_spans(schedule, 0.875)
    switch = spans[1].start
    recorder = calibration.Recorder(schedule)

    def modulation(step: int) -> torch.Tensor:
        return torch.full((1, 6, 2), 1.0) * schedule.timestep(step).square()

    _drive(recorder, lambda i: torch.full((2, 1, 3), 0.9**i), 12, switch=switch, modulation=modulation)
    table = recorder.table(shift=5.0, boundary=0.875)
    for step in range(1, 12):
        assert math.isnan(table.ratios[step]) if step == switch else table.ratios[step] == pytest.approx(0.9, rel=1e-4)
    changes = step_cache.modulation_changes([modulation(step) for step in range(12)], spans)
    for span, polynomial in zip(spans, table.polynomials, strict=True):
        for step in span[1:]:  # the residual shrinks by 0.1 of itself at every step, whatever the embedding does
            assert step_cache.polynomial_at(polynomial, changes[step]) == pytest.approx(0.1, abs=1e-3)
    calibration.write_table(table, tmp_path / "t.json")
    again = calibration.read_table(tmp_path / "t.json")
    assert again.ratios[:switch] == table.ratios[:switch] and math.isnan(again.ratios[switch])
    assert again.polynomials == table.polynomials
    (tmp_path / "t.json").write_text('{"num_steps": 3}')
    with pytest.raises(ConfigError, match="not a MagCache table"):
        calibration.read_table(tmp_path / "t.json")


def test_ranks_and_videos_are_averaged() -> None:
    schedule = sigmas(3, 5.0, "official", "unipc")
    one, other = calibration.Recorder(schedule), calibration.Recorder(schedule)
    for recorder, factors in ((one, (0.9, 0.7)), (other, (0.5,))):
        for factor in factors:  # one video each
            _drive(recorder, lambda i, factor=factor: torch.full((2, 1, 3), factor**i), 3, switch=3,
                   modulation=lambda step: schedule.timestep(step).view(1, 1, 1))
    assert one.table(shift=5.0, boundary=None).ratios[1] == pytest.approx(0.8)
    both = one.table(shift=5.0, boundary=None, samples=[one.samples(), other.samples()])
    assert both.ratios[1:] == pytest.approx((0.7, 0.7))


def test_a_fit_follows_the_points_and_needs_some() -> None:
    xs = [0.01 * i for i in range(1, 13)]
    fitted = calibration.fit_polynomial(xs, [3 * x * x + 0.5 for x in xs])
    assert len(fitted) == 5 and step_cache.polynomial_at(fitted, 0.055) == pytest.approx(3 * 0.055**2 + 0.5)
    assert len(calibration.fit_polynomial(xs[:4], xs[:4])) == 2
    assert calibration.fit_polynomial(xs[:2], [1.0, 3.0]) == pytest.approx((2.0,))
    assert calibration.fit_polynomial(xs[:1], [1.0]) == ()
