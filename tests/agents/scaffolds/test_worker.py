"""The worker-pool scaffold, on real processes."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from forgejax.agents import AgentConfig, AgentResult, WorkerScaffold
from forgejax.errors import AgentError
from forgejax.types import StopReason
from tests.agents.fakes import make_episode, python_agent

LOOP = """
import json, os, sys, time
print(json.dumps({"ready": True}))
for line in sys.stdin:
    request = json.loads(line)
    question = request["question"]
    reply = {"id": request["id"], "answer": question[::-1]}
"""


@asynccontextmanager
async def started(config: AgentConfig) -> AsyncIterator[WorkerScaffold]:
    scaffold = WorkerScaffold(config)
    await scaffold.start()
    try:
        yield scaffold
    finally:
        await scaffold.close()


async def test_many_episodes_run_at_once_and_each_gets_its_own_answer() -> None:
    source = LOOP.replace(
        "for line in sys.stdin", "lines = [sys.stdin.readline() for _ in range(20)]\nfor line in lines[::-1]"
    )
    async with started(python_agent(source + "    print(json.dumps(reply))\n")) as scaffold:
        episodes = [make_episode(f"e{i}", f"q{i}") for i in range(20)]
        results = await asyncio.gather(*(scaffold.run(episode) for episode in episodes))
    assert [result.answer for result in results] == [f"q{i}"[::-1] for i in range(20)]


async def test_episodes_are_spread_over_the_workers() -> None:
    source = LOOP + "    time.sleep(0.05); reply['answer'] = str(os.getpid()); print(json.dumps(reply))\n"
    async with started(python_agent(source, workers=2)) as scaffold:
        results = await asyncio.gather(*(scaffold.run(make_episode(f"e{i}")) for i in range(4)))
    assert sorted([result.answer for result in results].count(r.answer) for r in results) == [2, 2, 2, 2]


async def test_a_reported_error_is_a_failed_agent_unless_it_says_what_else() -> None:
    source = LOOP + "    print(json.dumps({'id': request['id'], 'error': 'boom', 'stop_reason': question}))\n"
    async with started(python_agent(source)) as scaffold:
        failed = await scaffold.run(make_episode("a", "whatever"))
        environment = await scaffold.run(make_episode("b", "environment_failed"))
        truncated = await scaffold.run(make_episode("c", "truncated"))
    assert failed.stop_reason is StopReason.AGENT_FAILED
    assert str(failed.error).startswith("agent worker '") and str(failed.error).endswith(" reports: boom")
    assert environment.stop_reason is StopReason.ENVIRONMENT_FAILED
    assert truncated.stop_reason is StopReason.TRUNCATED


async def test_a_line_that_is_no_json_or_names_an_unknown_id_is_reported_and_harms_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = LOOP + "    print('debug!'); print('[1]'); print('{\"id\": \"x\"}'); print(json.dumps(reply))\n"
    with caplog.at_level(logging.WARNING, "forgejax.agents"):
        async with started(python_agent(source)) as scaffold:
            for number in range(5):
                assert (await scaffold.run(make_episode(f"e{number}", "ab"))).answer == "ba"
    assert "no JSON object: b'debug!" in caplog.text
    assert "unknown id" in caplog.text
    assert len(caplog.records) == 5  # further ones are not reported


async def test_an_answer_that_is_no_text_is_a_failed_agent() -> None:
    answers = ("[{'x': 17}]", "float('nan')", "['x'] * 100_000")
    for answer in answers:
        source = LOOP + f"    reply['answer'] = {answer}; print(json.dumps(reply))\n"
        async with started(python_agent(source)) as scaffold:
            result = await scaffold.run(make_episode())
        assert result.stop_reason is StopReason.AGENT_FAILED
        assert 'expected "answer" with a string or null, or "error"' in str(result.error)
        assert len(str(result.error)) < 1000


async def test_odd_lines_of_a_worker_harm_nobody() -> None:
    odd = [
        "reply['answer'] = chr(0xD800) + question; print(json.dumps(reply))",
        """print(json.dumps({'ready': True})); print(json.dumps(reply)); print(json.dumps(reply))""",
        """reply = {'id': request['id'], 'error': 'x', 'stop_reason': ['truncated']}; print(json.dumps(reply))""",
    ]
    results = []
    for line in odd:
        async with started(python_agent(f"{LOOP}    {line}\n")) as scaffold:
            results.append(await scaffold.run(make_episode(question="ab")))
    surrogates, twice, error = results
    assert surrogates.answer == "\ud800ab" and twice.answer == "ba"
    assert error.stop_reason is StopReason.AGENT_FAILED and str(error.error).endswith("reports: x")


async def test_a_worker_that_dies_is_one_accident_for_its_open_episodes_and_is_restarted() -> None:
    source = (
        LOOP
        + "    if question == 'die': sys.exit('out of luck')\n    if question != 'wait': print(json.dumps(reply))\n"
    )
    async with started(python_agent(source)) as scaffold:
        waiting = asyncio.create_task(scaffold.run(make_episode("w", "wait")))
        await asyncio.sleep(0)
        died = await scaffold.run(make_episode("d", "die"))
        assert (died.stop_reason, died.accident) == (StopReason.ENVIRONMENT_FAILED, True)
        assert "out of luck" in str(died.error)
        assert await waiting == died
        restarted_at = time.monotonic()
        after = await scaffold.run(make_episode("n", "ab"))
        assert after.answer == "ba" and after.began_at is not None and after.began_at > restarted_at
        assert await scaffold.run(make_episode("m", "ab")) == AgentResult(answer="ba")
        scaffold.check()


async def test_an_episode_that_waits_in_vain_for_its_worker_is_cut_off_and_not_late(tmp_path: Path) -> None:
    source = "import os, sys, time\nif os.path.exists(mark := sys.argv[1]): time.sleep(60)\nopen(mark, 'w')" + LOOP
    config = python_agent(source + "    sys.exit(1)\n")
    async with started(replace(config, command=(*config.command, str(tmp_path / "mark")))) as scaffold:
        assert (await scaffold.run(make_episode("d"))).accident
        waited = await scaffold.run(make_episode("w", deadline_s=0.2))
    assert (waited.stop_reason, waited.accident) == (StopReason.ENVIRONMENT_FAILED, True)
    assert "in which it waited for its worker to be started again" in str(waited.error)


async def test_too_many_deaths_in_a_row_break_the_scaffold() -> None:
    source = LOOP + "    sys.exit('always')\n"
    async with started(python_agent(source, max_restarts=1)) as scaffold:
        for number in range(2):
            scaffold.check()
            assert (await scaffold.run(make_episode(f"e{number}"))).accident
        with pytest.raises(AgentError, match=r"2 times in a row(.|\n)*"):
            scaffold.check()
        started_at = time.monotonic()
        late = await scaffold.run(make_episode("late"))
        assert late.stop_reason is StopReason.AGENT_FAILED and "always" in str(late.error) and not late.accident
        assert time.monotonic() - started_at < 1.0


async def test_the_scaffold_is_broken_once_its_last_worker_is() -> None:
    source = LOOP + "    if question == 'die': sys.exit('out of luck')\n    print(json.dumps(reply))\n"
    async with started(python_agent(source, workers=2, max_restarts=0)) as scaffold:
        await scaffold.run(make_episode("d1", "die"))
        scaffold.check()
        assert (await scaffold.run(make_episode("n", "ab"))).answer == "ba"
        await scaffold.run(make_episode("d2", "die"))
        with pytest.raises(AgentError, match="out of luck"):
            scaffold.check()


async def test_a_mute_worker_costs_the_deadline_and_its_late_answer_is_ignored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = LOOP + "    time.sleep(0.5 if question == 'slow' else 0); print(json.dumps(reply))\n"
    source = source.replace("question = request", "print('thinking', file=sys.stderr, flush=True); question = request")
    async with started(python_agent(source)) as scaffold:
        slow = await scaffold.run(make_episode("s", "slow", deadline_s=0.3))
        assert slow.stop_reason is StopReason.DEADLINE
        assert "agent worker '" in str(slow.error) and "gave no answer within 0.3 s" in str(slow.error)
        assert str(slow.error).endswith("thinking")
        assert (await scaffold.run(make_episode("q", "ab"))).answer == "ba"
    assert not caplog.records


async def test_a_worker_that_hangs_for_good_is_restarted() -> None:
    source = LOOP + "    if question == 'hang': time.sleep(60)\n    print(json.dumps(reply))\n"
    async with started(python_agent(source)) as scaffold:
        hung = [scaffold.run(make_episode(f"h{i}", "hang", deadline_s=0.1)) for i in range(8)]
        late = asyncio.create_task(scaffold.run(make_episode("late", "hang", deadline_s=20.0)))
        reasons = {result.stop_reason for result in await asyncio.gather(*hung)}
        cut_off = await late
        assert "ended with status -9, killed since 8 deadlines in a row passed without a line from it" in str(
            cut_off.error
        )
        assert cut_off.accident and reasons <= {StopReason.DEADLINE, StopReason.ENVIRONMENT_FAILED}
        await asyncio.sleep(0.1)
        assert (await scaffold.run(make_episode("n", "ab"))).answer == "ba"


async def test_a_worker_that_reads_nothing_costs_no_more_than_the_deadline() -> None:
    source = "import time; print('{\"ready\": true}'); time.sleep(60)"
    async with started(python_agent(source)) as scaffold:
        result = await scaffold.run(make_episode(question="x" * 2_000_000, deadline_s=0.3))
    assert result.stop_reason is StopReason.DEADLINE


async def test_a_line_without_end_breaks_the_worker_not_the_trainer() -> None:
    source = LOOP + "    print('x' * 3000000 if question == 'flood' else json.dumps(reply))\n"
    async with started(python_agent(source)) as scaffold:
        flood = await scaffold.run(make_episode("f", "flood"))
        assert flood.answer is None and flood.accident
        assert "ended with status -9, killed since it printed a line of more than 1048576 bytes" in str(flood.error)
        assert (await scaffold.run(make_episode("n", "ab"))).answer == "ba"


@pytest.mark.parametrize(
    ("source", "timeout_s", "message"),
    [
        ("raise SystemExit('no module named agent')", 20.0, r"status 1; (.|\n)*no module named agent"),
        ("import time; print('hello'); time.sleep(60)", 0.3, r"printed no .* within 0.3 s"),
    ],
)
async def test_a_worker_that_never_gets_ready_is_an_error_at_the_start(
    source: str, timeout_s: float, message: str
) -> None:
    with pytest.raises(AgentError, match=message):
        await WorkerScaffold(python_agent(source, start_timeout_s=timeout_s, workers=2)).start()


async def test_closing_fails_the_open_episodes() -> None:
    async with started(python_agent(LOOP)) as scaffold:
        run = asyncio.create_task(scaffold.run(make_episode()))
        await asyncio.sleep(0.05)
    assert (await run).stop_reason is StopReason.AGENT_FAILED
