import math

import numpy as np
import pytest

from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.metrics import MAX_SAMPLES, Observation, Result, contains, spread
from steerlab.evaluation.statistics.paired import paired_difference
from steerlab.evaluation.statistics.summaries import Metric, left_out, summarise, summarise_all


def observations(values, weights=None, metric="m", strength=1.0):
    weights = [1.0] * len(values) if weights is None else weights
    return [Observation(metric, str(i), v, w, strength) for i, (v, w) in enumerate(zip(values, weights, strict=True))]


def test_equal_weights_give_the_usual_mean_and_standard_error():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    found = summarise(observations(values))
    assert found.value == pytest.approx(0.6)
    assert found.stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert (found.n, found.unparsable) == (5, 0)


def test_weighted_mean_and_its_error_by_hand():
    # m = (1*2 + 3*6) / 4 = 5; sum w^2 (v - m)^2 = 1*9 + 9*1 = 18; stderr = sqrt(2/1 * 18) / 4 = 1.5
    found = summarise(observations([2.0, 6.0], [1.0, 3.0]))
    assert found[:4] == (pytest.approx(5.0), pytest.approx(1.5), 2, 0)


def test_scaling_all_weights_changes_nothing():
    values, weights = [0.3, 0.9, 0.1, 0.5], [1.0, 2.0, 5.0, 1.0]
    assert summarise(observations(values, weights)) == pytest.approx(summarise(observations(values, [7 * w for w in weights])))


def test_exp_uses_the_delta_method():
    plain, transformed = (summarise(observations([1.0, 2.0, 4.0], [3.0, 1.0, 1.0]), t) for t in ("identity", "exp"))
    assert transformed.value == pytest.approx(math.exp(plain.value))
    assert transformed.stderr == pytest.approx(math.exp(plain.value) * plain.stderr)


def test_interval_of_a_mean_is_students():
    found = summarise(observations([1.0, 2.0, 3.0, 6.0]))  # m = 3, s = sqrt(14/3 / 4), t(0.975, 3) = 3.182446
    half = 3.182446 * math.sqrt(14 / 12)
    assert (found.low, found.high) == (pytest.approx(3 - half, abs=1e-5), pytest.approx(3 + half, abs=1e-5))


def test_interval_of_a_perplexity_is_that_of_the_exponentials():
    plain, transformed = (summarise(observations([1.0, 2.0, 4.0], [3.0, 1.0, 1.0]), t) for t in ("identity", "exp"))
    assert (transformed.low, transformed.high) == pytest.approx((math.exp(plain.low), math.exp(plain.high)))
    assert transformed.low < transformed.value < transformed.high


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 127, 0.0, 0.029360), (12, 12, 0.757506, 1.0), (1, 1, 0.206549, 1.0), (7, 10, 0.396778, 0.892209)],
)
def test_interval_of_a_share_is_wilsons_also_where_the_error_is_0(successes, n, low, high):
    found = summarise(observations([1.0] * successes + [0.0] * (n - successes) + [None], [2.0] * n + [1.0]))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)
    assert found.stderr == (pytest.approx(math.sqrt(0.21 / 9)) if n == 10 else 0.0 if n > 1 else None)


def test_zeros_that_are_no_share_are_certain():
    found = summarise(observations([0.0] * 9, [1.0] * 9), "mean")
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert summarise(observations([0.0] * 9, [1.0] * 9)).high > 0.2


def test_what_a_measure_declares_decides_whether_zeros_and_ones_are_a_share():
    """Of ten answers nine have no word and one has a single word: these are counts, whose interval is Student's."""
    values = [0.0] * 9 + [1.0]
    declared = {
        "words": Measure("words", None, "words"),
        "count": Measure("count", None, low=0.0),
        "cosine": Measure("cosine", None, low=-1.0, high=1.0),
        "share": Measure("share", None, "share", 0.0, 1.0),
        "bare": Measure("bare", "lower"),
    }
    rows = [o for name in (*declared, "undeclared") for o in observations(values, metric=f"t/{name}")]
    found = summarise_all(Result(rows, [], tuple(declared.values())))[1.0]
    wilson, student = (0.017876, 0.404150), 0.1 + 2.262157 * 0.1  # t(0.975, 9) times the standard error
    for name in ("share", "bare", "undeclared"):
        assert (found[f"t/{name}"].low, found[f"t/{name}"].high) == pytest.approx(wilson, abs=1e-6), name
    assert (found["t/words"].low, found["t/words"].high) == pytest.approx((0.2 - student, student), abs=1e-6)
    assert (found["t/count"].low, found["t/count"].high) == pytest.approx((0.0, student), abs=1e-6)
    assert found["t/cosine"].high == pytest.approx(student, abs=1e-6)


