import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forgejax.errors import ConfigError, StorageFullError
from forgejax.report.sinks import JsonLines, Sinks, TensorBoard
from forgejax.report.sinks.jsonl import METRICS_FILE, read_metrics


def events(folder: Path) -> list[Any]:
    """The events under ``folder``, file by file; each record is length, checksum, bytes, checksum."""
    from tensorboardX.crc32c import crc32c  # noqa: PLC0415
    from tensorboardX.proto.event_pb2 import Event  # noqa: PLC0415

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            body = data[12 : 12 + size]
            (masked,) = struct.unpack("<I", data[12 + size : 16 + size])
            check = crc32c(body)
            assert masked == (((check >> 15) | (check << 17)) + 0xA282EAD8) & 0xFFFFFFFF
            found.append(Event.FromString(body))
            data = data[16 + size :]
    return found


def open_files(run_dir: Path, resumed_step: int | None = None) -> Sinks:
    return Sinks(
        JsonLines(run_dir, resumed_step=resumed_step), TensorBoard(run_dir / "tensorboard", resumed_step=resumed_step)
    )


def test_a_row_is_on_disk_when_write_returns_and_reads_back(tmp_path: Path) -> None:
    writer = open_files(tmp_path)
    writer.write({"step": 1, "reward/outcome": np.float32(0.5), "tokens": np.int64(7)})
    record = json.loads((tmp_path / METRICS_FILE).read_text())
    assert record.items() >= {"step": 1, "reward/outcome": 0.5, "tokens": 7.0}.items()
    (row,) = read_metrics(tmp_path)
    assert row["step"] == 1 and row["reward/outcome"] == 0.5 and row["time"] > 1e9
    writer.close()
    writer.close()


def test_what_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    writer = open_files(tmp_path)
    writer.write({"step": 1, "loss": math.nan, "norm": math.inf, "fine": 1.0})
    writer.close()
    record = json.loads((tmp_path / METRICS_FILE).read_text())
    assert (record["loss"], record["norm"], record["fine"]) == (None, None, 1.0)
    assert record["_nonfinite"] == ["loss", "norm"]
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])


