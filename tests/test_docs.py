"""The documentation: links lead somewhere, commands are understood, and the reference is what the source says."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

import peftsweep
from peftsweep import cli, command_line, errors, reference_pages
from peftsweep.config import fill
from peftsweep.data import prepare
from peftsweep.reference import keys as reference
from peftsweep.reference import meanings
from peftsweep.study import record
from peftsweep.study.record import Result
from peftsweep.use import chat_with, show_rows

TOP = Path(__file__).parents[1]
DOCS = TOP / "docs"
PAGES = sorted([*TOP.glob("*.md"), *DOCS.rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
SHORTHAND = importlib.util.find_spec("peftsweep.shorthand") is not None  # reads model=PATH and dataset=FILE
STANDS_FOR = {  # what the pages leave to the reader
    "model.name_or_path=DIR_OR_HUB_ID": "model.name_or_path=tiny",
    "model=PATH": "model=tiny",
    "hydra.launcher.ray.init.address=IP:PORT": "hydra.launcher.ray.init.address=auto",
}
NEEDS_FILES = ("TRIAL", "DIR", "--config-dir", "train.jsonl", "boolq.jsonl", "hydra/launcher=", "hydra/sweeper=")


# ---- links -------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The names that a page's headings are linked by, as on the repository's pages."""
    found = set()
    for line in re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S).splitlines():
        if line.startswith("#"):
            title = re.sub(r"[`*]", "", line.lstrip("#").strip().lower())
            found.add(re.sub(r"[^\w\- ]", "", title).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(TOP).as_posix())
