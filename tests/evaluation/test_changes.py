"""What prompts can say of a change: by enumeration of all outcomes, against scipy, and on simulated truth."""

from math import comb, inf, isnan

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

from agl_trl.evaluation.changes import LEVEL, PairedMeans, PairedRates


def probability(there: int, back: int, total: int, p_there: float, p_back: float) -> float:
    """Of so many changes in either direction, by the trinomial formula."""
    same = total - there - back
    return (
        comb(total, there) * comb(total - there, back) * p_there**there * p_back**back * (1 - p_there - p_back) ** same
    )


def outcomes(total: int) -> list[tuple[int, int]]:
    return [(there, back) for there in range(total + 1) for back in range(total + 1 - there)]


def simulated(runs: int, total: int, p_there: float, p_back: float) -> list[PairedRates]:
    drawn = np.random.default_rng(0).multinomial(total, [p_there, p_back, 1 - p_there - p_back], size=runs)
    return [PairedRates(int(there), int(back), total) for there, back, _ in drawn]


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.2, -0.1])
def test_no_truth_at_the_limit_is_rejected_too_often(limit):
    """The error of either test, summed over all outcomes: at most 5 % whatever share changes without need."""
    total = 20
    rejected = {pair: PairedRates(*pair, total).p_above(limit) <= LEVEL for pair in outcomes(total)}
    for p_back in np.linspace(max(0.0, -limit), (1 - limit) / 2, 40):
        error = sum(probability(*pair, total, p_back + limit, p_back) for pair, bad in rejected.items() if bad)
        assert error <= LEVEL + 1e-3, "the worst case is looked for on a grid"


def test_p_value_is_the_largest_probability_of_a_score_as_large():
    total, limit = 12, 0.1

    def score(there, back):
        """Tango's, with the likeliest nuisance found by trying all."""
        p_back = np.linspace(1e-6, (1 - limit) / 2 - 1e-6, 20001)
        p_there = p_back + limit
        likelihood = (
            there * np.log(p_there) + back * np.log(p_back) + (total - there - back) * np.log1p(-p_there - p_back)
        )
        best = p_back[likelihood.argmax()]
        return (there - back - total * limit) / np.sqrt(total * (2 * best + limit * (1 - limit)))

    scores = {pair: score(*pair) for pair in outcomes(total)}
    for pair in ((3, 0), (5, 1), (2, 2), (0, 0)):
        as_large = [other for other, value in scores.items() if value >= scores[pair] - 1e-3]
        shares = np.linspace(0, (1 - limit) / 2, 200)
        expected = max(sum(probability(*other, total, q + limit, q) for other in as_large) for q in shares)
        assert PairedRates(*pair, total).p_above(limit) == pytest.approx(expected, rel=5e-3)


def test_nothing_lost_is_what_a_binomial_says():
    """With no change at all the largest chance of it is that of the limit: (1 − limit)ⁿ."""
    assert PairedRates(0, 0, 59).p_below(0.05) == pytest.approx(0.95**59) and 0.95**59 <= LEVEL < 0.95**58
    assert PairedRates(0, 0, 20).p_below(0.05) > LEVEL


@pytest.mark.parametrize(("there", "back"), [(12, 2), (9, 3), (30, 10), (8, 0)])
def test_at_zero_it_is_about_mcnemars_exact_test_and_never_weaker(there, back):
    conditional = binomtest(there, there + back, alternative="greater").pvalue
    assert 0.3 * conditional < PairedRates(there, back, 200).p_above(0.0) <= conditional


def test_the_other_direction_is_the_mirror():
    rates = PairedRates(14, 3, 100, 2, 5)
    assert rates.p_below(0.2) == rates.mirrored.p_above(-0.2)
    low, high = rates.interval()
    assert rates.mirrored.interval() == (-high, -low) and low < rates.value < high


@pytest.mark.parametrize("counts", [(20, 2, 200), (0, 0, 30), (5, 5, 40), (12, 0, 12)])
def test_ends_of_the_interval_are_the_limits_that_are_just_not_rejected(counts):
    rates = PairedRates(*counts)
    low, high = rates.interval()
    assert rates.p_above(low - 0.002) <= LEVEL and rates.p_above(low + 0.002) > LEVEL
    if high < 1:
        assert rates.p_below(high + 0.002) <= LEVEL and rates.p_below(high - 0.002) > LEVEL


def test_limits_out_of_reach():
    assert PairedRates(5, 0, 5).p_above(1.0) == 1.0 and PairedRates(0, 5, 5).p_above(-1.5) == 0.0
    assert PairedRates(0, 0, 5).shown_above(1.0, LEVEL) is None


def test_unasked_prompts_count_as_the_worst_case():
    rates = PairedRates(10, 1, 100, may_there=20, may_back=4)
    assert rates.p_above(0.05) == PairedRates(10, 5, 100).p_above(0.05)
    assert rates.p_below(0.05) == PairedRates(30, 1, 100).p_below(0.05)
    assert (rates.unasked, rates.asked, rates.value) == (24, 76, 9 / 76)
    assert isnan(PairedRates(0, 0, 10, 9, 1).value)


