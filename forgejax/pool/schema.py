"""The tables of the journal, and the one place that knows which database they are in."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from forgejax.errors import ConfigError, DamagedJournalError, PoolError, StorageFullError

VERSION = 3
WRITES = "forgejax_writes"  # the execution option of a connection that will write
_LOCK_TIMEOUT_S = 30.0

tables = sa.MetaData()
fence = sa.Table(
    "run",  # one row: who may write
    tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("schema", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("forgotten_before", sa.Integer, nullable=False),
)
groups = sa.Table(
    "groups",  # the newest attempt of each group
    tables,
    sa.Column("index", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("taken_before", sa.BigInteger, nullable=False),
    sa.Column("sampled_tokens", sa.BigInteger, nullable=False),
    sa.Column("task_id", sa.Text),
    sa.Column("reason", sa.Text),
    sa.Column("payload", sa.LargeBinary),
)
consumption = sa.Table(
    "consumption",  # append-only but for the mark that a resume voids a row
    tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("index", sa.BigInteger, nullable=False),
    sa.Column("run_attempt", sa.Integer, nullable=False),
    sa.Column("step", sa.Integer, nullable=False, index=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("reason", sa.Text),
    sa.Column("untrained", sa.JSON, nullable=False),
    sa.Column("disorder", sa.Integer, nullable=False),
    sa.Column("lag", sa.Integer, nullable=False),
    sa.Column("voided_by", sa.Integer),
)
# The database itself refuses to consume a group twice within one lineage.
sa.Index(
    "one_live_consumption",
    consumption.c.index,
    unique=True,
    sqlite_where=consumption.c.voided_by.is_(None),
    postgresql_where=consumption.c.voided_by.is_(None),
)
untrained_tokens = sa.Table(
    "untrained_tokens",  # sampled outside any finished group; the owner is what the engines' records name them with
    tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("run_attempt", sa.Integer, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("owner", "reason"),
)


def sqlite_url(path: Path) -> str:
    """The journal URL of a SQLite file."""
    return f"sqlite:///{path.absolute()}"


def connect(url: str) -> Engine:
    """The engine for a SQLAlchemy URL; nothing is opened yet. Raises ConfigError for a URL that cannot be used."""
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() != "sqlite":
            return sa.create_engine(parsed)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigError(f"journal URL {url!r}: {error}; expected one like sqlite:////path/to/pool.sqlite") from error
    return _sqlite_engine(parsed)


def _sqlite_engine(url: sa.URL) -> Engine:
    """Everything that holds for SQLite alone.

    Write-ahead logging lets a report read while a run writes. ``synchronous=FULL`` syncs the log at each commit: with
    NORMAL a power cut could take back groups already accepted. WAL needs a local disk, not a network file system.
    """
    if url.database in (None, "", ":memory:"):
        raise ConfigError(
            "a journal in memory would not survive a crash; expected a file: sqlite:////path/to/pool.sqlite"
        )
    engine = sa.create_engine(url, connect_args={"timeout": _LOCK_TIMEOUT_S})

    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver must not begin transactions of its own
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes the write lock before it reads the fence: nobody can move the fence in between.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(WRITES) else "BEGIN")

    return engine


def write_payload(connection: Connection, index: int, payload: bytes) -> None:
    """Puts its bytes into a group's row.

    They are megabytes, and SQLite copies a value it is given while no other thread of Python may run: up to 10 ms for
    4 MB where memory is contended. What is written into a blob is copied without that.
    """
    value = sa.func.zeroblob(len(payload)) if _is_sqlite(connection) else payload
    connection.execute(sa.update(groups).where(groups.c.index == index).values(payload=value))
    if _is_sqlite(connection) and payload:
        with _driver(connection).blobopen(groups.name, groups.c.payload.name, index) as blob:
            blob.write(payload)


def read_payload(connection: Connection, index: int) -> bytes | None:
    """The bytes of a group, as ``write_payload`` writes them; None where there are none."""
    if not _is_sqlite(connection):
        data = connection.scalar(sa.select(groups.c.payload).where(groups.c.index == index))
        return None if data is None else bytes(data)
    if connection.scalar(sa.select(sa.func.length(groups.c.payload)).where(groups.c.index == index)) is None:
        return None
    with _driver(connection).blobopen(groups.name, groups.c.payload.name, index, readonly=True) as blob:
        return blob.read()


def _is_sqlite(connection: Connection) -> bool:
    return connection.dialect.name == "sqlite"


def _driver(connection: Connection) -> sqlite3.Connection:
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    return driver


@contextmanager
def errors() -> Iterator[None]:
    """Turns a failure of the database into a sentence."""
    try:
        yield
    except DBAPIError as error:
        text = str(error.orig)
        raise _word_failure(text, getattr(error.orig, "sqlstate", "")) from error
    except sqlite3.Error as error:  # of the driver itself, where a blob is open
        raise _word_failure(str(error), "") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _storage_full(str(error)) from error


def _word_failure(text: str, sqlstate: str) -> PoolError:
    if "disk is full" in text or "No space left" in text or sqlstate == "53100":
        return _storage_full(text)
    if "malformed" in text or "not a database" in text or sqlstate == "XX001":
        return DamagedJournalError(
            f"the journal is damaged ({text}): put back a copy of it that is not older than the newest checkpoint, "
            "or start a new run; the weights in the checkpoints are not touched by this"
        )
    return PoolError(f"the journal cannot be used: {text}")


def _storage_full(text: str) -> StorageFullError:
    return StorageFullError(
        f"the journal cannot grow ({text}); nothing accepted before is lost: "
        "free space on its disk, then resume the run"
    )
