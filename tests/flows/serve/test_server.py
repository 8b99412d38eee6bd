"""The server's SQLite: of two transactions that read first and then write, the second waits."""

import asyncio

import pytest
import sqlalchemy as sa
from prefect.server.database.configurations import AioSqliteConfiguration
from sqlalchemy.ext.asyncio import AsyncSession

from flows.serve.server import ImmediateSqlite


async def both_read_before_either_writes(config: AioSqliteConfiguration) -> int:
    """Returns the sum of what they wrote."""
    engine = await config.engine()
    async with engine.begin() as connection:
        await connection.execute(sa.text("CREATE TABLE numbers (number INTEGER)"))

    async def add(number: int) -> None:
        async with AsyncSession(engine) as session, config.begin_transaction(session):
            await session.execute(sa.text("SELECT count(*) FROM numbers"))
            await asyncio.sleep(0.3)
            await session.execute(sa.text(f"INSERT INTO numbers VALUES ({number})"))

    await asyncio.gather(add(1), add(2))
    async with AsyncSession(engine) as session:
        return (await session.execute(sa.text("SELECT sum(number) FROM numbers"))).scalar_one()


def test_the_second_waits(tmp_path):
    assert asyncio.run(both_read_before_either_writes(ImmediateSqlite(f"sqlite+aiosqlite:///{tmp_path}/one.db"))) == 3


def test_prefect_s_own_would_refuse_it(tmp_path):
    """When this fails, flows/serve/server.py has become superfluous."""
    with pytest.raises(sa.exc.OperationalError, match="database is locked"):
        asyncio.run(both_read_before_either_writes(AioSqliteConfiguration(f"sqlite+aiosqlite:///{tmp_path}/one.db")))
