"""The comparison of rules for a temperature, and calibrated teachers: the guide has what the rows say."""

from pathlib import Path

from benchmarks import calibration, suggest
from benchmarks.table import read

PAGE = Path(__file__).parents[2] / "docs" / "check.md"


def row(rule: str, images: str, weighting: str, gain: float, regret: float) -> suggest.Row:
    return suggest.Row("digits", images, "sgd", "x1", weighting, rule, 2.0, gain, regret)


def test_the_table_has_mean_gains_by_group_and_the_error_of_the_regret() -> None:
    rows = [row("a", "few", "fixed", 3.0, 1.0), row("a", "many", "fixed", 1.0, 3.0), row("a", "few", "equal", 9.0, 0.5)]
    rows = [*rows, *(each._replace(task="mnist5k", length="x1/4") for each in rows)]
    assert suggest.table(rows).splitlines()[2] == "| a | 2, 2 | +2.00 | +3.00 | +3.00 | +1.00 | 2.00 ± 0.58 | 0.50 |"


def test_the_default_rule_has_the_smallest_mean_regret() -> None:
    rows = [each for each in read(suggest.CSV, suggest.Row) if each.rule.startswith("entropy")]
    sums = {rule: sum(each.regret for each in rows if each.rule == rule) for rule in suggest.RULES if "entropy" in rule}
    assert min(sums, key=lambda rule: sums[rule]) == "entropy 0.1"


def test_the_guide_has_the_tables_of_the_rows() -> None:
    text = PAGE.read_text()
    assert suggest.table(read(suggest.CSV, suggest.Row)) in text
    assert calibration.table(read(calibration.CSV, calibration.Row)) in text


def test_the_learning_rate_of_a_calibrated_arm_is_chosen_on_validation() -> None:
    def trained(rate: float, val: float, test: float) -> calibration.Row:
        return calibration.Row("few", 1, 4.0, rate, 0, 1.2, 0.02, 0.01, val, test)

    rows = [trained(0.01, 90.0, 70.0), trained(0.02, 80.0, 99.0)]
    assert calibration.chosen(rows) == {("few", 1, 4.0): {0: 70.0}}
