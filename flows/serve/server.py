"""The Prefect server of `make serve`, closed to other pages and host names; with SQLite a change waits for its turn instead of being refused.

Prefect's transactions begin as readers; one that then wants to write after another has written cannot wait, says SQLite
(https://www.sqlite.org/lang_transaction.html), and the UI does not try again: a click is lost. Here they take the write lock as they begin.
"""

import os
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import uvicorn
from prefect.server.api.server import create_app
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import provide_database_interface, temporary_database_config
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction
from starlette.middleware.trustedhost import TrustedHostMiddleware

from flows.serve.gate import SameOrigin

LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]


class InTurn(AioSqliteConfiguration):
    """SQLite, whose transactions are BEGIN IMMEDIATE."""

    @asynccontextmanager
    async def begin_transaction(self, session: AsyncSession, with_for_update: bool = False) -> AsyncIterator[AsyncSessionTransaction]:
        """`with_for_update` is true for all."""
        async with super().begin_transaction(session, with_for_update=True) as transaction:
            yield transaction


def closed() -> TrustedHostMiddleware:
    """Prefect's server and UI. A request for another host name than ours gets 400, before anything else: the name of a page may lead here.

    Around the app, not in it: the server's own services call that directly, as the host prefect-in-memory.
    """
    origins = os.environ["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"].split(",")
    ours = hosts([*origins, os.environ["PREFECT_API_URL"]])
    return TrustedHostMiddleware(SameOrigin(create_app(final=True), origins), ours, www_redirect=False)


def hosts(addresses: Iterable[str]) -> list[str]:
    """The host names of this machine itself and of addresses, as `Host` has them, without ports."""
    return [*LOOPBACK, *(re.sub(r":\d*$", "", urlsplit(address).netloc) for address in addresses)]


def run(host: str, port: int) -> None:
    """Serves until it is told to stop."""
    usual = provide_database_interface().database_config
    with temporary_database_config(InTurn(usual.connection_url) if isinstance(usual, AioSqliteConfiguration) else usual):
        uvicorn.run(closed(), host=host, port=port, log_level="warning", server_header=False)