def test_every_link_leads_to_a_file_and_a_heading_that_there_are(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
    broken = []
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_is_in_the_navigation() -> None:
    def files(entry: Any) -> Iterator[str]:
        for one in entry if isinstance(entry, list) else entry.values() if isinstance(entry, dict) else []:
            yield from [one] if isinstance(one, str) else files(one)

    listed = sorted(files(yaml.safe_load((TOP / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert listed == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_readme_is_short() -> None:
    assert len((TOP / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.slow
def test_the_site_is_built_without_network_and_complaint() -> None:
    built = subprocess.run(
        [Path(sys.executable).parent / "zensical", "build", "--strict", "--clean"],
        cwd=TOP,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert (TOP / "site" / "howto" / "pack.html").is_file()


# ---- commands ----------------------------------------------------------------------------------------


def commands() -> list[tuple[str, str]]:
    """(page, command) of each line of code that begins with one of the commands."""
    found = []
    for page in PAGES:
        if "reference" in page.parts or page.name in ("checked.md", "methods.md", "tested_on.md", "CHANGELOG.md"):
            continue
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            if re.match(r" {4,}(\.venv/bin/)?peftsweep", line):
                found.append((page.relative_to(TOP).as_posix(), line.strip().removeprefix(".venv/bin/")))
    return found


def in_words(command: str) -> list[str]:
    """The words of a command, with something for what the page leaves to the reader."""
    words = shlex.split(re.sub(r"\s{2,}# .*$", "", command))
    if SHORTHAND is False:
        STANDS_FOR["dataset=rows.jsonl"] = "dataset=tiny_math"
    return [STANDS_FOR.get(word, word) for word in words if word != "-m"]


def first_point(words: list[str]) -> list[str]:
    """Of each swept key the first value."""
    parser = OverridesParser.create()
    found = []
    for word in words:
        one = parser.parse_overrides([word])[0] if "=" in word else None
        if one is not None and one.is_sweep_override():
            value = "lora" if "glob" in word else next(iter(one.sweep_string_iterator()))
            word = f"{one.get_key_element()}={value}"
        found.append(word)
    return found


def rows_of_the_pages() -> None:
    """The files that commands on the pages name."""
    turns = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(20))
    )
    Path("conversations.jsonl").write_text(json.dumps(turns) + "\n" + json.dumps(turns) + "\n")


def checked(words: list[str]) -> list[str]:
    """The words as the command checks them before they are composed."""
    expand = vars(cli).get("_checked", lambda given: command_line.checked(given, Path(fill.conf_dir())))
    return list(expand(words))


def test_there_are_commands_on_the_pages() -> None:
    assert len(commands()) > 40


def test_every_command_on_the_pages_is_understood() -> None:
    """Its options are known, and the words of `peftsweep` are read and compose; files are not looked at."""
    rows_of_the_pages()
    scripts = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["scripts"]
    for page, command in commands():
        name, *words = in_words(command)
        if name == "peftsweep-collect":
            cli.collect_parser().parse_args(words)
        elif name == "peftsweep-data" and words[0] == "show":
            show_rows.parser().parse_intermixed_args(words[1:])
        elif name == "peftsweep-chat":
            chat_with.parser().parse_intermixed_args(words)
        elif name == "peftsweep-data":
            cli.data_parser(prepare.FORMATS).parse_args(words)
        elif name == "peftsweep":
            checked(words)
        else:
            assert name in {*scripts, "peftsweep-doctor"}, page


POINTS = [
    (page, command)
    for page, command in commands()
    if command.startswith("peftsweep ") and not any(part in command for part in NEEDS_FILES)
]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), POINTS, ids=lambda value: value[:60])
def test_every_command_on_the_pages_describes_trials(page: str, command: str) -> None:
    rows_of_the_pages()
    words = [word for word in in_words(command)[1:] if not word.startswith("hydra.launcher")]
    points = first_point(words)
    if any("=" not in word for word in points) or any(word.startswith(("sweep=", "method=from")) for word in points):
        pytest.skip("no point of its own")
    cli._trial("device=cpu", *points)


# ---- the reference -----------------------------------------------------------------------------------


def pinned(name: str) -> str | None:
    found = re.search(rf"^{name}==(.*)$", (TOP / "constraints.txt").read_text(), re.M)
    return found[1] if found else None


@pytest.mark.parametrize("page", ["keys", "options", "method_keys", "columns", "commands", "python"])
def test_the_reference_is_what_the_source_says(page: str, pages: dict[str, str]) -> None:
    if page in ("keys", "method_keys"):
        for library in ("peft", "transformers"):
            if (record.package(library) or {}).get("version") != pinned(library):
                pytest.skip(f"{library} is not of the version that the page is written with")
    assert (DOCS / "reference" / f"{page}.md").read_text(encoding="utf-8") == pages[f"{page}.md"], "make reference"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return reference_pages.pages()


def test_llms_txt_lists_the_pages() -> None:
    assert (TOP / "llms.txt").read_text(encoding="utf-8") == reference_pages.llms(TOP), "make reference"


def test_every_key_option_and_public_name_has_a_sentence() -> None:
    keys = [*reference.schema_keys(), *reference.rows_keys()]
    for group in (*reference.CALLED, *reference.OPEN_SECTIONS):
        keys += [key for found in reference.section_keys(group).values() for key in found]
    for group in ("hydra/launcher", "hydra/sweeper"):
        keys += [key for found in reference.hydra_keys(group).values() for key in found]
    keys += [key for _, found in reference.method_keys().values() for key in found]
    assert [key.name for key in keys if not key.sentence] == []
    options = [
        (group, name)
        for group in reference.groups()
        for name, meaning in reference.options(group).items()
        if not meaning
    ]
    assert options == []
    names = {name: reference_pages.public_names(module) for name, module in reference_pages.public_modules().items()}
    assert [(name, own) for name, found in names.items() for own, meaning in found.items() if not meaning] == []
    assert all(getattr(peftsweep, name).__doc__ for name in peftsweep.__all__)


def test_a_key_is_explained_with_type_range_and_default() -> None:
    explanation = reference.explain("train.batch_size")
    assert explanation.startswith("train.batch_size: int, at least 1 and at most 2147483647; default 16")
    assert "rows of a micro-batch" in explanation
    assert "Lora attention dimension" in reference.explain("method.r", "lora")
    assert reference.explain("eval.gsm8k.samples").startswith("eval.<name>.samples: int or null, at least 1")
    assert "qlora" in reference.explain("method").lower()
    with pytest.raises(errors.InputError, match=r"did you mean 'train\.batch_size'"):
        reference.explain("train.batchsize")
    with pytest.raises(errors.InputError, match=r"did you mean 'eval\.gsm8k\.samples'"):
        reference.explain("eval.gsm8k.sampels")
    with pytest.raises(errors.InputError, match=r"there are: study, .*dataset, eval, train,") as refused:
        reference.explain("nokey")
    assert "train." not in str(refused.value)


@pytest.mark.parametrize(
    ("word", "begins", "holds"),
    [
        ("eval.perplexity", "eval=perplexity: Perplexity of the answers", "eval.perplexity.samples: int or null"),
        ("method=ia3,lora", "method=ia3: (IA)^3", "method.init_ia3_weights: bool"),
        ("4bit", "quant=4bit: NF4", "quant.load_in_4bit: ; default true"),
        ("tiny_math", "dataset=tiny_math: Stories", "\neval=tiny_math: Greedy generation"),
        ("launcher", "hydra/launcher=local: Warm worker", "hydra.launcher.workers"),
        ("sweep=tune", "sweep=tune: Which learning rate", ""),
        ("train.steps=5", "train.steps: int, at least 0", ""),
        *(  # options of other groups by their names alone, which are found as 4bit is
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("perplexity", "eval=perplexity: Perplexity of the answers", "eval.perplexity.samples: int or null"),
                ("lora", "method=lora: LoRA", "method.r: int, at least 1"),
                ("quick", "train=quick: A short run", "peftsweep --help train"),
                ("slurm", "hydra/launcher=slurm: One SLURM job", "hydra.launcher.partition"),
            )
        ),
    ],
)
def test_an_option_is_explained_with_its_keys_however_it_is_named(word: str, begins: str, holds: str) -> None:
    explanation = reference.explain(word)
    assert explanation.startswith(begins)
    assert holds in explanation
    assert "method.peft_type" not in explanation  # which an option decides, not a user


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lroa", "lora"),
        pytest.param("perplexty", "perplexity", marks=pytest.mark.slow),  # an option, as the one above
        ("method=lroa", "lora"),
        ("metod", "method"),
    ],
)
def test_a_word_that_is_misspelled_names_the_one_that_is_meant(word: str, meant: str) -> None:
    with pytest.raises(errors.InputError, match=f"^{word}: no such .*; did you mean '{meant}'"):
        reference.explain(word)


def test_an_option_of_one_s_own_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("# What I made.\ndefaults: [lora]\nmethod: {r: 3}\n")
    for words in (["mine"], ["method=mine"], ["method.mine"]):
        monkeypatch.setattr("sys.argv", ["peftsweep", "--config-dir", str(tmp_path), "--help", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert (ended.value.code, capsys.readouterr().out.splitlines()[0]) == (0, "method=mine: What I made.")


def test_every_exit_code_has_a_sentence() -> None:
    source = Path(cli.__file__).read_text(encoding="utf-8")
    returned = {int(code) for code in re.findall(r"(?:return|code =) (\d+)\b", source)} | {cli.NOT_RUN}
    assert returned == set(errors.EXIT_CODES)


def columns(result: Result) -> list[str]:
    assert result.folder is not None
    return list(record.flat(record.read_json(result.folder / record.RESULT, {"schema_version": int})))


@pytest.mark.usefixtures("memory_foreseen")
def test_every_column_of_a_record_has_a_sentence(run_small: Any) -> None:
    result = run_small("adapter.check=true")
    assert [column for column in columns(result) if not meanings.matches(column, meanings.COLUMNS)] == []
    steps = {key for row in record.read_lines(result.folder / record.STEPS) for key in row}
    assert [key for key in steps if not meanings.matches(key, meanings.STEPS)] == []
    lines = [row for file in (result.folder / "predictions").glob("*.jsonl") for row in record.read_lines(file)]
    assert [key for row in lines for key in row if not meanings.matches(key, meanings.PREDICTIONS)] == []


@pytest.mark.slow
@pytest.mark.usefixtures("memory_foreseen")
def test_every_column_of_a_record_with_all_that_can_be_measured_has_a_sentence(run_small: Any) -> None:
    words = ["inference=standard", "inference.samples=1", "inference.runs=2", "inference.batch_sizes=[1]"]
    words += ["inference.categories={short: {new_tokens: 4}, medium: null, long: null}", "profiler=torch"]
    words += ["profiler.sizes=[64]", "adapter.check=true", "adapter.merge=true", "quant=4bit", "train.compile=eager"]
    assert [column for column in columns(run_small(*words)) if not meanings.matches(column, meanings.COLUMNS)] == []


def test_help_of_a_key_is_printed_and_of_no_key_is_one_line(command: Any) -> None:
    code, out, err = command("--help", "method.r", "method=ia3", "hydra.launcher.timeout")
    assert (code, out) == (2, "")
    assert err.startswith("peftsweep: method.r: no such key, group or option; ")
    assert err.count("\n") == 1
    code, out, err = command("--help", "hydra.launcher.timeout", "quant")
    assert (code, err) == (0, "")
    assert "longest time of a trial: 90s, 30m, 2h" in out
    assert "quant=4bit: NF4 with double quantisation" in out
