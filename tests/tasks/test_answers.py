"""Labels and letters in generated texts."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from milora.tasks.answers import Labels, find_letter

LETTERS = "ABCDE"

WORDINGS = (
    "{}",
    "({})",
    "{}.",
    "{})",
    "[{}]",
    " **{}**\n",
    "{}. 62 miles",
    "({}) 62 miles",
    "Option {}",
    "The answer is {}",
    "The answer is ({}).",
    "the correct answer is: {}",
    "The best answer to this would be option ({}), I think.",
    "So the correct option is {}, because (A) and (B) are too small.",
    "ANSWER: {}",
    "**Answer:** {}",
    "Answer = ({})",
    "#### {}",
    "It is 3 * 4 = 12, a dozen. The answer is ({}).\n",
    "(A) is too small. The answer is {}.",
    "The answer is A? No. The answer is {}.",
    "$\\boxed{{{}}}$",
    "Thus \\boxed{{\\text{{({})}}}}.",
    "\\[ \\boxed{{\\textbf{{{}}}}} \\]",
)


class TestLetters:
    @given(st.sampled_from(LETTERS), st.sampled_from(WORDINGS))
    def test_any_letter_in_any_wording(self, letter: str, wording: str) -> None:
        assert find_letter(wording.format(letter), LETTERS) == letter

    @given(
        st.sampled_from(LETTERS), st.sampled_from(["{}", "({})", " {}. ", "the answer is {}.", "answer: ({})", "{})"])
    )
    def test_small_letters(self, letter: str, wording: str) -> None:
        assert find_letter(wording.format(letter.lower()), LETTERS) == letter

    @pytest.mark.parametrize(
        ("output", "letter"),
        [
            ("The total is 6, so (B)", "B"),  # the only one in brackets
            ("the answer is not (A) but (B)", "B"),
            ("Answer: The sum is 12, which is (D)", "D"),
            ("C, I think", "C"),
            ("The answer is (F)", None),
            ("F", None),
            ("The answer is A or B", None),
            ("The answer is (A) or (B)", None),
            ("A/B", None),
            ("A, B", None),
            ("(A) 21 (B) 20 (C) 25 (D) 33 (E) 18", None),
            ("A) 21 B) 20 C) 25", None),
            ("A. 21\nB. 20", None),
            ("(A) is wrong, so it is (B)", "B"),
            ("not (B)", None),
            ("The answer is not C", None),
            ("the answer is a dozen", None),
            ("A dozen is 12", None),
            ("a dozen", None),
            ("Deal with it", None),
            ("Answer", None),
            ("The answer is 21", None),
            ("", None),
        ],
    )
    def test_what_counts(self, output: str, letter: str | None) -> None:
        assert find_letter(output, LETTERS) == letter

    @given(st.text() | st.text("ABCab()[]{}./,: \n\\$*#answerisoxd"))
    @example("the answer is \u0130")
    @example("\\boxed{")
    def test_any_text_gives_a_letter_or_none(self, text: str) -> None:
        assert find_letter(text, LETTERS) in {*LETTERS, None}


class TestLabels:
    LABELS = ("physics", "high school", "high school physics", "us foreign policy", "answer10", "answer1")

    @given(
        st.sampled_from(LABELS),
        st.sampled_from(["{}", "The correct answer is {}.", "answer: **{}**", "{}\n\n", "it is ({})"]),
        st.sampled_from([str.lower, str.upper, str.title]),
        st.sampled_from([" ", "_", "-", "  "]),
    )
    def test_any_label_in_any_wording(self, label: str, wording: str, case: object, space: str) -> None:
        assert callable(case)
        assert Labels(self.LABELS).find(wording.format(case(label).replace(" ", space))) == label

    def test_a_label_within_another_is_not_that_label(self) -> None:
        labels = Labels(self.LABELS)
        assert labels.find("the correct answer is high school physics") == "high school physics"
        assert labels.find("the correct answer is answer10") == "answer10"
        assert labels.find("physics or us foreign policy") is None
        assert labels.find("astrophysics") is None

    @given(
        st.permutations(LABELS),
        st.sampled_from(["the correct answer is {}", "Answer: {}.", "the answer is either {}, I think"]),
        st.sampled_from(["{} or {}", "{} and {}", "{}, {}", "**{}** or **{}**", "({}) or ({})", "{} & {}"]),
    )
    def test_two_labels_side_by_side_are_no_answer(self, labels: list[str], wording: str, pair: str) -> None:
        assert Labels(self.LABELS).find(wording.format(pair.format(*labels))) is None

    @pytest.mark.parametrize(
        "output",
        [
            "the correct answer is true, not false",
            "the correct answer is true. False is wrong",
            "the correct answer is true, true, true",
            "the correct answer is true or so",
            "It may be true or false. The correct answer is true",
        ],
    )
    def test_what_else_is_said_after_a_label(self, output: str) -> None:
        assert Labels(("true", "false")).find(output) == "true"


@pytest.mark.parametrize(
    "text",
    [
        "the answer is " * 3000,
        "(A " * 9000,
        "answer " * 9000,
        "[" * 20000,
        "A/" * 9000,
        "the answer is true" + ", " * 9000,
    ],
)
def test_a_model_that_repeats_itself_costs_no_time(text: str) -> None:
    started = time.process_time()
    find_letter(text, LETTERS)
    Labels(("true", "false")).find(text)
    assert time.process_time() - started < 5  # a backtracking pattern needs minutes
