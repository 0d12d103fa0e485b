"""The gateway itself: sessions for the trainer on one side, HTTP for agents on the other."""

from __future__ import annotations

import errno
import gc
import logging
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from forgejax.chat.format import ChatFormat
from forgejax.chat.tool_format import choose_tool_format, shows_tools
from forgejax.errors import GatewayError
from forgejax.gateway.config import GatewayConfig
from forgejax.gateway.dialects import DIALECTS, Dialect
from forgejax.gateway.http.app import build_app
from forgejax.gateway.http.deliveries import Deliveries
from forgejax.gateway.http.session_pages import add_session_pages
from forgejax.gateway.keys import get_logger
from forgejax.gateway.limits import Limits
from forgejax.gateway.metrics import GatewayMetrics
from forgejax.gateway.records.base import SessionRecords
from forgejax.gateway.records.writer import RecordFolder
from forgejax.gateway.service import Service
from forgejax.gateway.session_table import SessionTable
from forgejax.gateway.side_calls.rules import SideCallRules
from forgejax.gateway.walk_in import StandAlone, WalkInSessions
from forgejax.grammar import GrammarCompiler
from forgejax.types import Sampler, Session, SessionSpec, Turn

_log = logging.getLogger(__name__)


class Gateway:
    """Implements ``forgejax.types.Sessions``. All of it belongs to the event loop that runs ``start``.

    ``context_length`` is the engine's: prompt and reply together never exceed it. ``dialects`` are the wire
    formats that are served; the first words the errors of paths that are no dialect's. ``grammars``, of the format's
    vocabulary, may be those of an engine in the same process, so that each schema is compiled once. With ``alone`` it
    opens sessions for whoever comes, and has pages for its owner. Raises GatewayError where the chat template leaves
    unclear how the policy calls tools, or where nothing can be recorded.
    """

    def __init__(
        self,
        sampler: Sampler,
        chat_format: ChatFormat,
        context_length: int,
        config: GatewayConfig,
        dialects: Sequence[Dialect] = DIALECTS,
        *,
        grammars: GrammarCompiler | None = None,
        alone: StandAlone | None = None,
    ) -> None:
        self.metrics = GatewayMetrics()
        self._config = config
        self._service = Service(
            sampler=sampler,
            chat_format=chat_format,
            tool_format=choose_tool_format(config.tool_format, chat_format),
            tell_tools=not shows_tools(chat_format),
            context_length=context_length,
            config=config,
            metrics=self.metrics,
            grammars=grammars or GrammarCompiler(chat_format.codec.spell_vocabulary()),
            limits=Limits(config.limits, self.metrics),
            side_calls=SideCallRules(config.side_calls),
            records=self._open_records(context_length),
        )
        self._sessions = SessionTable(self._service)
        self._alone = alone
        self._dialects = dialects
        self._runner: web.AppRunner | None = None
        self._url: str | None = None

    def _open_records(self, context_length: int) -> SessionRecords:
        if self._config.record is None:
            return SessionRecords()
        return RecordFolder(Path(self._config.record), self._config, context_length, self.metrics)

    @property
    def url(self) -> str:
        """``http://host:port``. Raises GatewayError before ``start`` and after ``stop``."""
        if self._url is None:
            raise GatewayError("the gateway is not running; await start() first")
        return self._url

    async def start(self, host: str | None = None, port: int | None = None) -> str:
        """Listens on ``host:port`` (the configuration's by default), or on a free port if that one is taken.

        Returns ``url``. Raises GatewayError where it cannot listen at all, or its dialects do not go together;
        ConfigError where strangers would be served without a key.
        """
        if self._runner is not None:
            raise GatewayError(f"the gateway already runs at {self.url}; stop it first")
        host = self._config.host if host is None else host
        port = self._config.port if port is None else port
        self._config.check_host(host)
        # An agent that closes its connection ends its request.
        deliveries = Deliveries(self.metrics)
        runner = web.AppRunner(
            self._build_app(deliveries),
            access_log=None,
            logger=get_logger("forgejax.gateway.http.server"),
            handler_cancellation=True,
            shutdown_timeout=5.0,
        )
        await runner.setup()
        if runner.server is not None:
            deliveries.watch(runner.server)
        try:
            bound = await _listen(runner, host, port)
        except OSError as error:
            await runner.cleanup()
            raise GatewayError(f"the gateway cannot listen on {host}:{port}: {error}; set gateway.host/port") from error
        self._runner = runner
        # A full collection would else walk all that the process has loaded, while every agent waits: 0.2 s, and more.
        gc.freeze()
        everywhere = host in ("0.0.0.0", "::", "")
        name = self._config.public_host or ("127.0.0.1" if everywhere else host)
        self._url = f"http://{f'[{name}]' if ':' in name else name}:{bound}"
        return self._url

    def _build_app(self, deliveries: Deliveries) -> web.Application:
        if self._alone is None:
            return build_app(self._service, self._sessions, self._dialects, deliveries)
        walk_ins = WalkInSessions(self._sessions, self._alone)
        app = build_app(self._service, walk_ins, self._dialects, deliveries)
        add_session_pages(app, walk_ins, self._alone, self._config, lambda: self.url)
        return app

    async def stop(self) -> None:
        """Closes every session and the port. Idempotent."""
        if self._runner is not None:
            runner, self._runner, self._url = self._runner, None, None
            await self._sessions.close_all()
            await runner.cleanup()
            gc.unfreeze()

    def open(self, spec: SessionSpec) -> Session:
        base_url = f"{self.url}/v1"
        session = self._sessions.open(spec)
        return Session(
            id=session.id,
            base_url=base_url,
            api_key=session.api_key,
            model=self._config.model_name,
            context_length=self._service.context_length,
        )

    async def close(self, session_id: str) -> tuple[Turn, ...]:
        return await self._sessions.close(session_id)


async def _listen(runner: web.AppRunner, host: str, port: int) -> int:
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        if error.errno != errno.EADDRINUSE or port == 0:
            raise
        await web.TCPSite(runner, host, 0).start()
        _log.warning("port %d is taken; the gateway listens on %d", port, runner.addresses[0][1])
    return int(runner.addresses[0][1])
