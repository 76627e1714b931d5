from __future__ import annotations

import copy
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from kd_lightning.plotting import (  # noqa: E402
    plot_schedule,
    plot_softening,
    plot_sweep,
    plot_temperature_finder,
    plot_temperature_grid,
    plot_temperature_history,
)
from kd_lightning.temperature import (  # noqa: E402
    AsymmetricTemperature,
    CapacityTemperature,
    ClassFrequencyTemperature,
    CosineSchedule,
    JoinedTemperature,
    LearnableTemperature,
    LogitStdTemperature,
    LossGapTemperature,
    MultiTemperature,
    Progress,
    StepSchedule,
)


def lines(figure: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].get_lines()}


class TestSchedule:
    def test_one_curve_over_epochs(self, tmp_path):
        figure = plot_schedule(CosineSchedule(8.0, 2.0), epochs=10, steps_per_epoch=20)
        ((x, y),) = lines(figure).values()
        assert (x[0], x[-1]) == (0.0, 10.0)
        assert len(x) == 201
        for epoch, t in zip(x, y, strict=True):
            assert t == pytest.approx(CosineSchedule(8.0, 2.0)(Progress(step=round(20 * epoch), max_steps=200)))
        axes = figure.axes[0]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "temperature T")
        assert axes.get_legend() is None
        assert axes.get_ylim()[0] == 0
        figure.savefig(tmp_path / "schedule.png")
        assert (tmp_path / "schedule.png").stat().st_size > 5000

    def test_teacher_and_student_where_they_differ(self):
        curves = lines(plot_schedule(AsymmetricTemperature(1.0, StepSchedule(8.0, (2,))), epochs=4))
        assert list(curves["student"][1]) == [1.0] * 5
        assert list(curves["teacher"][1]) == [8.0, 8.0, 4.0, 4.0, 4.0]

    @pytest.mark.parametrize("subject", [4.0, lambda progress: 2.0 + progress.fraction])
    def test_numbers_and_functions(self, subject):
        figure = plot_schedule(subject, epochs=3)
        assert len(lines(figure)) == 1
        assert "object at" not in figure.axes[0].get_title(loc="left")
        assert figure.get_supxlabel() == ""

    def test_stand_in_logits_are_named(self):
        figure = plot_schedule(LogitStdTemperature(), epochs=4)
        assert "stand-in logits of 10 classes" in figure.get_supxlabel()
        assert "band: smallest to largest" in figure.get_supxlabel()
        student = lines(figure)["student"][1]
        assert student[-1] > student[0]  # it grows sharper

    def test_what_does_not_look_at_logits_says_nothing_of_them(self):
        figure = plot_schedule(LearnableTemperature(), epochs=3)
        assert figure.get_supxlabel() == "untrained: what is learned stays at its start"
        figure = plot_schedule(ClassFrequencyTemperature([3, 2, 1]), epochs=2, num_classes=3)
        assert figure.get_supxlabel() == "line: mean, band: smallest to largest"

    def test_several_temperatures(self):
        figure = plot_schedule(MultiTemperature([2.0, 4.0]), epochs=2)
        assert {name: y[0] for name, (_, y) in lines(figure).items()} == {"term 1": 2.0, "term 2": 4.0}

    def test_terms_that_come_later(self):
        policy = JoinedTemperature([1.0, MultiTemperature([2.0, 3.0])], boundaries=[2])
        second = lines(plot_schedule(policy, epochs=4))["term 2"][1]
        assert [math.isnan(t) for t in second] == [True, True, False, False, False]

    @pytest.mark.parametrize("policy", [LossGapTemperature(), CapacityTemperature(interval=1)])
    def test_the_policy_is_left_as_it_was(self, policy):
        policy.eval()
        before = copy.deepcopy(policy.state_dict())
        figure = plot_schedule(policy, epochs=5, steps_per_epoch=4)
        torch.testing.assert_close(policy.state_dict(), before)
        assert not policy.training
        ((_, y),) = lines(figure).values()
        assert y[-1] != y[0]

    def test_long_runs_are_thinned(self):
        ((x, _),) = lines(plot_schedule(CosineSchedule(8.0, 2.0), epochs=300, steps_per_epoch=1000)).values()
        assert len(x) < 500
        assert x[-1] == 300

    def test_many_figures_leave_nothing_behind(self):
        import matplotlib.pyplot as plt

        before = plt.get_fignums()
        for _ in range(25):  # pyplot warns above 20
            plot_schedule(4.0, epochs=1)
        plot_temperature_finder([(2, None, [0.8])], "val_acc")
        constant = [(4.0, 4.0, 4.0)] * 2
        plot_temperature_grid({"constant": [(constant, constant)]})
        plot_temperature_history([0, 1], constant, constant)
        assert plt.get_fignums() == before

    def test_errors(self):
        with pytest.raises(ValueError, match="epochs must be 1 or more, got 0"):
            plot_schedule(4.0, epochs=0)
        with pytest.raises(TypeError, match="temperature must be a number, a schedule"):
            plot_schedule("4", epochs=2)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="counts of 3 classes, but the logits have 10"):
            plot_schedule(ClassFrequencyTemperature([3, 2, 1]), epochs=2)


