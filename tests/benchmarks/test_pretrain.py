"""The race of models: who needs how much of what for a loss, and what the tables say of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def race(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import pretrain

    return pretrain


def test_tokens_are_read_off_by_their_logarithm(race):
    curve = {100: 3.0, 400: 2.0, 1600: 1.5}
    assert race.tokens_to_reach(2.5, curve) == pytest.approx(200)
    assert race.tokens_to_reach(1.75, curve) == pytest.approx(800)
    assert race.tokens_to_reach(2.0, curve) == pytest.approx(400)


def test_what_no_budget_reaches_or_all_do_has_no_tokens(race):
    curve = {100: 3.0, 400: 2.0}
    assert race.tokens_to_reach(1.9, curve) is None
    assert race.tokens_to_reach(3.1, curve) is None


@pytest.mark.parametrize("best", [6e-5, 5e-4, 1e-3, 8e-3])
def test_llamas_rate_is_followed_until_half_and_double_are_worse(race, best):
    class Known:
        """Runs whose loss is the further off the best, the further off their rate is."""

        def __init__(self):
            self.rates = []

        def llama(self, tokens, seed, *, learning_rate, batch_tokens):
            stock = (("batch_tokens", batch_tokens), ("learning_rate", learning_rate))
            return race.Entry(contestant=race.LLAMA, tokens=tokens, stock=stock)

        def known(self, entry):
            rate = dict(entry.stock)["learning_rate"]
            self.rates.append(rate)
            return {"validation_bits_per_byte": 2.0 + abs(math.log(rate / best))}

        train = known

    known = Known()
    found = dict(race.Budget(known, race.SMALL, is_cached=False)._tuned(512).stock)["learning_rate"]
    assert abs(math.log2(found / best)) < 0.5
    assert {found / 2, found, 2 * found} <= set(known.rates)


def test_a_peer_and_ours_stand_in_one_table_with_both_ratios(race):
    def standing(*losses: float, batch_tokens: int = 512):
        each = {"parameters": 5_000_000, "flops_per_token": 32e6, "batch_tokens": batch_tokens}
        return race.Standing(tuple({**each, "bits_per_byte": loss} for loss in losses))

    budget = race.Budget(None, race.SMALL, is_cached=True)
    budget.curve = {65_536: standing(2.4, 2.5, 2.3), 262_144: standing(2.0, 2.1, 1.9, batch_tokens=1024)}
    budget.standings = {race.LLAMA: standing(2.2, 2.3, 2.1), race.NANOCHAT: standing(1.8), race.EQUAL: standing(2.9)}
    # Milliseconds a step: of 65,536 tokens ours takes 12.8 s, of 262,144 51.2 s, Llama 204.8 s of its 524,288.
    table = budget.table({"ours, 512": 100.0, "ours, 1024": 200.0, "llama, 512": 200.0})
    llama, nanochat, equal = (
        next(line for line in table.splitlines() if f"| {name} |" in line) for name in budget.standings
    )
    assert "| 131,072 | 4.00 (goal 4.0" in llama
    seconds = 12.8 + (131_072 - 65_536) / (262_144 - 65_536) * (51.2 - 12.8)
    assert f"{204.8 / seconds:.2f} (goal 3.5, met)" in llama
    assert "more than 262,144" in nanochat and "fewer than 65,536" in equal
    assert "2.4000" in table and "2.3000 to 2.5000" in table
