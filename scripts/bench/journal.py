"""What durable groups cost: bytes a sampled token in journal and request log, turns a second, the event loop's share.

Each case is a number of turns an episode: groups of ``members`` episodes, turns of ``tokens`` sampled tokens, each
prompt the whole of the last and ``told`` ids more. Reports go through the run's own sink, as in training.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import tyro

from forgejax.pool.codec import decode_group, encode_group
from forgejax.pool.journal import Journal
from forgejax.pool.pool import Pool, PoolConfig, read_groups
from forgejax.pool.schema import sqlite_url
from forgejax.pool.window import WindowConfig
from forgejax.rollout import LoggedRequest, RequestLog
from forgejax.run.actors import SWITCH_S, LoggedFirst, freeze_objects
from forgejax.types import (
    Completion,
    Dispatch,
    FinishReason,
    Group,
    Reward,
    SamplingLaw,
    StopReason,
    Task,
    Trajectory,
    Turn,
)

_LAW = SamplingLaw()
_TICK_S = 0.0005


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to write. ``turns`` of each case with its number of ``groups``; ``many`` groups of one turn of 20 tokens are
    brought through a whole run, and opened again. The files lie in ``folder``, a temporary one by default."""

    turns: tuple[int, ...] = (1, 8, 32, 50)
    groups: tuple[int, ...] = (48, 16, 8, 5)
    members: int = 8
    prompt: int = 500
    told: int = 100
    tokens: int = 2000
    vocab: int = 150_000
    many: int = 12_500
    folder: Path | None = None
    json: bool = False


def make_group(dispatch: Dispatch, options: Options, turns: int, tokens: int, rng: np.random.Generator) -> Group:
    def draw(count: int) -> np.ndarray:
        return rng.integers(0, options.vocab, count, dtype=np.int32)

    episodes = []
    for member in range(options.members):
        prompt, made = draw(options.prompt), []  # nothing in common, unlike those of a real group
        for number in range(turns):
            versions = np.full(tokens, dispatch.version, np.int32)
            completion = Completion(
                request_id=f"{dispatch.index:08x}{member:08x}-{number}",
                prompt_ids=prompt,
                token_ids=draw(tokens),
                logprobs=rng.random(tokens, np.float32),
                versions=versions,
                oldest_versions=versions,
                finish_reason=FinishReason.STOP,
                law=_LAW,
            )
            times = {"requested_at": float(number), "finished_at": float(number + 1)}
            parent = number - 1 if number else None
            made.append(
                Turn(index=number, completion=completion, parent=parent, requested_law=_LAW, **cast(Any, times))
            )
            prompt = np.concatenate([prompt, completion.token_ids, draw(options.told)])
        episodes.append(
            Trajectory(
                task_id="t",
                session_id=f"{dispatch.index:08x}{member:08x}",
                member=member,
                turns=tuple(made),
                rewards=(Reward(kind="outcome", value=1.0, at=float(turns)),),
                outcome=1.0,
                started_at=0.0,
                finished_at=float(turns),
                stop_reason=StopReason.COMPLETED,
                answer="1",
            )
        )
    task = Task(id="t", family="f", level="l", question="q")
    return Group(dispatch=dispatch, task=task, trajectories=tuple(episodes))


def log_requests(log: RequestLog, group: Group) -> None:
    for trajectory in group.trajectories:
        for turn in trajectory.turns:
            log.append(
                LoggedRequest(
                    request_id=turn.completion.request_id,
                    session_id=trajectory.session_id,
                    purpose="train",
                    owner=group.dispatch.owner,
                    finish_reason="stop",
                    version=group.dispatch.version,
                    prompt_ids=turn.completion.prompt_ids,
                    sampled_ids=turn.completion.token_ids,
                )
            )


async def report(sink: LoggedFirst, log: RequestLog, groups: list[Group]) -> tuple[list[float], ...]:
    """Seconds until each group was accepted, what of them any core worked, the longest that the event loop stood still
    meanwhile, and the longest in as much time without a report: what the machine's other work takes from it."""
    took, cpu, stood, idle, gaps = [], [], [], [], [0.0]

    async def tick() -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.perf_counter()
            gaps.append(now - last - _TICK_S)
            last = now

    ticking = asyncio.create_task(tick())
    for group in groups:
        log_requests(log, group)
        gaps[:] = [0.0]
        began, worked = time.perf_counter(), time.process_time()
        await sink.finish(group, {})
        took.append(time.perf_counter() - began)
        cpu.append(time.process_time() - worked)
        await asyncio.sleep(2 * _TICK_S)
        stood.append(max(gaps))
        gaps[:] = [0.0]
        await asyncio.sleep(took[-1])
        idle.append(max(gaps))
    ticking.cancel()
    return took, cpu, stood, idle


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogOnly:
    """Engines as the sink knows them."""

    log: RequestLog

    def flush(self) -> None:
        self.log.flush()


