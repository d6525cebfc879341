"""Steps, phases, a growing batch and the rows of each source: whole numbers that add up."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfscratch.errors import UsageError
from hfscratch.planning.curriculum import (
    Portion,
    describe,
    in_words,
    plan_steps,
    rows_by_source,
    rows_of_phases,
    tokens_by_source,
)


@given(tokens=st.integers(1, 10**13), rows=st.integers(1, 4096), length=st.sampled_from([2, 64, 256, 2048]))
def test_a_run_of_one_phase_has_as_many_steps_as_its_tokens_fill(tokens, rows, length):
    plan = plan_steps([(0.0, length)], tokens=tokens, batch_tokens=rows * length)
    assert plan.max_steps == max(1, tokens // (rows * length))
    assert plan.tokens == plan.max_steps * rows * length
    assert plan.rows_of_step(plan.max_steps - 1) == (0, (plan.max_steps - 1) * rows, rows)


@given(
    shares=st.lists(st.integers(1, 30), max_size=3),
    steps=st.integers(200, 5000),
    ramp=st.sampled_from([None, 0.02, 0.1]),
    by_steps=st.booleans(),
)
def test_every_phase_has_its_share_of_the_tokens_within_a_step(shares, steps, ramp, by_steps):
    phases = [(0.0, 64), *((share / 100, 64 * 2 ** (number % 3)) for number, share in enumerate(shares))]
    batch = 64 * 16
    given_length = {"max_steps": steps} if by_steps else {"tokens": steps * batch + 17}
    plan = plan_steps(phases, batch_tokens=batch, ramp=ramp, **given_length)
    assert by_steps is False or plan.max_steps == steps
    assert by_steps or abs(plan.tokens - steps * batch) < 2 * batch
    for phase, (share, length) in enumerate(phases):
        share = share or 1 - sum(each for each, _ in phases)
        assert abs(plan.tokens_of(phase) - share * plan.tokens) <= 2 * batch
        assert {each.sequence_length for each in plan.of_phase(phase)} == {length}
        assert plan.locate(plan.first_step_of(phase))[0].phase == phase
        assert phase == 0 or plan.locate(plan.first_step_of(phase) - 1)[0].phase == phase - 1


def test_the_batch_grows_by_doubling_over_the_share_of_tokens_that_is_given():
    plan = plan_steps([(0.0, 64), (0.25, 256)], tokens=64 * 4096, batch_tokens=64 * 16, ramp=0.3)
    rows = [plan.rows_of_step(step)[2] for step in range(plan.max_steps)]
    assert sorted(rows[: plan.first_step_of(1)]) == rows[: plan.first_step_of(1)]
    assert list(dict.fromkeys(rows)) == [2, 4, 8, 16]  # and 4 again in rows of 256
    grown = plan.tokens_at(rows.index(16))
    assert abs(grown - 0.3 * plan.tokens) < 3 * 64 * 16
    assert rows[-1] == 4 and plan.locate(plan.max_steps - 1)[0].batch_tokens == 64 * 16


def test_rows_of_steps_follow_each_other_and_tokens_add_up():
    plan = plan_steps([(0.0, 64), (0.2, 128), (0.1, 128)], tokens=100_000, batch_tokens=1024, ramp=0.2)
    at, tokens = dict.fromkeys(range(3), 0), 0
    for step in range(plan.max_steps):
        phase, first, rows = plan.rows_of_step(step)
        assert first == at[phase]
        at[phase] += rows
        assert plan.tokens_at(step) == tokens
        tokens += rows * plan.locate(step)[0].sequence_length
    assert plan.tokens == tokens == sum(plan.tokens_by_length(plan.max_steps).values())
    assert at == {phase: plan.rows_of(phase) for phase in range(3)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"phases": [(0.0, 64), (0.001, 64)], "tokens": 64_000}, r"pretrain.phases\[0\] has a share of 0.001"),
        ({"phases": [(0.0, 64)], "tokens": 64_000, "ramp": 0.1, "batch_tokens": 64}, "batch_ramp is 0.1"),
    ],
)
def test_a_phase_of_no_step_and_a_ramp_of_one_row_are_refused(arguments, said):
    with pytest.raises(UsageError, match=said):
        plan_steps(**{"batch_tokens": 256, **arguments})


SIZES = {"web": 10_000, "books": 1_000, "code": 500}


def solve(total=6_000, slack=0, **portions):
    mixture = {name: Portion(**values) for name, values in portions.items()}
    found = tokens_by_source(mixture, SIZES, total, key="pretrain.mixture", slack=slack)
    return {name: float(tokens) for name, tokens in found.items()}


def test_weights_share_what_epochs_leave():
    assert solve(web={"weight": 3}, books={"weight": 1}) == {"web": 4_500, "books": 1_500}
    assert solve(web={"weight": 3}, books={"weight": 1}, code={"epochs": 4}) == {
        "web": 3_000,
        "books": 1_000,
        "code": 2_000,
    }


def test_what_a_source_may_not_be_repeated_for_the_others_give_by_their_weights():
    found = solve(web={"weight": 1}, books={"weight": 1}, code={"weight": 2, "epochs": 2})
    assert found == {"web": 2_500, "books": 2_500, "code": 1_000}
    # Where code is full, books are then as well.
    found = solve(7_000, web={"weight": 1}, books={"weight": 1, "epochs": 2}, code={"weight": 2, "epochs": 4})
    assert found == {"web": 3_000, "books": 2_000, "code": 2_000}


def test_epochs_that_do_not_come_out_at_the_runs_tokens_are_refused_with_the_sums():
    with pytest.raises(UsageError, match=r"pretrain.mixture: its epochs ask for 10,000 tokens .*has 6,000"):
        solve(web={"epochs": 1})
    with pytest.raises(UsageError, match=r"give 1,500 tokens \(books 1,000, code 500\).*has 6,000"):
        solve(books={"weight": 1, "epochs": 1}, code={"epochs": 1})
    assert solve(9_990, slack=64, web={"epochs": 1}) == {"web": 10_000}


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    rows=st.lists(st.integers(1, 10**9), min_size=1, max_size=4),
)
def test_rows_of_sources_add_up_to_those_of_the_phase_each_within_one_of_its_share(weights, rows):
    total = 64 * sum(rows)
    mixture = {str(number): Portion(weight=weight) for number, weight in enumerate(weights)}
    tokens = tokens_by_source(mixture, dict.fromkeys(mixture, 1), total, key="")
    for each in rows:
        found = rows_by_source(tokens, each, total)
        assert sum(found.values()) == each
        for name, number in found.items():
            assert abs(number - tokens[name] * each / total) < 1


def test_a_mixture_is_worked_out_over_all_phases_that_keep_it():
    plan = plan_steps([(0.0, 64), (0.25, 64), (0.25, 128)], tokens=64 * 4000, batch_tokens=640)
    web, code = Portion(weight=1), Portion(epochs=1)
    epoch_rows = {"web": 10_000, "code": 1_000}
    rows = rows_of_phases(
        [{"web": web}, {"web": web, "code": code}, None], plan, lambda name, length: epoch_rows[name] * 64 // length
    )
    assert rows[0] == {"web": plan.rows_of(0)}
    assert rows[1]["code"] + 2 * rows[2]["code"] == 1_000  # one epoch in both phases together
    assert [sum(each.values()) for each in rows] == [plan.rows_of(phase) for phase in range(3)]
    told = describe(plan, rows, lambda name, length: epoch_rows[name] * 64 // length)
    assert sum(each["sources"].get("code", {"epochs": 0})["epochs"] for each in told) == pytest.approx(1)
    assert [line for line, _ in in_words(told)] == ["phase 1", "phase 2", "phase 3"]
    assert "code 50.0% (0.5 times)" in in_words(told)[1][1]


def test_nothing_is_said_of_a_plain_run():
    plan = plan_steps([(0.0, 64)], tokens=64_000, batch_tokens=640)
    rows = rows_of_phases([None], plan, lambda name, length: 500)
    assert rows == [{None: plan.rows_of(0)}]
    assert in_words(describe(plan, rows, lambda name, length: 500)) == []


@pytest.mark.parametrize("values", [{}, {"weight": 0}, {"weight": -1.0}, {"epochs": float("inf")}])
def test_a_portion_says_how_much(values):
    with pytest.raises(UsageError):
        Portion(**values)


def test_shares_that_are_written_in_decimals_are_what_was_written():
    """0.1 + 0.2 is not 0.3 in binary; a run of ten steps has seven and three of them."""
    plan = plan_steps([(0.0, 64), (0.1, 64), (0.2, 64)], tokens=640, batch_tokens=64)
    assert [each.num_steps for each in plan.stretches] == [7, 1, 2]
    assert Fraction(plan.tokens_of(2), plan.tokens) == Fraction(1, 5)


@pytest.mark.parametrize("ramp", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("phases", [[(0.0, 64)], [(0.0, 64), (0.3, 128)]])
def test_a_run_has_never_more_tokens_than_it_was_given(phases, ramp):
    """Sources that give so many epochs and no more would not do otherwise."""
    for tokens in range(20_000, 30_000, 127):
        plan = plan_steps(phases, batch_tokens=1024, tokens=tokens, ramp=ramp)
        assert tokens - 2 * 1024 < plan.tokens <= tokens