def test_on_resume_later_rows_and_a_torn_line_are_cut_away(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    writer = open_files(tmp_path)
    for step in range(6):
        writer.write({"step": step, "x": step})
    writer.close()
    path.write_bytes(path.read_bytes() + b'{"step": 6, "x": 6')
    lines = JsonLines(tmp_path, resumed_step=3)
    assert (lines.rows_cut, lines.lines_damaged) == (2, 1)
    writer = Sinks(lines)
    writer.write({"step": 4, "x": 40.0})
    writer.close()
    assert [(row["step"], row["x"]) for row in read_metrics(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_whole_last_row_without_its_line_feed_is_kept(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_bytes(b'{"step": 1, "x": 1}\n{"step": 2, "x": 2}')
    writer = open_files(tmp_path, resumed_step=2)
    writer.write({"step": 3, "x": 3})
    writer.close()
    assert [row["x"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_second_row_of_a_step_adds_to_the_first_and_order_does_not_matter(tmp_path: Path) -> None:
    writer = open_files(tmp_path)
    writer.write({"step": 2, "eval/outcome": 0.7})
    writer.write({"step": 1, "loss": 3.0})
    writer.write({"step": 2, "loss": 2.0})
    writer.close()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert (rows[1]["eval/outcome"], rows[1]["loss"]) == (0.7, 2.0)


def test_a_new_run_does_not_write_over_another(tmp_path: Path) -> None:
    writer = open_files(tmp_path)
    writer.write({"step": 1})
    writer.close()
    with pytest.raises(ConfigError, match="already holds 1 rows"):
        open_files(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"x": 1.0}, "without a step"),
        ({"step": 1, "time": 2.0}, r"reserved names \['time'\]"),
        ({"step": 1, "x": "many"}, "metric 'x' is 'many'"),
        ({"step": 1, "x": np.zeros(3)}, "metric 'x'"),
    ],
)
def test_a_row_that_is_none_is_refused_and_nothing_is_written(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    writer = open_files(tmp_path)
    with pytest.raises(ValueError, match=message):
        writer.write(row)
    writer.close()
    assert (tmp_path / METRICS_FILE).read_bytes() == b""


def test_the_same_scalars_are_in_tensorboard_files_that_read_back(tmp_path: Path) -> None:
    writer = open_files(tmp_path)
    writer.write({"step": 1, "loss": 2.5, "reward/outcome": 0.25})
    writer.write({"step": 2, "loss": math.nan})
    seen = [event for event in events(tmp_path / "tensorboard") if event.HasField("summary")]
    writer.close()
    assert [(event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in seen[:1]] == [
        (1, {"loss": 2.5, "reward/outcome": 0.25})
    ]
    assert seen[1].step == 2 and math.isnan(seen[1].summary.value[0].simple_value)


def test_a_resumed_run_has_its_own_event_file_that_voids_the_later_steps(tmp_path: Path) -> None:
    for resumed_step, step in ((None, 5), (3, 4)):
        writer = open_files(tmp_path, resumed_step=resumed_step)
        writer.write({"step": step, "x": step})
        writer.close()
    found = events(tmp_path / "tensorboard")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert [event.file_version for event in found if event.file_version] == ["brain.Event:2"] * 2
    starts = [event for event in found if event.HasField("session_log")]
    assert [(event.step, event.session_log.status) for event in starts] == [(4, 1)]


def test_event_files_stay_in_order_where_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for now, step in ((1_000_000_000.0, 1), (999_913_600.0, 2), (999_913_601.0, 3)):
        monkeypatch.setattr("forgejax.report.sinks.base.time.time", lambda now=now: now)
        writer = open_files(tmp_path, resumed_step=step - 1)
        writer.write({"step": step, "x": step})
        writer.close()
    assert [event.step for event in events(tmp_path / "tensorboard") if event.HasField("summary")] == [1, 2, 3]


def test_a_full_disk_is_one_sentence_and_leaves_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = JsonLines(tmp_path)
    writer = Sinks(lines)
    writer.write({"step": 1, "x": 1.0})
    whole = lines._file

    class Full:
        """Takes ten bytes of a row, then the disk is full."""

        def __init__(self) -> None:
            self.calls = 0

        def write(self, data: bytes) -> int:
            self.calls += 1
            if self.calls > 1:
                raise OSError(28, "No space left on device")
            return whole.write(data[:10])

        def fileno(self) -> int:
            return whole.fileno()

        def truncate(self, size: int) -> int:
            return whole.truncate(size)

    monkeypatch.setattr(lines, "_file", Full())
    with pytest.raises(StorageFullError, match=r"the disk is full .* Free space under"):
        writer.write({"step": 2, "x": 2.0})
    monkeypatch.undo()
    writer.write({"step": 2, "x": 3.0})
    writer.close()
    assert [row["x"] for row in read_metrics(tmp_path)] == [1.0, 3.0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_disk_full_under_tensorboard_raises_and_does_not_hang(tmp_path: Path) -> None:
    events_sink = TensorBoard(tmp_path / "tensorboard")
    writer = Sinks(JsonLines(tmp_path), events_sink)
    writer.write({"step": 0})
    records = events_sink._records
    records._writer.close()
    records._writer = Path("/dev/full").open("wb")  # noqa: SIM115 - closed by the writer under test
    for step in range(1, 30):
        with pytest.raises(StorageFullError, match="tensorboard"):
            writer.write({"step": step})
    with pytest.raises(StorageFullError):
        writer.close()
    assert len(read_metrics(tmp_path)) == 30


def test_a_run_directory_that_is_a_file_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="Choose another run directory"):
        open_files(tmp_path / "run")
    with pytest.raises(ConfigError, match="could not be used"):
        read_metrics(tmp_path)


def test_writing_events_imports_no_tensorflow_and_nothing_before_the_first_row(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from forgejax.report.live.progress import NoProgress
from forgejax.report.sinks import open_sinks
writer = open_sinks(Path({str(tmp_path)!r}), NoProgress())
assert "tensorboardX" not in sys.modules
writer.write({{"step": 1, "x": 1.0}})
assert "tensorboardX" in sys.modules
assert not {{"tensorflow", "jax"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)
