"""`peftsweep-doctor` says what this machine can do; `--version` the versions, without importing what they are of."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from peftsweep import doctor
from peftsweep.data import hub
from peftsweep.models.quantised import libraries
from peftsweep.observe import streams

NAMES = ["packages", "system", "devices", "precision", "quantisation", "kernels", "memory", "disk", "hub", "extras"]


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["peftsweep-doctor", *words])
    monkeypatch.setattr(streams, "settle", lambda: None)  # capsys has the streams
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    return int(ended.value.code or 0), capsys.readouterr().out


def test_ten_lines_say_what_the_machine_can_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as if it had been set before the import
    hub.problem.cache_clear()
    code, output = run(capsys, monkeypatch)
    lines = output.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines] == NAMES
    assert f"torch {importlib.metadata.version('torch')}" in lines[0]
    assert "no CUDA device" in lines[2]
    assert "trials run on the CPU" in lines[2]
    assert "quant=4bit,8bit" in lines[4]
    assert "; not fp8: needs a GPU" in lines[4]
    assert "HF_HUB_OFFLINE=1 is set" in lines[8]


def test_json_holds_the_same_and_a_missing_package_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "CHECKS", (doctor._packages, doctor._extras))
    code, output = run(capsys, monkeypatch, "--json")
    found: dict[str, Any] = json.loads(output)
    assert (code, found["ok"]) == (1, False)
    assert found["checks"]["packages"]["fix"].startswith("missing: peft; ")
    assert set(found["checks"]["extras"]["facts"]) == {"present", "missing"}


def test_a_missing_extra_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_is_installed", lambda name: not name.startswith(("wandb", "mlflow")))
    fix = doctor._extras().fix
    assert fix is not None
    assert fix.endswith("pip install 'peftsweep[mlflow,wandb]'")


def test_options_of_quant_are_named_with_what_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "is_installed", lambda module: module == "torchao")
    found = doctor._other_quants(gpus=0)
    assert [name for name, reason in found.items() if reason is None] == ["fp8_torchao", "int8_torchao"]
    assert str(found["int8_quanto"]).endswith("pip install 'peftsweep[quanto]'")
    assert "for inference only" in str(found["int4_torchao"])
    assert str(doctor._other_quants(gpus=1)["fp8"]).endswith("pip install 'kernels'")


def test_a_check_that_breaks_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def _kernels() -> doctor.Finding:
        raise OSError("libcudart.so.12: cannot open")

    found = doctor._finding_of(_kernels)
    assert (found.name, found.fatal) == ("kernels", False)
    assert "libcudart.so.12" in str(found)


def test_the_limit_of_a_container_counts_as_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    assert doctor._within_container(80, 100) == (80, 100)
    (tmp_path / "memory.max").write_text("50\n")
    (tmp_path / "memory.current").write_text("20\n")
    assert doctor._within_container(80, 100) == (30, 50)
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor._within_container(80, 100) == (80, 100)


def test_the_version_names_all_that_matter_and_the_cuda_that_torch_is_built_for() -> None:
    output = doctor.version_text()
    assert output.startswith("peftsweep 0.")
    assert f"torch {importlib.metadata.version('torch')}" in output
    assert output.endswith(f"CUDA {torch.version.cuda or 'none'}")


def test_a_cache_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/dev/null/hub")
    found = doctor._disk()
    assert (found.fatal, found.facts["cache_writable"]) == (False, False)
    assert str(found.fix) == (
        "the cache cannot be written (see /dev/null), so nothing can be downloaded: HF_HOME=FOLDER moves it"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "hub")  # of an empty HF_HOME, below the folder of the command
    assert doctor._disk().facts["cache_writable"]
