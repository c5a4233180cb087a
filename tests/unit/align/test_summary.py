"""The gains of gold's parts in words."""

from dinalrm_align.align.summary import parts_in_words
from dinalrm_align.eval.report.parts import by_main_part, part_names


def score(gain: float) -> dict[str, float]:
    return {"before": 0.5, "after": 0.5 + gain, "gain": gain, "standard_error": 0.007}


def test_each_main_part_has_a_line_with_its_components():
    names = {"faithfulness": 0.01, "faithfulness/objects": -0.02, "faithfulness/count": 0.0, "aesthetics": 0.2}
    scores = {"gold": score(1), "gold/a": score(1)} | {
        f"gold_parts/{name}": score(gain) for name, gain in names.items()
    }
    assert parts_in_words(scores) == [
        "parts of gold (gain ± standard error over prompts):",
        "  faithfulness 0.500 -> 0.510 (+0.010 ± 0.007): objects -0.020 ± 0.007, count +0.000 ± 0.007",
        "  aesthetics 0.500 -> 0.700 (+0.200 ± 0.007)",
    ]
    assert parts_in_words({"gold": score(1), "gold/a": score(1)}) == []


def test_a_further_gold_reward_is_no_part_and_a_component_may_have_components():
    names = ["gold", "gold/gold_parts", "gold_parts/a", "gold_parts/a/b", "gold_parts/a/b/c", "gold_parts/d=e/f"]
    assert part_names(names) == ["a", "a/b", "a/b/c", "d=e/f"]
    assert by_main_part(part_names(names)) == {"a": ["a/b", "a/b/c"], "d=e/f": []}