class TestGrid:
    constant = ((4.0, 4.0, 4.0), (4.0, 4.0, 4.0), (4.0, 4.0, 4.0))
    falling = ((8.0, 6.0, 9.0), (4.0, 3.0, 5.0), (2.0, 2.0, 2.0))

    def test_one_panel_for_each(self, tmp_path):
        histories = {name: [(self.constant, self.constant)] for name in "abcd"}
        histories["e"] = [(self.constant, self.falling), (self.falling, self.falling)]
        figure = plot_temperature_grid(histories, columns=3)
        assert [axes.get_title(loc="left") for axes in figure.axes] == list("abcde")
        curves = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in figure.axes[-1].get_lines()}
        assert curves["student 1"] == [4.0, 4.0, 4.0]
        assert curves["teacher 1"] == curves["student 2"] == [8.0, 4.0, 2.0]
        band = np.asarray(figure.axes[-1].collections[0].get_paths()[0].vertices)
        assert (band[:, 1].min(), band[:, 1].max()) == (2.0, 9.0)
        assert {axes.get_ylim() for axes in figure.axes} == {figure.axes[0].get_ylim()}
        assert figure.axes[0].get_ylim()[0] == 0
        assert (figure.get_supxlabel(), figure.get_supylabel()) == ("epoch", "temperature T")
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["student", "teacher"]
        assert [line.get_linestyle() for line in legend.get_lines()] == ["-", "--"]
        figure.savefig(tmp_path / "grid.png")

    def test_log_scale(self):
        figure = plot_temperature_grid({"a": [(self.falling, self.falling)]}, log=True)
        assert figure.axes[0].get_yscale() == "log"
        assert not figure.legends

    @pytest.mark.parametrize(
        "histories", [{}, {"a": []}, {"a": [((), ())]}, {"a": [(constant, constant)], "b": [(constant, constant[:2])]}]
    )
    def test_errors(self, histories):
        with pytest.raises(ValueError, match="the same number of epochs"):
            plot_temperature_grid(histories)


class TestSoftening:
    logits = (6.0, -1.0, 3.0, 2.0)

    def test_probabilities_and_entropy(self, tmp_path):
        figure = plot_softening(self.logits, [1.0, 4.0])
        p = (torch.tensor(self.logits) / 4).softmax(-1).sort(descending=True).values
        assert lines(figure)["T = 4"][1] == pytest.approx(p.tolist())
        left, right = figure.axes
        curve, *dots = ([float(y) for y in np.atleast_1d(line.get_ydata())] for line in right.get_lines())
        assert dots[1][0] == pytest.approx(-(p * p.log()).sum().item())
        assert sorted(curve) == curve  # entropy rises with T
        assert left.get_yscale() == "log"
        assert [label.get_text() for label in left.get_xticklabels()] == ["0", "2", "3", "1"]
        assert (left.get_ylabel(), right.get_ylabel()) == ("probability", "entropy (nats)")
        assert right.get_xlabel() == "temperature T"
        figure.savefig(tmp_path / "softening.png")

    def test_batch_with_many_classes(self):
        figure = plot_softening(torch.randn(3, 20, 50), [1, 2])
        assert "15 of 50" in figure.axes[0].get_xlabel()
        assert "60 samples" in figure.axes[1].get_title(loc="left")

    def test_names_and_masked_classes(self):
        logits = torch.tensor([1.0, -math.inf, 2.0], dtype=torch.bfloat16)
        figure = plot_softening(logits, [2.0], class_names=["cat", "dog", "lion"])
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["lion", "cat", "dog"]

    @pytest.mark.parametrize(
        ("logits", "temperatures", "options", "message"),
        [
            ([1.0], [1.0], {}, "rows of two or more numbers"),
            (torch.empty(0, 3), [1.0], {}, "rows of two or more numbers"),
            ([1.0, math.nan], [1.0], {}, "rows of two or more numbers"),
            ([1.0, 2.0], [], {}, "one or more positive, finite numbers"),
            ([1.0, 2.0], [0.0], {}, "one or more positive, finite numbers"),
            ([1.0, 2.0], [1.0], {"class_names": ["a"]}, "must name all 2 classes, got 1"),
        ],
    )
    def test_errors(self, logits, temperatures, options, message):
        with pytest.raises(ValueError, match=message):
            plot_softening(logits, temperatures, **options)


@pytest.mark.parametrize("plot", [lambda: plot_schedule(4.0, 1), lambda: plot_softening([1.0, 2.0])])
def test_without_matplotlib(monkeypatch, plot):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install kd-lightning\[plots\]"):
        plot()


