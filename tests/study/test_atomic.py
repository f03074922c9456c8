"""Files that are whole or not there."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from safetensors import SafetensorError

from peftsweep.analysis.table import table
from peftsweep.observe.display import Observer
from peftsweep.study import atomic, record, store
from peftsweep.study.atomic import replacing
from peftsweep.trial import outcome


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o002, 0o664), (0o022, 0o644)])
def test_who_may_read_a_file_is_for_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        record.write_json(tmp_path / "result.json", {})
        table.write_parquet(pd.DataFrame({"a": [1]}), tmp_path / "results.parquet")
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {
        "result.json": mode,
        "results.parquet": mode,
    }


def test_writers_of_one_file_at_once_leave_what_one_of_them_wrote(tmp_path: Path) -> None:
    file, texts = tmp_path / "RESULTS.md", [letter * 20_000 for letter in "abcd"]
    writers = [threading.Thread(target=record.write_text, args=(file, text)) for text in texts * 8]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert file.read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(("times", "ends"), [(2, True), (3, False)])
def test_what_a_network_s_disk_gets_over_is_tried_again(
    times: int, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "PAUSES", (0.0, 0.0))
    left, real = iter(range(times)), atomic.sync

    def stale(path: Path) -> None:
        if next(left, None) is not None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        real(path)

    monkeypatch.setattr(atomic, "sync", stale)
    file = tmp_path / "x.json"
    if ends:
        record.write_json(file, {})
        assert file.read_text() == "{}\n"
        return
    with pytest.raises(OSError, match="Stale"):
        record.write_json(file, {})
    assert not list(tmp_path.iterdir())


KILLED_WRITER = """
import os, sys
from pathlib import Path
from peftsweep.study import atomic
with atomic.replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os._exit(9)
"""


def test_what_killed_writers_left_is_deleted_and_nothing_of_the_living(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path / "trial" / "result.json")], check=False)
    (orphan,) = (tmp_path / "trial").iterdir()
    elsewhere = orphan.with_name(".plan.json.1-1-ffffffff.12345678.partial")  # of a machine that is not this one
    elsewhere.write_text("")
    (user := tmp_path / "notes.partial").write_text("")
    with atomic.replacing(tmp_path / "plan.json") as mine:
        mine.write_text("whole")
        atomic.remove_partials(tmp_path)
    assert (tmp_path / "plan.json").read_text() == "whole"
    assert not orphan.exists()
    assert elsewhere.exists()
    os.utime(elsewhere, (0, 0))
    atomic.remove_partials(tmp_path)
    assert not elsewhere.exists()
    assert user.exists()
    (own := tmp_path / "trial" / ".x.partial").write_text("")
    atomic.remove_partials(tmp_path / "trial", own=True)
    assert not own.exists()


def test_a_writer_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("old")

    def fail() -> None:
        with replacing(file) as temporary:
            temporary.write_text("new")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        fail()
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_row_that_could_not_be_flushed_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "PAUSES", (0.0, 0.0))

    class Stale(io.FileIO):
        tries = 0

        def write(self, data: Any) -> int:
            Stale.tries += 1
            if Stale.tries <= 2:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return super().write(data)

    with io.TextIOWrapper(io.BufferedWriter(Stale(tmp_path / "steps.jsonl", "w"))) as lines:
        outcome.log_step(lines, Observer(), {"step": 1})
        assert record.read_lines(tmp_path / "steps.jsonl") == [{"step": 1}]
    assert record.read_lines(tmp_path / "steps.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EFBIG, errno.EACCES, errno.ENOSPC])
def test_what_safetensors_says_of_a_disk_is_the_line_of_a_full_one(code: int) -> None:
    message = f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"
    assert os.strerror(code) in str(store.unwritable(SafetensorError(message)))
    assert store.unwritable(SafetensorError(f"Error while deserializing header (os error {errno.EIO + 1000})")) is None


def test_a_study_that_is_a_link_to_another_disk_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    store.ROOT.mkdir()
    (store.ROOT / "linked").symlink_to(tmp_path / "disk", target_is_directory=True)
    for code in (errno.EACCES, errno.ESTALE):
        file = store.ROOT / "linked" / "trial" / "result.json"
        line = f"{file}: {os.strerror(code)}; finished trials are kept, the same command continues"
        assert str(store.unwritable(OSError(code, os.strerror(code), str(file)))) == line
        assert store.unwritable(OSError(code, os.strerror(code), str(tmp_path / "disk" / "other"))) is None


def test_the_error_that_is_told_is_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full and cannot delete either is a full disk."""

    def fails(code: int) -> Any:
        def failing(path: Path, **_: Any) -> None:
            raise OSError(code, os.strerror(code), str(path))

        return failing

    monkeypatch.setattr(atomic, "sync", fails(errno.ENOSPC))
    monkeypatch.setattr(Path, "unlink", fails(errno.EROFS))
    with pytest.raises(OSError, match="No space left"):
        record.write_text(tmp_path / "result.json", "{}")
