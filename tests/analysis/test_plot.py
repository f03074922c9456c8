"""Figures of made-up tables: which are drawn, and that nothing breaks them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from peftsweep.analysis.figures import axes, page, plot
from peftsweep.analysis.statistics import trials
from peftsweep.analysis.statistics.task import study_tasks
from peftsweep.analysis.table.columns import TRAINING_TIME
from tests import tables

METHODS, QUANTS = ["lora", "dora", "ia3"], ["none", "4bit"]


def names(table: pd.DataFrame) -> set[str]:
    """The names of the figures of ``table``."""
    return {name for name, _ in plot.figures(table, tables.steps(table))}


def figure(name: str, table: pd.DataFrame) -> Any:
    """The figure of that name, alone."""
    (task,) = study_tasks(table, None)
    return dict(plot.drawings(task, tables.steps(table)))[name]()


def texts(drawn: Any) -> str:
    """All that is written in a figure."""
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in drawn.findobj(Text))


def test_what_was_varied_chooses_the_figures() -> None:
    of_all = {"training_time", "adapter_size", "parameters", "memory_stages", "memory_predicted"}
    of_all |= {"learning_curves", "frontier_task"}
    assert names(tables.trials({"config.method.r": [8, 16, 32]})) == of_all | {"rank_task"}
    assert names(tables.trials({"choices.targets": ["q", "qv", "mlp"]})) == of_all | {"modules_task"}
    both = tables.trials({"choices.method": METHODS, "choices.quant": QUANTS}, generated=True)
    assert names(both) == of_all | {"quantisation_task", "heatmap_task", "latency"}


@pytest.mark.parametrize(
    "table",
    [
        tables.trials({}),
        tables.trials({}, statuses={0: "failed"}),
        tables.trials({"choices.method": METHODS}, statuses=dict.fromkeys(range(3), "oom")),
    ],
    ids=["one trial", "one failed", "all out of memory"],
)
def test_a_study_with_nothing_to_compare_has_fewer_figures(table: pd.DataFrame) -> None:
    assert names(table) <= {"memory_stages", "learning_curves"}


def test_a_study_without_a_score_still_shows_what_it_cost() -> None:
    found = names(tables.trials({"config.method.r": [8, 16, 32]}, evaluations=[]))
    assert "training_time" in found
    assert not any(name.startswith(("rank_", "frontier_")) for name in found)


def test_what_did_not_succeed_is_marked_by_its_word() -> None:
    factors = {"choices.method": METHODS, "choices.quant": QUANTS}
    table = tables.trials(factors, statuses={0: "oom", 3: "refused", 4: "failed"})
    heat = texts(figure("heatmap_task", table))
    assert {"oom", "refused", "failed"} <= set(heat.splitlines())
    assert "1 failed, 1 oom, 1 refused" in heat
    assert "1 oom" in texts(figure("training_time", table))
    assert "\N{MULTIPLICATION SIGN} refused" in texts(figure("quantisation_task", table))


def test_equal_scores_have_the_middle_shade_of_a_heat_map() -> None:
    from matplotlib.image import AxesImage

    table = tables.trials({"choices.method": METHODS, "choices.quant": QUANTS})
    for score in [str(c) for c in table if str(c).startswith("eval_info.task.") and str(c).endswith(".value")]:
        table[score] = 0.5
    [image] = figure("heatmap_task", table).findobj(AxesImage)
    assert image.norm(0.5) == 0.5  # 0 is the shade of the worst score, 1 that of the best


def test_scores_that_are_a_tie_have_shades_close_to_each_other() -> None:
    from matplotlib.image import AxesImage

    table = tables.trials({"choices.method": METHODS, "choices.quant": QUANTS})
    score = "eval_info.task.accuracy.value"
    far = figure("heatmap_task", table.assign(**{score: np.linspace(0.1, 0.9, len(table))})).findobj(AxesImage)[0]
    near = figure("heatmap_task", table.assign(**{score: np.linspace(0.5, 0.501, len(table))})).findobj(AxesImage)[0]
    assert (far.norm(0.9) - far.norm(0.1), near.norm(0.501) - near.norm(0.5) < 0.1) == (1.0, True)


def test_series_differ_in_more_than_colour_and_look_the_same_in_every_figure() -> None:
    assert axes.series_styles(METHODS, ["ia3", "dora", "lora"]) == axes.series_styles(METHODS)
    many = [str(n) for n in range(20)]
    for key in ("color", "marker", "linestyle"):
        assert len({str(look[key]) for look in axes.series_styles(many).values()}) == axes.SERIES
    assert set(axes.series_styles(many, many[::-1])) == set(many[-axes.SERIES :])  # the best are told apart


WORDS = [f"a-long-label-of-configuration-{n}-with-many-words" for n in range(12)]


@pytest.mark.parametrize(
    "factors",
    [
        pytest.param(  # the dearest figures of the tests
            {"choices.method": [f"method_{n}" for n in range(10)], "choices.quant": [*axes.QUANTS[:8]]},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"choices.method": WORDS, "choices.targets": ["q_proj,k_proj,v_proj,o_proj,gate_proj", "qv"]},
            marks=pytest.mark.slow,
        ),
        {"config.method.r": [8, 16], "choices.method": METHODS, "choices.quant": QUANTS},
    ],
    ids=["many levels", "long names", "two ranks"],
)
def test_no_legend_and_no_mark_is_cut_off_or_covered(factors: dict[str, list[Any]]) -> None:
    count = math.prod(map(len, factors.values()))
    table = tables.trials(factors, statuses={n: ("refused", "failed", "oom")[n % 3] for n in range(0, count, 7)})
    with_marks = ("rank_task", "frontier_task", "modules_task", "quantisation_task", "learning_curves")
    drawn = {name: found for name in with_marks if (found := figure(name, table)) is not None}
    assert len(drawn) >= 3
    for name, found in drawn.items():
        found.draw_without_rendering()
        [legend] = found.legends
        assert legend.get_window_extent().x0 >= 0, name
        assert legend.get_window_extent().x1 <= found.bbox.width, name
        for ax in found.axes:
            marks = [text for text in ax.texts if text.get_text().startswith("\N{MULTIPLICATION SIGN}")]
            boxes = sorted((text.get_window_extent().x0, text.get_window_extent().x1) for text in marks)
            assert all(left[1] <= right[0] for left, right in itertools.pairwise(boxes)), name
            if boxes:
                inside = ax.get_window_extent()
                assert inside.x0 - 1 <= boxes[0][0] <= boxes[-1][1] <= inside.x1 + 1, name


def test_more_ranks_than_ticks_have_powers_of_two_as_numbers() -> None:
    drawn = figure("rank_task", tables.trials({"config.method.r": [*range(1, 9), 12, 16, 24, 32, 48, 64, 128]}))
    drawn.draw_without_rendering()
    for ax in drawn.axes:
        labels = [label.get_text() for label in ax.get_xticklabels()]
        numbers = [float(label) for label in labels if label]  # which of them, versions of matplotlib choose
        assert len(numbers) > 2
        assert all(math.log2(number).is_integer() for number in numbers)


def test_a_name_that_has_no_room_in_its_panel_is_not_written() -> None:
    table = tables.trials({"choices.method": WORDS, "config.method.r": [8, 16]})
    drawn = figure("frontier_task", table)
    drawn.draw_without_rendering()
    for ax in drawn.axes:
        inside = ax.get_window_extent()
        for text in ax.texts:
            assert inside.x0 <= text.get_window_extent().x0 <= text.get_window_extent().x1 <= inside.x1


@pytest.mark.slow  # it draws all figures three times
def test_any_label_is_written_into_the_folder_and_old_figures_go() -> None:
    folder = Path("study/plots")
    folder.mkdir(parents=True)
    for file in ("rank_old.png", "mine.png"):
        (folder / file).write_bytes(b"")
    labels = ["<b>$x_1$</b>\n\\alpha", "метод", "方法", "x" * 300]
    table = tables.trials({"choices.method": labels}, evaluations=["../../a/b"])
    written = plot.study(table, tables.steps(table), folder)
    assert {file.name for file in folder.iterdir()} == {file.name for file in written} | {"mine.png"}
    assert {file.parent for file in written} == {folder}
    assert [file.name for file in Path().iterdir()] == ["study"]
    assert any(file.name.endswith("a-b.png") for file in written)


@pytest.mark.usefixtures("figures_as_published")
def test_figures_have_300_dots_an_inch() -> None:
    from PIL import Image

    table = tables.trials({})  # which has few figures
    written = plot.study(table, tables.steps(table), Path("plots"))
    assert written
    for file in written:
        with Image.open(file) as image:
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.5)


def test_svg_is_written_when_asked() -> None:
    table = tables.trials({"choices.quant": QUANTS}, evaluations=[])
    written = plot.study(table, tables.steps(table), Path("plots"), "svg")
    assert {file.suffix for file in written} == {".svg"}
    assert written[0].read_text(encoding="utf-8").startswith("<?xml")


def test_models_and_datasets_are_never_in_one_figure() -> None:
    table = tables.trials({"choices.model": ["small", "large"], "config.method.r": [8, 16]})
    names = [name for name, _ in plot.figures(table, tables.steps(table))]
    assert {"rank_task__small-on-dataset", "rank_task__large-on-dataset"} <= set(names)
    assert all(name.endswith(("__small-on-dataset", "__large-on-dataset")) for name in names)


def test_a_pack_s_memory_is_no_trial_s_stage() -> None:
    table = tables.trials({"config.method.r": [8, 16]})
    table["memory.packed_train.allocated_peak"] = 9_000_000_000
    table["run_info.packed_with"] = ["[]", '["trial-0"]']
    (part,) = trials.tasks(table).values()
    assert part["memory.train.allocated_peak"].isna().tolist() == [False, True]
    assert part["train_info.train_seconds"].isna().tolist() == [False, True]
    assert part["memory.predicted.peak_bytes"].notna().all()


@pytest.mark.parametrize(
    ("seconds", "shown", "unit"),
    [(7200, 2, "h"), (7199, 7199 / 60, "min"), (300, 5, "min"), (299, 299, "s"), (1, 1, "s"), (0.5, 500, "ms")],
)
def test_seconds_are_drawn_in_the_unit_that_the_axis_names(seconds: float, shown: float, unit: str) -> None:
    factor, name = TRAINING_TIME.scale(seconds)
    assert name == f"training time ({unit})"
    assert seconds / factor == pytest.approx(shown)


def test_the_base_s_score_is_written_in_digits_where_it_is_far_from_what_is_compared() -> None:
    table = tables.trials({"config.method.r": [8, 16, 32]})
    table["eval_info.task.base_accuracy.value"] = 2288.4
    assert "untouched base: 2,288" in texts(figure("rank_task", table))


def test_each_untouched_base_is_drawn_and_not_a_mean_of_several() -> None:
    table = tables.trials({"choices.quant": ["none", "4bit"], "config.method.r": [8, 16]})
    scores = table["choices.quant"].map({"none": 0.4, "4bit": 0.6})
    drawn = figure("rank_task", table.assign(**{"eval_info.task.base_accuracy.value": scores}))
    heights = [line.get_ydata()[0] for line in drawn.axes[0].lines if line.get_linestyle() == ":"]
    assert sorted(heights) == [0.4, 0.6]
    assert "untouched bases" in texts(drawn)
    far = figure("rank_task", table.assign(**{"eval_info.task.base_accuracy.value": 1000 * scores}))
    assert "untouched bases: 400.0 to 600.0" in texts(far)
    one = figure("rank_task", table)
    assert "untouched bases" not in texts(one)


def test_the_latency_of_each_untouched_base_is_drawn() -> None:
    table = tables.trials({"choices.quant": ["none", "4bit"]}, generated=True)
    column = "generation_info.short.base.seconds_p50"
    drawn = figure("latency", table.assign(**{column: [0.2, 0.8]}))
    assert "untouched base, 4bit" in texts(drawn)
    heights = [float(height) for line in drawn.axes[0].lines for height in line.get_ydata()]
    assert any(other == pytest.approx(4 * height) for height in heights for other in heights)
    alike = tables.trials({"config.method.r": [8, 16]}, generated=True)
    assert "untouched base, " not in texts(figure("latency", alike))


def test_a_frontier_over_many_decades_has_a_few_ticks() -> None:
    table = tables.trials({"config.method.r": list(range(1, 9))})
    table["train_info.adapter_bytes"] = [10.0**n for n in range(2, 10)]
    panel = figure("frontier_task", table).axes[-1]
    low, high = panel.get_xlim()
    assert panel.get_xscale() == "log"
    assert 2 <= sum(low <= tick <= high for tick in panel.get_xticks()) <= 10
    assert panel.get_xlabel() == "adapter on disk"
    formatted = [panel.xaxis.get_major_formatter()(size) for size in (100, 1e3, 3e5, 1e6, 1e9)]
    assert formatted == ["100 B", "1 kB", "300 kB", "1 MB", "1 GB"]
    assert {"100 B", "10 MB", "1 GB"} <= set(texts(figure("adapter_size", table)).splitlines())


def test_ticks_of_steps_are_whole_numbers() -> None:
    table = tables.trials({"config.method.r": [8, 16]})
    panel = figure("learning_curves", table).axes[0]
    panel.set_xlim(1, 3)
    assert panel.get_xticks().tolist() == panel.get_xticks().round().tolist()


def test_one_seed_has_no_error_bar_of_its_seconds() -> None:
    for seeds in (1, 2):
        table = tables.trials({"config.method.r": [8, 16]}, seeds=seeds)
        table["train_info.train_seconds"] = np.arange(1.0, len(table) + 1)
        [bars] = figure("training_time", table).axes[0].containers[1:]
        ends = np.concatenate([cap.get_xdata() for cap in bars.lines[1]])
        assert np.isnan(ends.astype(float)).all() == (seeds == 1)


@pytest.mark.parametrize(("values", "wide"), [([1, 9.9], False), ([1, 10], True), ([0, 10], False), ([-1, 5], False)])
def test_values_that_span_a_decade_are_told(values: list[float], wide: bool) -> None:
    assert axes.spans_a_decade([*values, float("nan")]) == wide


def test_a_value_that_was_not_logged_is_no_part_of_the_span() -> None:
    """As pandas reads columns of records: numbers that may be missing, also with nothing else, and several columns."""
    logged = pd.Series([2.0, pd.NA, 30.0], dtype="Float64")
    assert axes.spans_a_decade(logged)
    assert axes.spans_a_decade(pd.DataFrame({"value": logged, "low": [1.0, float("nan"), 5.0]}))
    assert axes.spans_a_decade(pd.Series([1, None, 10], dtype="Int64"))
    assert not axes.spans_a_decade(pd.Series([pd.NA, pd.NA], dtype="Float64"))
    assert not axes.spans_a_decade(pd.Series([None, 3.0], dtype=object))


def test_the_page_is_drawn_of_steps_of_which_some_have_no_training_loss(tmp_path: Path) -> None:
    """A validation has a line of its own, without a training loss; columns are as `peftsweep-collect` reads them."""
    table = tables.trials({"config.method.r": [8, 16]})
    steps = tables.steps(table).convert_dtypes()
    assert steps["loss"].dtype == pd.Float64Dtype()
    assert steps["loss"].isna().any()
    assert "curves-plot" in page.write(table, steps, tmp_path).read_text(encoding="utf-8")


def test_modules_of_a_decade_of_parameters_stand_on_a_logarithmic_axis() -> None:
    table = tables.trials({"choices.targets": ["q", "qv", "mlp"]})
    for factor, scale in ((2, "linear"), (10, "log")):
        table["train_info.trainable_parameters"] = [1000 * factor**n for n in range(3)]
        assert [ax.get_yscale() for ax in figure("modules_task", table).axes] == ["linear", scale], factor


def test_overheads_of_few_runs_are_drawn_without_an_interval() -> None:
    table = tables.trials({"config.method.r": [8, 16]}, generated=True)
    bounds = [c for c in table.columns if c.endswith(("overhead.low", "overhead.high"))]
    table[bounds] = None
    assert figure("latency", table) is not None


def test_shares_stand_on_a_linear_axis_however_far_their_intervals_reach(recwarn: pytest.WarningsRecorder) -> None:
    """An interval from 0.001 to 0.249 spans decades, and a base of 0 has no place on a logarithmic axis."""
    table = tables.trials({"config.method.r": [8, 16]}, seeds=1)
    table["eval_info.task.accuracy.value"], table["eval_info.task.accuracy.n"] = 0.05, 20
    table["eval_info.task.accuracy.stderr"], table["eval_info.task.base_accuracy.value"] = 0.05, 0.0
    drawn = figure("rank_task", table)
    drawn.canvas.draw()
    assert drawn.axes[0].get_yscale() == "linear"
    assert not [one for one in recwarn if "constrained_layout" in str(one.message)]


def test_stages_stand_in_the_order_in_which_a_trial_runs_them() -> None:
    """A first checkpoint is saved before the training, so that records name the stage of saving earlier."""
    table = tables.trials({"config.method.r": [8, 16]})
    for stage in ("save", "merge", "eval", "load", "own"):
        table[f"memory.{stage}.allocated_peak"] = 1e9
    panel = figure("memory_stages", table).axes[0]
    shown = [text.get_text() for text in panel.get_xticklabels()]
    assert [name for name in shown if name in ("load", "train", "save", "eval", "merge", "own")] == [
        *("load", "train", "save", "eval", "merge", "own")
    ]