def test_a_mean_of_zeros_and_ones_with_unequal_weights_is_no_share():
    found = summarise(observations([1.0, 0.0], [1.0, 3.0]))
    assert found.low < 0 < found.high


def test_halves_of_a_share_leave_it_wilsons_interval():
    """Ties are halves: the interval is that of as many whole wins, though their spread is smaller."""
    halves, wholes = summarise(observations([0.5] * 10), "share"), summarise(observations([1.0, 0.0] * 5))
    assert (halves.value, halves.low, halves.high) == (0.5, wholes.low, wholes.high)
    assert halves.stderr == 0
    assert summarise(observations([1.0]), "share")[:1] == (1.0,)


def test_interval_of_a_bootstrapped_mean():
    values, weights = np.random.default_rng(0).normal(2, 1, 400).tolist(), np.random.default_rng(1).uniform(1, 3, 400).tolist()
    drawn, plain = (summarise(observations(values, weights), transform) for transform in ("bootstrap", "identity"))
    assert drawn[:4] == plain[:4]
    assert (drawn.low, drawn.high) == (pytest.approx(plain.low, abs=0.01), pytest.approx(plain.high, abs=0.01))
    assert drawn == summarise(observations(values, weights), "bootstrap")
    assert summarise(observations([3.0]), "bootstrap") == Metric(3.0, None, 1, 0)


def test_a_bootstrapped_mean_stays_among_its_items():
    found = summarise(observations([-1.0] + [1.0] * 9), "bootstrap")
    assert -1 <= found.low < found.value < found.high <= 1


@pytest.mark.parametrize(
    ("n", "ends"),
    [(10, (1, 8)), (6, (0, 5)), (20, (5, 14)), (5, None), (1, None)],  # tables of the sign test at 5 %
)
def test_interval_of_a_median_is_that_of_the_sign_test(n, ends):
    values = sorted(np.random.default_rng(n).lognormal(size=n).tolist())
    found = summarise(observations([*values[::-1], None]), "median")
    assert (found.value, found.n, found.unparsable) == (np.median(values), n, 1)
    assert (found.low, found.high) == ((None, None) if ends is None else (values[ends[0]], values[ends[1]]))
    assert found.stderr == (None if ends is None else pytest.approx((found.high - found.low) / 3.919928))


def test_interval_of_a_median_covers_it():
    """Of ten values it holds the median in 97.9 % of cases; with 2000 repetitions 97 % leaves two standard errors."""
    draws = np.random.default_rng(0).lognormal(size=(2000, 10))
    found = [summarise(observations(row.tolist()), "median") for row in draws]
    assert 0.97 <= np.mean([metric.low <= 1 <= metric.high for metric in found]) <= 0.99


def test_paired_difference_of_medians():
    a, b = observations([1.0, 2.0, 100.0]), observations([1.0, 1.0, 1.0])
    found = paired_difference(a, b, transform="median", num_resamples=200)
    assert (found.value, found.low, found.high) == (1.0, 0.0, 99.0)


def test_items_without_weight_are_not_scored_and_unparsable_ones_are_counted():
    found = summarise(observations([1.0, 0.0, None, 0.0, None], [1.0, 1.0, 1.0, 0.0, 0.0]))
    assert (found.value, found.n, found.unparsable) == (0.5, 2, 2)


def test_nothing_scored_has_no_value_and_one_item_no_error():
    assert summarise([]) == Metric(None, None, 0, 0)
    assert summarise(observations([None])) == Metric(None, None, 0, 1)
    assert summarise(observations([1.0], [0.0])) == Metric(None, None, 0, 0)
    assert summarise(observations([0.25])) == Metric(0.25, None, 1, 0)