class TestHistory:
    constant = ((4.0, 4.0, 4.0), (4.0, 4.0, 4.0), (2.0, 2.0, 2.0), (2.0, 2.0, 2.0))
    moves = ((12, 0.5, "val_acc 0.9 not above 0.9 for 1 check: temperature × 0.5 → 2"),)

    def test_a_move_is_a_step_where_it_was_made(self, tmp_path):
        figure = plot_temperature_history([5, 10, 15, 20], self.constant, self.constant, moves=self.moves)
        x, y = lines(figure)["both"]
        assert list(zip(x, y, strict=True)) == [(5, 4), (10, 4), (12, 4), (12, 2), (15, 2), (20, 2)]
        assert figure.get_supxlabel() == f"1  step 12: {self.moves[0][2]}"
        assert [text.get_text() for text in figure.axes[0].texts] == ["1"]
        figure.savefig(tmp_path / "history.png")

    def test_a_step_moves_both_sides_and_their_ranges(self):
        student = [(4.0, 3.0, 5.0)] * 2
        figure = plot_temperature_history([1, 9], student, [(8.0, 8.0, 8.0)] * 2, moves=[(9, 2.0, "a"), (9, 0.25, "b")])
        assert list(lines(figure)["student"][1]) == [4, 4, 4, 8, 8, 2]
        assert list(lines(figure)["teacher"][1]) == [8, 8, 8, 16, 16, 4]

    def test_a_move_before_the_first_recorded_step_draws_no_step(self):
        figure = plot_temperature_history([5, 10], self.constant[2:], self.constant[2:], moves=[(3, 0.5, "early")])
        assert list(lines(figure)["both"][1]) == [2, 2]

    def test_of_many_moves_twelve_reasons_are_listed(self):
        moves = [(step, 0.9, f"reason {step}") for step in range(1, 16)]
        figure = plot_temperature_history([0, 20], self.constant[:2], self.constant[:2], moves=moves)
        listed = figure.get_supxlabel().splitlines()
        assert listed[0] == "1  step 1: reason 1"
        assert listed[11:] == ["12  step 12: reason 12", "and 3 more"]

    def test_without_moves_the_recorded_steps_are_drawn(self):
        figure = plot_temperature_history([5, 10, 15, 20], self.constant, self.constant)
        assert list(lines(figure)["both"][0]) == [5, 10, 15, 20]
        assert figure.get_supxlabel() == ""


def test_sweep_with_one_weight_is_a_curve() -> None:
    cells = [(1.0, 0.9, [0.8, 0.9]), (4.0, 0.9, []), (8.0, 0.9, [0.6, 0.62])]
    figure = plot_sweep(cells, "val_acc", baseline=[0.5, 0.6], best=(1.0, 0.9))
    (axes,) = figure.axes
    curve, *_, level = [np.asarray(line.get_xydata()) for line in axes.get_lines() if line.get_linestyle() == "-"]
    np.testing.assert_allclose(curve, [(1, 0.85), (8, 0.61)])
    np.testing.assert_allclose(level[:, 1], 0.55)
    assert {text.get_text().strip() for text in axes.texts} == {"no result", "best: 1"}
    assert axes.get_xlabel() == "temperature T (kd_weight 0.9)"
    plot_sweep([(1.0, 0.9, [])], "val_acc", baseline=[0.5])  # nothing but the baseline


def test_a_curve_has_a_place_for_the_temperatures_without_a_score(tmp_path) -> None:
    figure = plot_sweep([(2.0, 0.9, [0.8]), (200.0, 0.9, [])], "val_acc", best=(2.0, 0.9))
    low, high = figure.axes[0].get_xlim()
    assert low < 2 < 200 < high
    figure.savefig(tmp_path / "curve.png")  # warns where a text lies far outside


def test_sweep_heat_map_shows_every_cell() -> None:
    cells = [(1.0, 0.5, [0.8, 0.9]), (4.0, 0.5, []), (1.0, 0.9, [0.7]), (4.0, 0.9, [0.6, 0.62])]
    figure = plot_sweep(cells, "val_acc", baseline=[0.5, 0.6], best=(1.0, 0.5))
    axes, bar = figure.axes
    assert {text.get_text() for text in axes.texts} == {"0.850\n± 0.071", "no result", "0.7", "0.610\n± 0.014"}
    assert "no teacher (line) 0.5500 ± 0.0707" in axes.get_title(loc="left")
    assert bar.get_ylim()[0] < 0.55 < 0.85 < bar.get_ylim()[1]
    assert len(axes.patches) == 1


def test_sweep_without_a_grid_is_dots() -> None:
    figure = plot_sweep([(1.3, 0.5, [0.8]), (7.0, 0.77, [0.9])], "val_task_loss", best=(1.3, 0.5), mode="min")
    assert len(figure.axes[0].collections[0].get_offsets()) == 2  # pyright: ignore[reportArgumentType]
    assert figure.axes[0].get_title(loc="left") == "val_task_loss, one seed"
    with pytest.raises(ValueError, match="no scores"):
        plot_sweep([(1.0, 0.5, [])], "val_acc")
