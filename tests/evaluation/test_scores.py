import pytest
from hypothesis import given
from hypothesis import strategies as st

from milora.evaluation.scores import score, score_as_llm_adapters, wilson_interval


# From the tables of Brown, Cai and DasGupta (2001) and Newcombe (1998, method 3: 81/263, 15/148, 0/20, 1/29).
@pytest.mark.parametrize(
    ("correct", "rows", "lower", "upper"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval(correct: int, rows: int, lower: float, upper: float) -> None:
    assert wilson_interval(correct, rows) == (pytest.approx(lower, abs=1e-4), pytest.approx(upper, abs=1e-4))


@given(st.integers(1, 500).flatmap(lambda rows: st.tuples(st.integers(0, rows), st.just(rows))))
def test_the_interval_holds_the_share_and_mirrors(counts: tuple[int, int]) -> None:
    correct, rows = counts
    lower, upper = wilson_interval(correct, rows)
    assert 0 <= lower <= correct / rows <= upper <= 1
    assert wilson_interval(rows - correct, rows) == (pytest.approx(1 - upper), pytest.approx(1 - lower))
    assert lower < upper


def test_rows_are_counted() -> None:
    rows = [
        {"parsed": "a", "correct": True, "group": "x"},
        {"parsed": "b", "correct": False, "group": "x"},
        {"parsed": None, "correct": False, "group": "y"},
        {"parsed": None, "correct": False, "no_room": True, "group": "y"},
        {"parsed": "a", "correct": True, "group": "y"},
        {"output": "no gold answer"},
    ]
    scores = score(rows)
    whole = scores.whole
    assert (whole.rows, whole.correct, whole.unparsed, whole.no_room) == (5, 2, 1, 1)
    assert {name: group.accuracy for name, group in scores.groups.items()} == {"x": 1 / 2, "y": 1 / 3}
    assert scores.macro_accuracy == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert score([]).whole.to_dict() == {
        "rows": 0,
        "correct": 0,
        "accuracy": None,
        "interval": None,
        "unparsed": 0,
        "no_room": 0,
    }


def test_the_same_rows_by_the_rule_of_llm_adapters() -> None:
    rows = [
        {"output": "It cannot be true.", "answer": "true", "parsed": None, "correct": False},
        {"output": "TRUE", "answer": "true", "parsed": "true", "correct": True},
        {"output": "", "answer": "true", "parsed": None, "correct": False, "no_room": True},
        {"output": "the correct answer is true", "answer": "true", "parsed": "true", "correct": True},
    ]
    theirs = score_as_llm_adapters("boolq", rows)
    assert theirs is not None
    assert (theirs.rows, theirs.correct, theirs.accuracy) == (4, 2, 0.5)
    assert score(rows).whole.correct == 2
    assert score_as_llm_adapters("mmlu", rows) is None
