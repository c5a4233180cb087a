import pytest

from dinalrm_align.eval.report.markdown import table


def test_the_first_column_is_aligned_left_and_the_others_right():
    assert table(["run", "gain"], [["a|b", 1]]).split("\n") == ["| run | gain |", "| --- | ---: |", r"| a\|b | 1 |"]
    assert table(["n", "of"], [], align="rl").split("\n")[1] == "| ---: | --- |"


def test_padding_brings_the_columns_to_one_width():
    rows = ["| run    | gain |", "| -----  | ---: |", "| longer |  1.0 |"]
    assert table(["run", "gain"], [["longer", "1.0"]], padded=True).split("\n") == rows


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        table(["a", "b"], [["1"]])
