"""Laws of endings: every request ends once, and its tokens are in the account and in the request log."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from forgejax.errors import EngineError
from forgejax.rollout import Driver, LocalSampler, RequestLog
from forgejax.types import Completion
from tests.rollout import tiny
from tests.rollout.driving import balanced, sample_all, until


async def test_a_failing_callback_loses_only_its_own_request() -> None:
    def fail(_: Sequence[int]) -> bool:
        raise KeyError("boom")

    with Driver(tiny.engine(), tiny.params()) as driver:
        bad = LocalSampler(driver).sample(tiny.request("bad", tiny.prompt(1, 9), 40), fail)
        good = LocalSampler(driver).sample(tiny.request("good", tiny.prompt(1, 9), 10))
        lost, done = await asyncio.gather(bad, good, return_exceptions=True)
        assert isinstance(lost, EngineError) and "boom" in str(lost)
        assert isinstance(done, Completion) and len(done.token_ids) == 10
        assert driver.healthy and driver.metrics().tokens_failed["train"] == 2 and balanced(driver)


async def test_cancelling_the_task_frees_the_slot_and_its_tokens_are_counted() -> None:
    with Driver(tiny.engine(slots=4), tiny.params()) as driver:
        begun = threading.Event()
        blocked = threading.Event()

        def hold(_: Sequence[int]) -> None:
            begun.set()
            blocked.wait(10)

        sampler = LocalSampler(driver)
        request = tiny.request("held", tiny.prompt(1, 9), 100, purpose="evaluation")
        task = asyncio.create_task(sampler.sample(request, hold))
        await asyncio.to_thread(begun.wait, 10)
        waiting = asyncio.create_task(sampler.sample(tiny.request("waiting", tiny.prompt(1, 9), 100)))
        await asyncio.sleep(0)
        task.cancel()
        waiting.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)
        blocked.set()
        await until(lambda: driver.metrics().active == 0 and driver.metrics().waiting == 0)
        metrics = driver.metrics()
        assert metrics.tokens_sampled["evaluation"] == metrics.tokens_cancelled["evaluation"] == 2
        done = await sample_all(driver, [tiny.request(f"r{i}", tiny.prompt(1, 9), 6) for i in range(8)])
        assert [len(each.token_ids) for each in done] == [6] * 8 and balanced(driver)


async def test_a_passed_deadline_ends_a_request_and_frees_its_slot() -> None:
    with Driver(tiny.engine(request_deadline_s=1.0), tiny.params()) as driver:
        release = threading.Event()
        slow = LocalSampler(driver).sample(tiny.request("slow", [1], 100), lambda _: release.wait(0.3) and None)
        with pytest.raises(EngineError, match=r"deadline of 1\.0 s"):
            await asyncio.wait_for(slow, 20)
        await until(lambda: driver.metrics().active == 0)
        assert driver.healthy and balanced(driver) and driver.metrics().tokens_failed["train"] > 0


async def test_the_request_log_holds_what_was_prompted_and_drawn_even_of_cancelled_requests(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "requests.log")
    with Driver(tiny.engine(), tiny.params(), request_log=log) as driver:
        (done,) = await sample_all(driver, [tiny.request("done", tiny.prompt(1, 9), 6)])
        seen: list[int] = []
        task: asyncio.Future[Completion] = asyncio.wrap_future(
            driver.submit(tiny.request("gone", [4, 5], 100), lambda draw: seen.extend(draw.token_ids.tolist()))
        )
        await until(lambda: bool(seen))
        task.cancel()
        await until(lambda: driver.metrics().active == 0)
    found, gone = log.find("done"), log.find("gone")
    assert found is not None and found.sampled_ids.tolist() == done.token_ids.tolist()
    assert found.prompt_ids.tolist() == done.prompt_ids.tolist() and found.finish_reason == "length"
    assert gone is not None and (gone.finish_reason, gone.sampled_ids.tolist()) == ("cancelled", seen)
    log.close()


async def test_a_request_that_cannot_be_logged_is_not_returned_and_the_driver_says_so(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "requests.log")
    log._file._file.close()
    log._file._file = io.FileIO("/dev/full", "r+b")  # refuses every write
    driver = Driver(tiny.engine(), tiny.params(), request_log=log).start()
    results: list[Completion | BaseException] = []
    for turn in range(3):
        sampling = LocalSampler(driver).sample(tiny.request(f"r{turn}", [1, 2], 4))
        results += await asyncio.wait_for(asyncio.gather(sampling, return_exceptions=True), 30)
        if turn == 0:
            with pytest.raises(EngineError, match="cannot be written"):
                log.flush()
    assert isinstance(results[0], Completion)  # accepted before the disk was found full, still to be found
    assert log.find("r0") is not None
    assert all(isinstance(each, EngineError) for each in results[1:]) and not driver.healthy and balanced(driver)
    driver.stop()
    with pytest.raises(EngineError, match="cannot be written"):
        log.close()
