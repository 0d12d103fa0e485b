"""Scalars as TensorBoard event files, without TensorFlow."""

from pathlib import Path
from typing import Any

from forgejax.report.sinks.base import Row
from forgejax.report.storage import storage_errors

_PREFIX = "events.out.tfevents."


class TensorBoard:
    """Writes scalars to an event file of its own under ``folder``; nothing is imported or opened before the first.

    It writes on the caller's thread: tensorboardX's own SummaryWriter hands events to a thread through a bounded queue,
    and when that thread dies of a full disk the caller waits for ever. ``resumed_step`` makes TensorBoard forget what
    earlier files say of later steps. Raises StorageFullError and ConfigError.
    """

    def __init__(self, folder: Path, *, resumed_step: int | None = None) -> None:
        self._folder = folder
        self._resumed_step = resumed_step
        self._records: Any = None

    def write(self, row: Row) -> None:
        """Adds one event with all of the row; it is in the file when this returns."""
        # Imported late: a tenth of a second, and more where tensorboardX finds torch to import.
        from tensorboardX.proto.event_pb2 import Event  # noqa: PLC0415
        from tensorboardX.proto.summary_pb2 import Summary  # noqa: PLC0415

        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.values.items()]
        event = Event(wall_time=row.at, step=row.step, summary=Summary(value=values))
        with storage_errors(self._folder):
            if self._records is None:
                self._records = self._open(row.at)
            self._records.write(event.SerializeToString())
            self._records.flush()

    def close(self) -> None:
        """Closes the file. Idempotent."""
        records, self._records = self._records, None
        if records is not None:
            with storage_errors(self._folder):
                records.close()

    def _open(self, wall_time: float) -> Any:
        from tensorboardX import RecordWriter  # noqa: PLC0415
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: PLC0415

        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in order of name, and the clock may have been set back since the last one was made.
        # The count keeps two of the same second apart.
        names = [path.name for path in self._folder.iterdir() if path.name.startswith(_PREFIX)]
        stamps = [name.removeprefix(_PREFIX).split(".")[0] for name in names]
        stamp = max([int(wall_time), *(int(each) for each in stamps if each.isdecimal())])
        records = RecordWriter(str(self._folder / f"{_PREFIX}{stamp:010d}.{len(names):04d}"))
        records.write(Event(wall_time=wall_time, file_version="brain.Event:2").SerializeToString())
        if self._resumed_step is not None:
            start = SessionLog(status=SessionLog.START)
            records.write(
                Event(wall_time=wall_time, step=self._resumed_step + 1, session_log=start).SerializeToString()
            )
        return records