def test_negative_weight_and_unknown_transform_are_refused():
    with pytest.raises(ValueError, match="weight -1"):
        summarise(observations([1.0], [-1.0]))
    with pytest.raises(ValueError, match="unknown transform 'log'"):
        summarise(observations([1.0]), "log")


def test_standard_error_of_a_ratio_matches_repeated_sampling():
    """The reported error of a weighted mean is the spread of that mean over repeated data sets."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        weights = rng.integers(1, 20, 80).astype(float)
        found = summarise(observations((rng.normal(size=80) + weights / 20).tolist(), weights.tolist()))
        means.append(found.value)
        errors.append(found.stderr)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_an_interval_ends_where_values_do():
    """Student's interval of two cosines knows of no range; that of a perplexity begins at 1."""
    free, within = (summarise(observations([0.9, 0.99]), "identity", bounds) for bounds in ((None, None), (-1.0, 1.0)))
    assert free.high > 1 and within[:3] == free[:3] and (within.low, within.high) == (free.low, 1.0)
    found = summarise(observations([0.05, 0.5]), "exp", (1.0, None))
    assert found.low == 1.0 and found.high > found.value
    rows = observations([0.9, 0.99], metric="t/near") + observations([0.9, 0.99], metric="t/far")
    by_name = summarise_all(Result(rows, [], (Measure("near", "higher", high=1.0),)))[1.0]
    assert by_name["t/near"].high == 1.0 < by_name["t/far"].high


def test_summarise_all_groups_by_strength_and_applies_transforms():
    rows = observations([1.0, 3.0], metric="p") + observations([0.0, 0.0], metric="p", strength=2.0)
    rows += observations([1.0], metric="q")
    found = summarise_all(Result(rows, [], (Measure("p", "lower", transform="exp"),)))
    assert found[1.0]["p"].value == pytest.approx(math.exp(2))
    assert found[2.0]["p"].value == pytest.approx(1.0)
    assert found[1.0]["q"].value == 1.0
    assert list(found) == [1.0, 2.0]


def test_paired_difference_cancels_what_makes_items_hard():
    rng = np.random.default_rng(1)
    hardness = rng.normal(0, 10, 100)
    a = observations((hardness + 1 + rng.normal(0, 0.1, 100)).tolist())
    b = observations(hardness.tolist())
    found = paired_difference(a, b, num_resamples=2000)
    assert found.value == pytest.approx(1.0, abs=0.05)
    assert 0.9 < found.low < found.value < found.high < 1.1
    assert found.n == 100


def test_paired_difference_interval_covers_the_truth():
    """About 95 of 100 intervals hold the true difference; with 300 repetitions 92 % to 98 % leaves four standard errors."""
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        hardness = rng.normal(size=60)
        a = observations((hardness + 0.3 + rng.normal(size=60)).tolist())
        b = observations((hardness + rng.normal(size=60)).tolist())
        found = paired_difference(a, b, num_resamples=500)
        covered += found.low <= 0.3 <= found.high
    assert 0.90 <= covered / 300 <= 0.985


def test_paired_difference_of_the_same_run_is_zero():
    a = observations([1.0, 0.0, 1.0, 1.0])
    assert paired_difference(a, a, num_resamples=100) == (0.0, 0.0, 0.0, 4)


def test_paired_difference_uses_shared_judged_items_and_each_sides_weights():
    a = [Observation("m", "x", 1.0, 1.0), Observation("m", "y", 0.0, 3.0), Observation("m", "only a", 9.0)]
    b = [Observation("m", "x", 0.0, 1.0), Observation("m", "y", 1.0, 1.0), Observation("m", "z", None)]
    found = paired_difference(a, b, num_resamples=50)
    assert found.value == pytest.approx(0.25 - 0.5)
    assert found.n == 2


def test_paired_difference_of_perplexities_is_that_of_the_exponentials():
    found = paired_difference(observations([2.0, 2.0]), observations([1.0, 1.0]), transform="exp", num_resamples=10)
    assert found.value == pytest.approx(math.exp(2) - math.exp(1))


def test_paired_difference_is_deterministic():
    values = np.random.default_rng(0).normal(size=(2, 60))
    a, b = observations(values[0].tolist()), observations(values[1].tolist())
    assert paired_difference(a, b, seed=3) == paired_difference(a, b, seed=3) != paired_difference(a, b, seed=4)
    assert paired_difference(a, b) == paired_difference(a, b, seed=0, num_resamples=10_000)


