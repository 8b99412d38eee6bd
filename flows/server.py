"""The Prefect server of `make serve`. With SQLite a change waits for its turn, where Prefect's own server sometimes answers 503 at once.

Prefect's transactions begin as readers; one that then wants to write after another has written cannot wait, says SQLite
(https://www.sqlite.org/lang_transaction.html), and the UI does not try again: a click is lost. Here they take the write lock as they begin.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prefect.cli import app
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import provide_database_interface, temporary_database_config
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction


class InTurn(AioSqliteConfiguration):
    """SQLite, whose transactions are BEGIN IMMEDIATE."""

    @asynccontextmanager
    async def begin_transaction(self, session: AsyncSession, with_for_update: bool = False) -> AsyncIterator[AsyncSessionTransaction]:
        """`with_for_update` is true for all."""
        async with super().begin_transaction(session, with_for_update=True) as transaction:
            yield transaction


def run(host: str, port: int) -> None:
    """Serves until it is told to stop."""
    usual = provide_database_interface().database_config
    with temporary_database_config(InTurn(usual.connection_url) if isinstance(usual, AioSqliteConfiguration) else usual):
        sys.argv = ["prefect", "server", "start", "--host", host, "--port", str(port)]  # the command reads these
        app()
