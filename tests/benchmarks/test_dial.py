"""The benchmark of the dial: what it changes, how it judges, and when a measurement still counts."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DEPTHS = (2, 3, 4, 6)


@pytest.fixture
def dial(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import dial

    return dial


@pytest.mark.parametrize("depth", DEPTHS)
def test_each_derived_value_is_halved_and_doubled_and_nothing_else_is_changed(dial, depth):
    rows = dial.trials(depth, 65536)
    derived = dataclasses.asdict(rows[0].setting)
    assert rows[0].setting == dial.derive(depth, 65536)
    for name in ("matrix", "embedding", "head", "rest", "batch_tokens"):
        others = [row for row in rows if row.value == name.replace("_", " ")]
        changed = [dataclasses.asdict(row.setting) for row in others]
        assert [each[name] / derived[name] for each in changed] == [0.5, 2.0]
        assert all({**each, name: derived[name]} == derived for each in changed)
    assert {row.value for row in rows} == {"", *dial.VALUES}
    assert len({row.setting.words for row in rows}) == len(rows)


@pytest.mark.parametrize("depth", DEPTHS)
def test_other_widths_cost_as_much_as_the_derived_one(dial, depth):
    rows = dial.trials(depth, 65536)

    def cost(row) -> tuple[int, int]:
        flops = dial.flops_per_token(row.setting.layers, row.setting.width)
        return flops, flops * row.setting.tokens

    a_token, in_all = cost(rows[0])
    ratio = rows[0].setting.width / rows[0].setting.layers
    narrower, wider = [row for row in rows if row.value == "width a layer"]
    assert narrower.setting.width / narrower.setting.layers < ratio < wider.setting.width / wider.setting.layers
    for row in (narrower, wider):
        assert cost(row)[0] == pytest.approx(a_token, rel=0.05)
    for row in rows:
        if not row.is_judged:
            assert cost(row)[1] == pytest.approx(in_all, rel=0.02)


def losses_of(rows, values: dict[str, list[float]]) -> dict:
    return {row: dict(enumerate(values[row.label])) for row in rows if row.label in values}


def test_rows_are_compared_on_the_seeds_that_they_share_with_the_derived_values(dial):
    rows = dial.trials(2, 65536)
    losses = losses_of(rows, {"all derived": [2.0, 3.0], "matrix rate ×2": [1.9]})
    found = dial.ratios(rows, losses)
    assert found == pytest.approx({rows[0]: 2.0 / 1.9, rows[2]: 1.0})
    losses[rows[3]] = {7: 0.5}  # a seed that the derived values do not have
    assert dial.ratios(rows, losses) == found


@pytest.mark.parametrize(("best", "said"), [(1.96, "within 2.5 %"), (1.94, "NOT within 2.5 %")])
def test_the_verdict_is_about_the_best_row(dial, best, said):
    rows = dial.trials(3, 65536)
    text = dial.table(rows, losses_of(rows, {"all derived": [2.0], "head rate ×½": [best], "rest rate ×2": [2.5]}))
    verdict = text.splitlines()[-1]
    assert f"{100 * (2 / best - 1):.1f} % above the best row (head rate ×½), {said}" in verdict
    assert f"{len(rows) - 3} rows are missing" in verdict
    assert f"| {2.5 / best:.3f} | 0 |" in text


def test_a_row_of_another_number_of_tokens_is_shown_and_not_judged(dial):
    rows = dial.trials(3, 65536)
    text = dial.table(rows, losses_of(rows, {"all derived": [2.0], "width ×½": [1.0]}))
    assert "0.500, not judged" in text
    assert "0.0 % above the best row (all derived), within" in text


def test_a_depth_without_its_derived_values_is_not_judged(dial):
    rows = dial.trials(3, 65536)
    assert dial.table(rows, losses_of(rows, {"heads ×2": [1.0]})) == (
        "Depth 3: the derived values are not measured yet."
    )


def test_the_overview_shows_how_far_each_change_is_from_the_derived_values(dial):
    tables = [dial.trials(depth, 65536) for depth in (2, 3)]
    losses = losses_of(tables[0], {"all derived": [2.0], "heads ×2": [2.1]})
    losses |= losses_of(tables[1], {"all derived": [4.0, 5.0], "heads ×2": [3.0], "matrix rate ×½": [4.0]})
    assert dial.overview(tables, losses).splitlines() == [
        "| | depth 2 | depth 3 |",
        "|---|---:|---:|",
        "| all derived | 2.0000 | 4.5000 |",
        "| matrix rate ×½ |  | +0.0 % |",
        "| heads ×2 | +5.0 % | -25.0 % |",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--depths", "2", "0"], "--depths: 0 is no depth"),
        (["--tokens", "1000"], "--tokens is 1000; at least 65536"),
        (["--values", "colour"], "invalid choice: 'colour'"),
        (["pycode-tiny"], "'pycode-tiny' is no override; write KEY=VALUE"),
        (["--seeds", *map(str, range(40))], "--seeds: 21 at most"),
    ],
)
def test_a_wrong_word_on_the_command_line_is_named(dial, monkeypatch, capsys, words, said):
    monkeypatch.setattr("sys.argv", ["dial.py", *words])
    with pytest.raises(SystemExit, match="2"):
        dial.main()
    assert said in capsys.readouterr().err


def test_cached_measures_nothing_and_says_that_there_is_nothing(dial, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["dial.py", "--cached", "--folder", str(tmp_path), "--depths", "2"])
    assert dial.main() == 1
    assert "nothing of this is measured yet" in capsys.readouterr().err
    assert not (tmp_path / "corpora").exists()


def test_a_measurement_outlives_a_changed_rule_and_not_a_changed_optimizer(dial, tmp_path):
    for name in ("hfscratch", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "code" / "hfscratch" / "training" / "optimizer.py"
    text = source.read_text()

    def stated(changed: str) -> str:
        source.write_text(changed)
        return dial.Bench(tmp_path / "runs", tmp_path / "code", threads=1, unstated=dial.UNSTATED).stated

    before = stated(text)
    assert "math.sqrt(256 / hidden_size)" in text
    assert stated(text.replace("math.sqrt(256 / hidden_size)", "256 / hidden_size")) == before
    assert stated(text.replace("TABLE_RATE = 0.5", "TABLE_RATE = 0.6")) != before