def test_paired_difference_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match="share no judged item"):
        paired_difference([Observation("m", "a", 1.0)], [Observation("m", "b", 1.0)])
    with pytest.raises(ValueError, match="occurs twice"):
        paired_difference(observations([1.0]) * 2, observations([1.0]))
    with pytest.raises(ValueError, match="scored none of the"):
        paired_difference(observations([1.0], [0.0]), observations([1.0]))


def test_contains_ignores_case_and_needs_the_whole_witness():
    assert contains("It is BUDAPEST, of course", "budapest")
    assert not contains("Buda and Pest", "budapest")


def test_samples_are_thinned_evenly():
    samples = [{"id": i} for i in range(100)]
    kept = [s["id"] for s in spread(samples)]
    assert len(kept) == MAX_SAMPLES
    assert kept[0] == 0 and kept[-1] == 95
    assert spread(samples[:3]) == samples[:3]


def test_resamples_of_a_paired_difference_keep_the_weights():
    """Reference: a loop over the same draws, where a side's mean is that of a ratio of sums."""
    a = [Observation("m", str(i), value, weight) for i, (value, weight) in enumerate([(1.0, 9.0), (0.0, 1.0), (0.0, 1.0)])]
    b = [Observation("m", str(i), 0.0, 1.0) for i in range(3)]
    found = paired_difference(a, b, num_resamples=4000)
    draws = np.random.default_rng(1).integers(0, 3, (4000, 3))
    weights, values = np.array([9.0, 1.0, 1.0]), np.array([1.0, 0.0, 0.0])
    means = [(weights[draw] * values[draw]).sum() / weights[draw].sum() for draw in draws]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-9)
    assert found.value == pytest.approx(9 / 11)


def test_medians_of_weighted_items_are_those_of_the_items():
    a, b = observations([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]), observations([0.0, 0.0, 0.0], [4.0, 4.0, 4.0])
    assert paired_difference(a, b, transform="median", num_resamples=100).value == 2.0


def test_items_without_weight_are_part_of_no_paired_median():
    a, b = observations([1.0, 5.0, 9.0, 100.0], [1.0, 1.0, 1.0, 0.0]), observations([0.0, 1.0, 2.0, 3.0])
    with np.errstate(all="raise"):
        found = paired_difference(a, b, transform="median", num_resamples=400)
    assert found.value == summarise(a, "median").value - summarise(b, "median").value == 5.0 - 1.5
    assert np.isfinite(found[:3]).all() and -2 <= found.low <= found.value <= found.high <= 9


def test_resamples_in_which_a_side_has_no_weight_are_left_out():
    """Of two items one has weight on the first side: a quarter of the resamples lacks it, and has no mean."""
    a, b = observations([1.0, 0.0], [1.0, 0.0]), observations([0.0, 0.0])
    with np.errstate(all="raise"):
        assert paired_difference(a, b, num_resamples=400) == (1.0, 1.0, 1.0, 2)


def test_an_exponential_that_overflows_is_the_largest_number_there_is():
    found = summarise(observations([2000.0, 2000.0]), "exp")
    assert found.value == math.exp(709) < math.inf
    assert paired_difference(observations([2000.0] * 2), observations([1.0] * 2), transform="exp").value < math.inf


def test_what_is_left_out_is_counted_by_its_reason():
    items = [
        Observation("m", "0", 1.0),
        Observation("m", "1", None),
        Observation("m", "2", None, reason="too_long"),
        Observation("m", "3", None, reason="too_long"),
        Observation("m", "4", 0.0, reason="cut"),
    ]
    found = summarise(items)
    assert (found.n, found.unparsable, found.too_long, found.rows_cut) == (2, 1, 2, 1)
    assert left_out(found._asdict()) == "1 unparsable, 2 too long, 1 cut"


def test_a_metric_is_found_among_the_measures_by_what_follows_its_label():
    result = Result([], [], [Measure("a/b", "lower"), Measure("layer_*", "higher")])
    assert result.measure("label/a/b").better == "lower"
    assert result.measure("label/layer_3").better == "higher"
    assert result.measure("label/unknown") == Measure("unknown", None)
    assert result.measure("alone") == Measure("alone", None)
