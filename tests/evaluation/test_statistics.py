"""Intervals cover what they should, and agree with theory where there is one."""

from __future__ import annotations

import numpy as np
import pytest

from hfscratch.evaluation import statistics
from hfscratch.evaluation.statistics import Figure, interval, mean, paired_interval, ratio


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for number in range(200):
        low, high = interval(mean(generator.exponential(1.0, size=80)), seed=number)
        covered += low <= 1.0 <= high
    assert 0.88 * 200 <= covered <= 0.99 * 200


def test_every_resample_is_drawn_from_the_examples_themselves():
    values = np.array([1.0, 10.0, 100.0])
    drawn = statistics._resampled(mean(values), seed=0)
    possible = {round((a + b + c) / 3, 9) for a in values for b in values for c in values}
    assert len(drawn) == 2000
    assert {round(each, 9) for each in drawn} == possible
    assert abs(drawn.mean() - values.mean()) < 2


def test_a_ratio_of_sums_is_resampled_by_documents_and_agrees_with_the_delta_method():
    generator = np.random.default_rng(1)
    sizes = generator.integers(50, 5000, size=400).astype(float)
    bits = sizes * generator.normal(1.5, 0.3, size=400)
    figure = ratio(bits, sizes)
    assert figure.value == pytest.approx(bits.sum() / sizes.sum())
    low, high = interval(figure, seed=0)
    spread = np.sqrt(((bits - figure.value * sizes) ** 2).sum()) / sizes.sum()
    assert low < figure.value < high
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_examples_without_a_byte_count_for_nothing():
    some = ratio(np.array([3.0, 0.0, 5.0]), np.array([1, 0, 2]))
    assert some.value == 8 / 3
    assert interval(some, seed=0) == (2.5, 3.0)


def test_paired_intervals_draw_the_same_examples_for_both():
    generator = np.random.default_rng(2)
    base = generator.normal(size=100)
    better = base + 0.1 + generator.normal(scale=0.05, size=100)
    low, high = paired_interval(mean(better), mean(base), seed=0)
    assert 0 < low < 0.1 < high
    assert high - low < 0.1 * (np.diff(interval(mean(base), seed=0)).item())
    assert paired_interval(mean(base), mean(base), seed=0) == (0.0, 0.0)


def test_the_seed_decides_the_interval():
    figure = mean(np.random.default_rng(3).normal(size=50))
    assert interval(figure, seed=5) == interval(figure, seed=5)
    assert interval(figure, seed=5) != interval(figure, seed=6)


def test_drawing_in_parts_changes_nothing(monkeypatch):
    figure = mean(np.random.default_rng(4).normal(size=50))
    whole = interval(figure, seed=0)
    monkeypatch.setattr(statistics, "DRAWS_AT_ONCE", 333)
    assert interval(figure, seed=0) == pytest.approx(whole)


def test_more_examples_than_are_resampled_give_an_interval_as_wide():
    values = np.random.default_rng(5).normal(size=40_000)
    low, high = interval(mean(values), seed=0)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 200, rel=0.1)


def test_a_figure_that_is_no_mean_is_made_of_resampled_sums():
    sums = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    figure = Figure(sums, lambda rows: rows[:, 0] ** 2 - rows[:, 1], sums[:, 0])
    assert figure.value == 81 - 12
    low, high = interval(figure, seed=0)
    assert low >= 9 - 6 and high <= 225 - 18


def test_a_single_example_has_no_spread():
    assert interval(mean([0.4]), seed=0) == (0.4, 0.4)
