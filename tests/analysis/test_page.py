"""report.html: everything is in it, nothing of a record is markup, and a browser without a network can use it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from peftsweep.analysis.figures import charts, page
from peftsweep.analysis.table.table import predictions
from tests import tables

EVIL = "</script><img src=x onerror=alert(1)><b>&amp;"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def study(table: pd.DataFrame, commands: bool = True) -> str:
    """The text of the page of ``table`` without the two libraries."""
    folder = Path("multirun/default")
    for trial in table["run_info.trial"] if commands else []:
        kept = folder / trial / ".hydra" / "overrides.yaml"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("- method=lora\n- 'dataset.prompt=\"{question} <b>\"'\n", encoding="utf-8")
    text = page.write(table, tables.steps(table), folder).read_text(encoding="utf-8")
    return text.partition("</head>")[2]


def test_every_trial_its_command_and_its_configuration_are_there() -> None:
    table = tables.trials({"config.method.r": [8, 16]}, statuses={1: "oom"}).assign(**{"config.model.name": "tiny"})
    text = study(table)
    assert [f"#trial-{n}" in text for n in range(2)] == [True, True]
    assert [f'id="trial-{n}"' in text for n in range(2)] == [True, True]
    assert "peftsweep method=lora 'dataset.prompt=\"{question} &lt;b&gt;\"'" in text
    assert "<dt>method.r</dt><dd>16</dd>" in text
    assert text.count("<dt>model.name</dt><dd>tiny</dd>") == 1  # what is common stands once
    assert "oom: train: broken" in text
    assert "1 success, 1 oom" in text or "1 oom, 1 success" in text


def test_a_record_without_overrides_says_so() -> None:
    assert "# multirun/default/trial-0 holds no .hydra/overrides.yaml" in study(tables.trials({}), commands=False)


def test_no_text_of_a_record_is_markup() -> None:
    table = tables.trials({"choices.method": [EVIL, "lora"], "config.note": [EVIL]})
    table["run_info.labels"] = ['["' + EVIL + '"]'] * len(table)
    table.loc[0, "run_info.status"] = "failed"
    table["run_info.error.message"] = EVIL
    text = study(table, commands=False)
    assert "<img" not in text
    assert "onerror=alert(1)" in text  # as text it is all there
    assert text.count("</script>") == text.count("<script")


def test_the_warnings_of_a_trial_stand_in_its_panel_as_text() -> None:
    table = tables.trials({"config.method.r": [8, 16]})
    table["run_info.warnings"] = ['["task: 3 of 8 rows <b>lost</b> their end"]', "[]"]
    assert study(table).count("Warning: task: 3 of 8 rows &lt;b&gt;lost&lt;/b&gt; their end.") == 1


def test_the_page_loads_nothing() -> None:
    study(tables.trials({"config.method.r": [8, 16]}))
    text = Path("multirun/default/report.html").read_text(encoding="utf-8")
    assert not re.findall(r'<(?:script|img|iframe|link)[^>]*\s(?:src|href)="?(?!data:)[^">]+', text)


@pytest.mark.parametrize(
    "table",
    [
        tables.trials({}),
        tables.trials({}, statuses={0: "failed"}),
        tables.trials({"choices.method": ["a", "b"]}, statuses={0: "oom", 1: "refused"}),
        tables.trials({"config.method.r": [8, 16]}, evaluations=[]),
    ],
    ids=["one trial", "one failed", "none succeeded", "no score"],
)
def test_a_study_with_nothing_to_compare_has_its_table(table: pd.DataFrame) -> None:
    text = study(table)
    assert 'id="all-trials"' in text
    assert "frontier-plot-0" not in text


def test_a_front_is_drawn_for_each_pair_of_axes_and_shown_for_the_chosen_one() -> None:
    table = pd.DataFrame({"cost": [1.0, 2.0, 3.0, 4.0], "eval_info.t.accuracy.value": [0.1, 0.5, 0.4, 0.9]})
    axes = charts.Axis("cost", "cost", 2.0), charts.Axis("eval_info.t.accuracy.value", "accuracy")
    assert charts._front(table, *axes) == ([0.5, 1.0, 2.0], [0.1, 0.5, 0.9])


def judged(*answers: list[bool], seeds: int = 1) -> tuple[pd.DataFrame, str]:
    """A study of ranks whose first 20 test rows are answered so, and its base before them; the text of its page."""
    folder = Path("multirun/default")
    table = tables.trials({"config.method.r": [8, 16, 32][: len(answers) - 1]}, seeds=seeds)
    names = ["base/tiny-none-0/task-0.jsonl", *(f"{trial}/predictions/task.jsonl" for trial in table["run_info.trial"])]
    for name, right in zip(names, [answers[0], *(of for of in answers[1:] for _ in range(seeds))], strict=True):
        lines = [
            {"prompt": f"{EVIL}{n}", "prediction": f"{yes}{EVIL}", "answer": "", "correct": yes}
            for n, yes in enumerate(right)
        ]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    means = [sum(of) / len(of) for of in answers]
    table["eval_info.task.accuracy.value"] = [mean for mean in means[1:] for _ in range(seeds)]
    table["eval_info.task.base_accuracy.value"], table["eval_info.task.base_predictions"] = means[0], names[0]
    file = page.write(table, tables.steps(table), folder, predictions(folder))
    return table, file.read_text(encoding="utf-8").partition("</head>")[2]


def test_rows_of_any_two_of_base_and_configurations_can_be_compared() -> None:
    base, small, large = [True] * 10 + [False] * 10, [False] * 2 + [True] * 13 + [False] * 5, [True] * 16 + [False] * 4
    _, text = judged(base, small, large)
    (of,) = json.loads(text.partition('id="rows-data">')[2].partition("</script>")[0])
    names = [member["name"] for member in of["members"]]
    assert names == ["lora, r=16", "lora, r=8", "untouched base"]  # the best first
    assert of["start"] == [0, 2]
    assert of["figures"] == [[float(yes) for yes in right] for right in (large, small, base)]
    assert [member["file"] for member in of["members"]][2] == "base/tiny-none-0/task-0.jsonl"
    for first in range(3):
        for second in range(3):
            won = [n for n in range(20) if of["figures"][first][n] > of["figures"][second][n]]
            assert sum(str(n) in of["texts"] for n in won) >= min(len(won), of["each"])
    row, (prompt, _, predictions) = next(iter(of["texts"].items()))
    assert prompt == f"{EVIL}{row}"
    assert len(predictions) == 3


def test_texts_of_rows_are_no_markup_of_the_page() -> None:
    _, text = judged([True, False] * 10, [False, True] * 10, [True] * 20)
    assert "<img" not in text
    assert "onerror=alert(1)" in text
    assert text.count("</script>") == text.count("<script")
    assert "innerHTML" not in page.CHOOSE


def test_without_predictions_no_rows_are_offered() -> None:
    assert "rows-data" not in study(tables.trials({"config.method.r": [8, 16]}))


@pytest.mark.slow
def test_a_browser_without_a_network_sorts_filters_hovers_and_changes_an_axis() -> None:
    api = pytest.importorskip("playwright.sync_api", reason="needs pip install 'peftsweep[browser]'")
    if BROWSER is None:
        pytest.skip("no chromium on this machine")
    judged([True, False] * 10, [False, True] * 10, [True] * 20)
    own_rows = Path("multirun/default/report.html").rename("rows.html").resolve()
    study(tables.trials({"choices.method": ["lora", "ia3", EVIL], "config.method.r": [8, 16, 32]}, seeds=2))
    problems: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        view = browser.new_context(offline=True, viewport={"width": 1300, "height": 900}).new_page()
        view.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        view.on("pageerror", lambda error: problems.append(str(error)))
        view.on("request", lambda request: problems.append(request.url) if _outside(request.url) else None)
        view.set_default_timeout(120_000)
        view.goto(Path("multirun/default/report.html").resolve().as_uri())
        _use_the_table(view)
        _use_the_frontier(view)
        _open_a_trial(view)
        view.screenshot(path="report.png")
        view.goto(own_rows.as_uri())
        _choose_rows(view)
        browser.close()
    assert not problems


def _outside(url: str) -> bool:
    return not url.startswith(("file:", "data:", "blob:"))


def _use_the_table(view: Any) -> None:
    rows = view.locator("#all-trials tbody tr")
    rows.first.wait_for()
    assert rows.count() == 18
    view.locator(".dt-scroll-head th[data-dt-column='5'] .dtcc-button_order").first.click()
    scores = [float(text) for text in view.locator("#all-trials tbody td:nth-child(6)").all_text_contents()]
    assert scores == sorted(scores)
    view.locator(".dt-scroll-head .dtcc-search input").nth(2).fill("ia3")
    view.wait_for_function("document.querySelectorAll('#all-trials tbody tr').length === 6")


def _use_the_frontier(view: Any) -> None:
    plot = view.locator("#frontier-plot-0")
    view.locator("#frontier-plot-0-menu-1").select_option(label="training time (s)")
    view.wait_for_function("document.querySelector('#frontier-plot-0 .xtitle').textContent === 'training time (s)'")
    plot.scroll_into_view_if_needed()
    box = plot.locator(".scatterlayer .points path").first.bounding_box()
    view.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    plot.locator(".hovertext").first.wait_for()
    assert "seeds: 2" in plot.locator(".hovertext").first.text_content()


def _open_a_trial(view: Any) -> None:
    assert view.locator("article.trial:visible").count() == 0
    view.locator("#all-trials tbody a").first.click()
    assert view.locator("article.trial:visible").count() == 1
    assert view.locator("article.trial:visible pre").text_content().startswith("peftsweep method=lora")


def _choose_rows(view: Any) -> None:
    assert "won by lora, r=16: 10 of 20 rows" in view.locator("#rows-shown").text_content()
    view.locator("#rows-first").select_option(label="lora, r=8")
    assert "won by lora, r=8: 10 of 20 rows" in view.locator("#rows-shown").text_content()
    assert "won by untouched base: 10 of 20 rows" in view.locator("#rows-shown").text_content()
    assert EVIL in view.locator("#rows-shown table.texts td").nth(1).text_content()
