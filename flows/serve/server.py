"""The Prefect server of `make serve`, closed to other origins and host names; with SQLite, concurrent writes wait instead of failing.

Prefect's transactions begin as readers. One that writes after another transaction has written fails at once
(https://www.sqlite.org/lang_transaction.html), and the UI does not retry: a click is lost. Here they take the write lock at their start.
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


class ImmediateSqlite(AioSqliteConfiguration):
    """SQLite with BEGIN IMMEDIATE transactions."""

    @asynccontextmanager
    async def begin_transaction(self, session: AsyncSession, with_for_update: bool = False) -> AsyncIterator[AsyncSessionTransaction]:
        """Always uses `with_for_update`."""
        async with super().begin_transaction(session, with_for_update=True) as transaction:
            yield transaction


def create_closed_app() -> TrustedHostMiddleware:
    """Prefect's server and UI. A request for a foreign host name gets 400 before anything else (DNS rebinding).

    The middleware wraps the app: the server's own services call the app directly, as the host prefect-in-memory.
    """
    origins = os.environ["PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS"].split(",")
    ours = hosts([*origins, os.environ["PREFECT_API_URL"]])
    return TrustedHostMiddleware(SameOrigin(create_app(final=True), origins), ours, www_redirect=False)


def hosts(addresses: Iterable[str]) -> list[str]:
    """Loopback host names and those of addresses, as in `Host`, without ports."""
    return [*LOOPBACK, *(re.sub(r":\d*$", "", urlsplit(address).netloc) for address in addresses)]


def run(host: str, port: int) -> None:
    """Serves until it is stopped."""
    default = provide_database_interface().database_config
    with temporary_database_config(ImmediateSqlite(default.connection_url) if isinstance(default, AioSqliteConfiguration) else default):
        uvicorn.run(create_closed_app(), host=host, port=port, log_level="warning", server_header=False)
