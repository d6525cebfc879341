"""Steps as the Trainer reads them: the same rows for any number of processes, and phases that keep to themselves."""

from __future__ import annotations

import pytest

from hfscratch import tokens
from hfscratch.planning.curriculum import plan_steps
from tests.tokens.test_mixture import DOCUMENTS, write


def make(folder, items_per_step, *, documents=DOCUMENTS):
    """Three phases, of which the first has a batch that grows and the last has longer rows."""
    plan = plan_steps([(0.0, 8), (0.2, 8), (0.2, 32)], tokens=8 * 800, batch_tokens=8 * 16, ramp=0.3)
    split = write(folder, documents)
    sources = tokens.Sources(split, packing="concat", seed=1)
    counts = [{"web": plan.rows_of(0)}, {"code": plan.rows_of(1)}, {tokens.ALL: plan.rows_of(2)}]
    phases = [
        tokens.PackedRows(
            split,
            sources.deal(each, length),
            num_rows=plan.rows_of(phase),
            bos_token_id=-1,
            pad_token_id=0,
            isolate_documents=True,
        )
        for phase, (each, length) in enumerate(zip(counts, (8, 8, 32), strict=True))
    ]
    batches = tokens.Batches(
        phases, rows_of_step=plan.rows_of_step, num_steps=plan.max_steps, items_per_step=items_per_step
    )
    return plan, batches


def rows_of(batches, step):
    items = range(step * batches.items_per_step, (step + 1) * batches.items_per_step)
    return [row["input_ids"].tolist() for item in items for row in batches[item]]


def test_the_rows_of_a_step_do_not_depend_on_how_many_items_hold_them(tmp_path):
    plan, whole = make(tmp_path, 1)
    _, cut = make(tmp_path, 2)
    assert len(whole) == plan.max_steps and len(cut) == 2 * plan.max_steps
    for step in range(plan.max_steps):
        assert rows_of(cut, step) == rows_of(whole, step)
    _, uneven = make(tmp_path, 3)
    last = plan.max_steps - 1  # of four rows
    assert [len(uneven[3 * last + item]) for item in range(3)] == [1, 1, 2]
    assert rows_of(uneven, last) == rows_of(whole, last)
    with pytest.raises(IndexError):
        whole[len(whole)]


def test_phases_begin_at_their_steps_with_their_sources_and_lengths(tmp_path):
    plan, batches = make(tmp_path, 2)
    for step in range(plan.max_steps):
        phase, _, documents = batches.contents(step)
        assert phase == plan.locate(step)[0].phase == sum(step >= plan.first_step_of(each) for each in (1, 2))
        assert phase == 2 or {each.split("/")[0] for each in documents} == {("web", "code")[phase]}
        rows = rows_of(batches, step)
        assert {len(row) for row in rows} == {(8, 8, 32)[phase]}
        assert len(rows) == plan.locate(step)[0].rows_per_step


def test_rows_that_are_left_out_move_up_those_behind_them_within_their_phase(tmp_path):
    plan, batches = make(tmp_path, 2)
    before = [rows_of(batches, step) for step in range(plan.max_steps)]
    step = plan.first_step_of(1) - 1  # the last of its phase
    phase, rows, _ = batches.contents(step)
    batches.skip(phase, rows)
    after = [rows_of(batches, step) for step in range(plan.max_steps)]
    assert after[:step] == before[:step] and after[step + 1 :] == before[step + 1 :]
    assert not {tuple(row) for row in after[step]} & {tuple(row) for row in before[step]}
    assert {document.split("/")[0] for document in batches.contents(step)[2]} == {"web"}
    assert batches.contents(step)[1][0] == rows[1]


def test_a_batch_is_stacked_from_rows_and_from_lists_of_rows_alike(tmp_path):
    _, batches = make(tmp_path, 2)
    one, other = batches[0], batches[1]
    assert (tokens.collate([one, other])["input_ids"] == tokens.collate([*one, *other])["input_ids"]).all()