def median_s(calls: list[Any]) -> float:
    taken = []
    for call in calls:
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def measure_turns(options: Options, folder: Path, turns: int, count: int) -> dict[str, Any]:
    """Groups of one number of turns: what they weigh and how long they take."""
    rng = np.random.default_rng(turns)
    journal = Journal.open(sqlite_url(folder / "journal.sqlite"))
    pool = Pool.open(journal, PoolConfig(window=WindowConfig(in_flight=count, groups_per_step=1)))
    log = RequestLog(folder / "requests.log")
    sink = LoggedFirst(pool=pool, engines=cast(Any, LogOnly(log=log)))

    async def run() -> tuple[list[Any], ...]:
        dispatches = [await pool.next_dispatch() for _ in range(count)]
        groups = [make_group(each, options, turns, options.tokens, rng) for each in dispatches if each is not None]
        return groups, *await report(sink, log, groups)

    groups, took, cpu, stood, idle = asyncio.run(run())
    sampled = sum(group.sampled_tokens for group in groups)
    stored = [journal.payload(group.dispatch.index) for group in groups]
    logged = (folder / "requests.log").stat().st_size
    finds = [lambda name=turn.completion.request_id: log.find(name) for turn in groups[0].trajectories[0].turns]
    result = {
        "turns": turns,
        "groups": count,
        "journal_bytes_a_token": sum(map(len, stored)) / sampled,
        "log_bytes_a_token": logged / sampled,
        "accepted_ms": 1e3 * statistics.median(took),
        "accepted_cpu_ms": 1e3 * statistics.median(cpu),
        "turns_a_second": turns * options.members / statistics.median(took),
        "encode_ms": 1e3 * median_s([lambda group=group: encode_group(group) for group in groups]),
        "decode_ms": 1e3
        * median_s(
            [lambda data=data, number=number: decode_group(data, index=number) for number, data in enumerate(stored)]
        ),
        "find_ms": 1e3 * median_s(finds),
        "loop_stood_ms": 1e3 * statistics.median(stood),
        "loop_stood_max_ms": 1e3 * max(stood),
        "loop_idle_stood_ms": 1e3 * statistics.median(idle),
        "collect_ms": 1e3 * median_s([gc.collect] * 3),
    }
    pool.close()
    journal.close()
    log.close()
    return result


def measure_many(options: Options, folder: Path) -> dict[str, Any]:
    """Small groups through a whole run, a checkpoint every 20 steps of 8 groups and three kept; opened again."""
    rng = np.random.default_rng(0)
    config = PoolConfig(window=WindowConfig(in_flight=64, groups_per_step=8))
    journal = Journal.open(sqlite_url(folder / "journal.sqlite"))
    pool, log = Pool.open(journal, config), RequestLog(folder / "requests.log")
    sink, steps, took = LoggedFirst(pool=pool, engines=cast(Any, LogOnly(log=log))), options.many // 8, []

    async def run() -> None:
        running = [await pool.next_dispatch() for _ in range(64)]
        for step in range(steps):
            for dispatch in running:
                group = make_group(cast(Dispatch, dispatch), options, 1, 20, rng)
                log_requests(log, group)
                began = time.perf_counter()
                await sink.finish(group, {})
                took.append(time.perf_counter() - began)
            for _ in range(8):
                taken = pool.take(1.0)
                pool.accept(cast(Group, taken).dispatch.index, step=step, untrained={})
            pool.seal(step)
            pool.publish(step + 1)
            pool.retire(step)
            if step % 20 == 0:
                log.trim(pool.forget(max(0, step - 60)))
            running = [await pool.next_dispatch() for _ in range(8)]

    began = time.perf_counter()
    asyncio.run(run())
    whole = time.perf_counter() - began
    journal.close()
    log.close()
    times = [time.perf_counter()]
    journal = Journal.open(sqlite_url(folder / "journal.sqlite"))
    Pool.open(journal, config, resume_step=steps)
    times.append(time.perf_counter())
    kept = sum(1 for _ in read_groups(journal))
    times.append(time.perf_counter())
    RequestLog(folder / "requests.log").close()
    times.append(time.perf_counter())
    journal.close()
    opened, read, indexed = np.diff(times).tolist()
    return {
        "many_turns": options.many * options.members,
        "many_groups_a_second": options.many / whole,
        "many_accepted_ms": 1e3 * statistics.median(took),
        "journal_open_s": opened,
        "kept_groups": kept,
        "kept_read_s": read,
        "log_open_s": indexed,
        "journal_mb": sum(file.stat().st_size for file in folder.glob("journal*")) / 1e6,
        "log_mb": (folder / "requests.log").stat().st_size / 1e6,
    }


def measure_log(options: Options, folder: Path, turns: int = 8) -> dict[str, Any]:
    """A log of ``many`` requests of growing prompts that nothing was trimmed from, opened again."""
    rng = np.random.default_rng(0)
    log = RequestLog(folder / "requests.log")
    began = time.perf_counter()
    for number in range(options.many // (turns * options.members)):
        dispatch = Dispatch(index=number, attempt=0, version=number)
        log_requests(log, make_group(dispatch, options, turns, options.tokens, rng))
        if number % 8 == 7:
            log.flush()
    log.close()
    written = time.perf_counter() - began
    began = time.perf_counter()
    log = RequestLog(folder / "requests.log")
    opened, requests = time.perf_counter() - began, len(log)
    log.close()
    size = (folder / "requests.log").stat().st_size
    return {
        "log_requests": requests,
        "log_written_a_second": requests / written,
        "log_untrimmed_mb": size / 1e6,
        "log_untrimmed_open_s": opened,
    }


def results(options: Options) -> Iterator[dict[str, Any]]:
    for turns, count in zip(options.turns, options.groups, strict=True):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            yield measure_turns(options, Path(folder), turns, count)
    for measure in (measure_many, measure_log):
        if options.many:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                yield measure(options, Path(folder))


def main(options: Options) -> None:
    sys.setswitchinterval(SWITCH_S)
    freeze_objects()
    for result in results(options):
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        shown = {**result, "load": round(os.getloadavg()[0], 2), "peak_mb": round(memory)}
        if options.json:
            print(json.dumps(shown), flush=True)
            continue
        for name, value in shown.items():
            print(f"{name:24s} {value:.4g}" if isinstance(value, float) else f"{name:24s} {value}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