@pytest.mark.parametrize(("limit", "p_back"), [(0.0, 0.02), (0.05, 0.0), (0.05, 0.1)])
def test_at_the_limit_itself_at_most_one_run_in_twenty_errs(limit, p_back):
    """By simulation, where errors are most frequent: 4,000 runs, so that chance moves the share by a third of a point."""
    runs = simulated(4000, 200, p_back + limit, p_back)
    assert sum(run.p_above(limit) <= LEVEL for run in runs) <= 200
    assert sum(run.p_below(limit) <= LEVEL for run in runs) <= 200, "nor does one pass that is just at the limit"


@pytest.mark.parametrize("p_back", [0.0, 0.02, 0.1])
def test_without_change_500_runs_hardly_fail(p_back):
    runs = simulated(500, 200, p_back, p_back)
    assert sum(run.p_above(0.05) <= LEVEL for run in runs) <= 25
    small = simulated(500, 20, p_back, p_back)
    failed = [run for run in small if run.p_above(0.05) <= LEVEL]
    passed = [run for run in small if run.p_below(0.05) <= LEVEL]
    assert len(failed) <= 25 and len(failed) + len(passed) <= 50, "so few prompts seldom show anything"
    assert all(run.there < run.back for run in passed), "but that it refuses more than before"


@pytest.mark.parametrize(("limit", "p_back"), [(0.0, 0.0), (0.0, 0.02), (0.05, 0.0)])
def test_a_drop_of_ten_points_on_200_prompts_is_found(limit, p_back):
    runs = simulated(500, 200, 0.1 + p_back, p_back)
    assert sum(run.p_above(limit) <= LEVEL for run in runs) >= 400


@pytest.mark.parametrize("limit", [0.0, 0.05])
def test_smallest_change_shown_is_found_in_four_of_five_samples_and_a_smaller_one_is_not(limit):
    total = 60
    shown = PairedRates(0, 0, total).shown_above(limit, LEVEL)
    rejected = [there for there in range(total + 1) if PairedRates(there, 0, total).p_above(limit) <= LEVEL]

    def power(change: float) -> float:
        return sum(probability(there, 0, total, change, 0.0) for there in rejected)

    assert power(shown) >= 0.8 > power(shown - 0.002)
    assert PairedRates(0, 0, total).shown_below(-limit, LEVEL) == -shown


def test_fewer_prompts_show_less():
    shown = [PairedRates(0, 0, total).shown_above(0.05, LEVEL) for total in (20, 50, 200, 800)]
    assert shown == sorted(shown, reverse=True) and shown[0] > 0.25 and shown[-1] < 0.08
    assert PairedRates(0, 0, 2).shown_above(0.3, LEVEL) is None


def test_means_of_a_bell_curve_are_students():
    values = np.random.default_rng(1).normal(0.3, 1.0, 200)
    means = PairedMeans(values)
    expected = ttest_1samp(values, 0.2, alternative="greater")
    assert means.p_above(0.2) == pytest.approx(expected.pvalue, abs=0.02)
    low, high = ttest_1samp(values, 0.0).confidence_interval(0.9)
    assert means.interval() == pytest.approx((low, high), abs=0.02)
    assert means.p_above(0.2) == PairedMeans(values.copy()).p_above(0.2), "the resamples are those of a fixed seed"
    assert means.p_above(0.2) + means.p_below(0.2) == pytest.approx(1.0, abs=0.01)


def test_long_tail_is_followed():
    """The mean of a long tail is rarely below what a sample shows: Student's t passes too often."""
    rng, limit = np.random.default_rng(0), np.exp(1.125)
    samples = [rng.lognormal(0.0, 1.5, 100) for _ in range(300)]
    passed = np.mean([PairedMeans(sample).p_below(limit) <= LEVEL for sample in samples])
    failed = np.mean([PairedMeans(sample).p_above(limit) <= LEVEL for sample in samples])
    students = np.mean([ttest_1samp(sample, limit, alternative="less").pvalue <= LEVEL for sample in samples])
    assert failed <= 0.05 and passed < 0.12 < students, (failed, passed, students)


def test_one_prompt_shows_nothing_and_equal_ones_are_exact():
    one = PairedMeans(np.array([0.3]))
    assert one.p_above(0.0) == one.p_below(1e9) == 1.0 and one.interval() == (-inf, inf)
    assert one.shown_above(0.0, LEVEL) is None
    same = PairedMeans(np.zeros(7))
    assert (
        same.p_above(-0.1) == same.p_below(0.1) == 0.0 and same.p_above(0.0) == 1.0 and same.interval() == (0.0, 0.0)
    )
    assert PairedMeans(np.arange(9.0), unasked=1).p_above(-5.0) == 1.0, "what was not asked may be anything"
    assert isnan(PairedMeans(np.empty(0)).value)


def test_smallest_mean_shown():
    values = np.random.default_rng(2).normal(0.0, 1.0, 100)
    shown = PairedMeans(values).shown_above(0.1, LEVEL)
    rng = np.random.default_rng(3)
    samples = [rng.normal(shown, values.std(ddof=1), 100) for _ in range(400)]
    found = np.mean([ttest_1samp(sample, 0.1, alternative="greater").pvalue <= LEVEL for sample in samples])
    assert 0.75 < found < 0.86
