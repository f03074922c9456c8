"""The wheel holds all that a checkout does."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Without isolation, as the build backend is among the pinned development tools: nothing is downloaded.
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_carries_conf_the_launcher_and_the_embedded_model(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    conf = {f"peftsweep/conf/{file.relative_to(ROOT / 'conf')}" for file in (ROOT / "conf").rglob("*.yaml")}
    code = {str(file.relative_to(ROOT / "src")) for file in (ROOT / "src").rglob("*.py")}
    weights = {f"peftsweep/tiny/weights/{name}" for name in ("model.safetensors", "tokenizer.json", "config.json")}
    assert conf | code | weights <= held


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["method.r=16", "--cfg", "job"], "  r: 16\n"),
        pytest.param(
            ["method.r=8,16", "dry_run=true"], "2 trials, 2 new; nothing was trained", marks=pytest.mark.slow
        ),  # imports torch
    ],
)
def test_the_installed_wheel_composes_and_lists_a_sweep(
    words: list[str], line: str, wheel: Path, tmp_path: Path
) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    # -S and -P keep the checkout out; the dependencies are those of this environment.
    site = next(path for path in sys.path if path.endswith("site-packages"))
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path / 'site')!r}]; sys.path.append({site!r})\n"
        "import peftsweep; assert 'site/peftsweep' in peftsweep.__file__, peftsweep.__file__\n"
        f"from peftsweep import cli; sys.argv = ['peftsweep', 'quant=4bit', *{words}]\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert line in done.stdout
