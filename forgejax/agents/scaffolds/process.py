"""Any command line as an agent: one process per episode, its last line is the answer."""

from __future__ import annotations

import asyncio
from pathlib import Path

from forgejax.agents.scaffolds.base import AgentConfig, AgentResult, EpisodeSpec
from forgejax.agents.scaffolds.children import Child, Guard, find_program, merge_environment, quote_command, spawn
from forgejax.agents.scaffolds.confined import enter_sandbox, localise, place_command
from forgejax.agents.scaffolds.fork_server import ForkServer
from forgejax.agents.scaffolds.lodging import Lodging, prepare_lodging
from forgejax.environments.sandbox import Entered, list_environment
from forgejax.errors import AgentError
from forgejax.types import StopReason

ANSWER_BYTES = 64 * 1024  # the end of stdout, or of a file, in which the answer is looked for


class ProcessScaffold:
    """Runs ``config.command`` once per episode.

    The program finds the endpoint in OPENAI_BASE_URL and OPENAI_API_KEY (or where ``config.env`` and ``config.files``
    put ``{base_url}``, ``{origin}`` and ``{api_key}``). Exit status 0 and the last line of stdout that is not blank, or
    what is in ``config.answer_file``, are its answer; any other status is a failed agent. Where the configuration
    preloads modules, it is forked behind their import.
    """

    def __init__(self, config: AgentConfig) -> None:
        self._config = place_command(config)
        self._guard: Guard | None = None
        self._forks: ForkServer | None = None

    async def start(self) -> None:
        find_program(self._config.command)
        self._guard = Guard()
        if not self._config.preload:
            return
        try:
            self._forks = ForkServer(self._config, self._guard.marker)
            await self._forks.start()
        except AgentError:
            await self.close()
            raise

    def check(self) -> None:
        """Each episode has a process of its own: one that fails says nothing of the next, but for what forks them."""
        if self._forks is not None and self._forks.broken is not None:
            raise self._forks.broken

    async def run(self, episode: EpisodeSpec) -> AgentResult:
        if self._guard is None:
            raise AgentError("the agent scaffold is not started; await start() first")
        outside, episode = episode, localise(episode)
        try:
            lodging = await asyncio.to_thread(prepare_lodging, self._config, episode)
        except AgentError as error:
            return AgentResult(error=str(error), stop_reason=StopReason.AGENT_FAILED)
        try:
            async with enter_sandbox(self._config, outside, lodging) as entered:
                return await self._play(episode, lodging, self._guard.marker, entered)
        finally:
            await asyncio.shield(asyncio.to_thread(lodging.leave))

    async def _play(self, episode: EpisodeSpec, lodging: Lodging, marker: str, entered: Entered | None) -> AgentResult:
        filled = [lodging.fill(word) for word in self._config.command]
        in_command = any("{question}" in word for word in self._config.command)
        via_stdin = not in_command and self._config.question_via == "stdin"
        command = filled if in_command or via_stdin else [*filled, episode.question]
        env = {
            "OPENAI_BASE_URL": episode.base_url,
            "OPENAI_API_KEY": episode.api_key,
            **{name: lodging.fill(value) for name, value in self._config.env.items()},
            **episode.workspace.variables,
        }
        output = bytearray()

        def keep_end(data: bytes) -> None:
            output.extend(data)
            del output[:-ANSWER_BYTES]

        try:
            process = await (spawn if self._forks is None else self._forks.fork)(
                command if entered is None else entered.word(command),
                merge_environment(env, marker, None if entered is None else list_environment()),
                directory=lodging.directory if entered is None else None,
                stdin=via_stdin,
                on_output=keep_end,
            )
        except AgentError as error:
            return AgentResult(error=str(error), stop_reason=StopReason.AGENT_FAILED)
        failed = await self._watch(process, episode, episode.question if via_stdin else None)
        if entered is not None and entered.exceeded is not None:
            broke = f"agent command {quote_command(self._config.command)}: {entered.exceeded}"
            return AgentResult(error=broke, stop_reason=StopReason.AGENT_FAILED)
        if failed is not None:
            return failed
        if self._config.answer_file:
            return AgentResult(answer=await asyncio.to_thread(_read_end, lodging.fill(self._config.answer_file)))
        lines = [line.strip() for line in output.decode("utf-8", errors="replace").splitlines() if line.strip()]
        return AgentResult(answer=lines[-1] if lines else None)

    async def _watch(self, process: Child, episode: EpisodeSpec, question: str | None) -> AgentResult | None:
        """Sees the process to its end; a result where it failed."""
        in_time = True
        try:
            async with asyncio.timeout(episode.deadline_s):
                if question is not None:
                    await process.write(question.encode())
                    process.close_stdin()
                await process.exited.wait()
        except TimeoutError:
            in_time = False
        finally:
            await process.stop()
        agent = f"agent command {quote_command(self._config.command)}"
        if process.cut_off:
            error = f"{agent} was cut off: the server that had forked it died"
            return AgentResult(error=error, stop_reason=StopReason.ENVIRONMENT_FAILED, accident=True)
        if self._forks is not None:
            self._forks.note_result()
        if not in_time:
            error = f"{agent} did not end within {episode.deadline_s:g} s; {process.stderr_note}"
            return AgentResult(error=error, stop_reason=StopReason.DEADLINE)
        if process.status != 0:
            error = f"{agent} ended with status {process.status}; {process.stderr_note}"
            return AgentResult(error=error, stop_reason=StopReason.AGENT_FAILED)
        return None

    async def close(self) -> None:
        if self._forks is not None:
            await self._forks.close()
            self._forks = None
        if self._guard is not None:
            await asyncio.to_thread(self._guard.close)
            self._guard = None


def _read_end(path: str) -> str | None:
    """What stands in a file that the agent wrote; None where it wrote none, or nothing."""
    try:
        with Path(path).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - ANSWER_BYTES))
            return file.read().decode("utf-8", errors="replace").strip() or None
    except OSError:
        return None
