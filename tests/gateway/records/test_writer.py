"""The file of a session: what was answered is in it, whatever becomes of the process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from forgejax.chat import ChatFormat
from forgejax.errors import GatewayError
from forgejax.gateway.records.lines import CloseLine, TurnLine, encode_line, pack_runs, unpack_runs
from forgejax.gateway.records.reader import read_session
from tests.gateway.asking import client
from tests.gateway.fakes import TRAINING, ScriptedSampler, started


async def converse(chat_format: ChatFormat, folder: Path, turns: int, *, words: int = 5) -> Path:
    """A conversation of so many turns; its file."""
    gateway = await started(ScriptedSampler(chat_format, *["five<|im_end|>"] * turns), record=str(folder))
    session = gateway.open(TRAINING)
    history: list[dict[str, str]] = []
    async with client(session) as agent:
        for number in range(turns):
            history.append({"role": "user", "content": f"{number} " * words})
            reply = await agent.chat.completions.create(model="m", messages=history)  # type: ignore[arg-type]
            history.append({"role": "assistant", "content": reply.choices[0].message.content or ""})
    await gateway.close(session.id)
    await gateway.stop()
    return folder / f"{session.id}.jsonl"


async def test_a_file_cut_at_any_byte_tells_all_that_came_before(chat_format: ChatFormat, tmp_path: Path) -> None:
    path = await converse(chat_format, tmp_path, turns=2)
    raw = path.read_bytes()
    whole = read_session(path)
    assert not whole.torn and whole.lines[-1] == CloseLine() and len(whole.completions) == 2
    first = raw.index(b"\n") + 1
    for size in (*range(first, first + 40), *range(len(raw) - 400, len(raw)), len(raw)):
        path.write_bytes(raw[:size])
        found = read_session(path)
        ended = raw[:size].count(b"\n") - 1
        assert [encode_line(line) for line in found.lines] == [encode_line(line) for line in whole.lines[:ended]]
        assert found.torn == (not raw[:size].endswith(b"\n"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw.replace(b'"number":0', b'"number":x', 1), r"line 3 cannot be read.*it is damaged"),
        (lambda raw: raw.replace(b'"like":0', b'"like":7', 1), r"line 4 does not fit those before it"),
        (lambda raw: raw.replace(b'"format":1', b'"format":9', 1), r"is of format 9, and this is made for 1"),
        (lambda raw: raw.partition(b"\n")[2], "does not begin as the record of a session does"),
        (lambda raw: b"", "does not begin as the record of a session does"),
    ],
)
async def test_a_damaged_file_is_refused_with_its_line(
    chat_format: ChatFormat, tmp_path: Path, damage: object, words: str
) -> None:
    path = await converse(chat_format, tmp_path, turns=2)
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(GatewayError, match=words):
        read_session(path)


async def test_what_a_history_repeats_is_stored_once(chat_format: ChatFormat, tmp_path: Path) -> None:
    path = await converse(chat_format, tmp_path, turns=9, words=60)
    session = read_session(path)
    lines = path.read_bytes().split(b"\n")
    asks = [len(line) for line in lines if b'"event":"ask"' in line]
    turns = [len(line) for line in lines if b'"event":"turn"' in line]
    assert max(asks) < asks[0] + 200 and max(turns) < turns[0] + 200
    assert len(session.bodies[8]["messages"]) == 17
    assert [line.shared for line in session.lines if isinstance(line, TurnLine)][-1] > 1000


async def test_a_session_that_cannot_be_written_is_served_and_counted(chat_format: ChatFormat, tmp_path: Path) -> None:
    gateway = await started(ScriptedSampler(chat_format, "a<|im_end|>", "b<|im_end|>"), record=str(tmp_path / "gone"))
    (tmp_path / "gone").rmdir()
    session = gateway.open(TRAINING)
    async with client(session) as agent:
        for _ in range(2):
            await agent.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}])
    counts = gateway.metrics.counts()
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert len(turns) == 2 and counts["record_errors"] == 1


async def test_a_folder_that_cannot_be_is_refused_before_anything_is_served(
    chat_format: ChatFormat, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GatewayError, match=r"nothing can be recorded in .*; give another folder"):
        await started(ScriptedSampler(chat_format), record=str(tmp_path / "file" / "folder"))


def test_runs_come_back_as_they_were() -> None:
    for values in ([], [3], [3, 3, 4, 3], [0] * 5):
        packed = pack_runs(np.array(values, np.int32))
        assert unpack_runs(packed).tolist() == values and unpack_runs(packed).dtype == np.int32
    assert pack_runs(np.array([3, 3, 4], np.int32)) == [(3, 2), (4, 1)]
