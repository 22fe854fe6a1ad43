"""The version of our tables: who may read them, and how a driver brings older ones up to date.

Optuna has an `alembic_version` of its own in the same database; ours is another table. One database may hold the
sweeps of several versions of tuner. A step between versions only adds columns and tables, so that readers of either
version read on.
"""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from tuner.errors import TunerError
from tuner.results.tables import METADATA, OPTIONAL

VERSION_TABLE = "tuner_alembic_version"
VERSIONS = ("0001", "0002")
"""Oldest first, as in migrations/versions; the tables of tuner 0.1 name none and are the first."""


def check_tables(engine: sa.Engine, sweep: str) -> None:
    """Raise `TunerError` when the tables cannot be read, are those of a newer version, or lack what a reader needs."""
    try:  # a border: the file may be damaged, the server away
        with engine.connect() as connection:
            version = _version(connection)
            inspector = sa.inspect(connection)
            there = {table: [column["name"] for column in inspector.get_columns(table)] for table in METADATA.tables}
    except (sa.exc.DBAPIError, sa.exc.NoSuchTableError) as error:
        why = error.orig if isinstance(error, sa.exc.DBAPIError) else f"no table {error}"
        raise TunerError(f"the records of sweep {sweep!r} cannot be read: {why}") from error
    if version not in VERSIONS:
        raise TunerError(
            f"the records of sweep {sweep!r} are those of a newer tuner (schema {version}, this one knows "
            f"{VERSIONS[-1]}): look at it with that one"
        )
    for table in METADATA.sorted_tables:
        missing = [one.name for one in table.columns if one.name not in there[table.name] and one not in OPTIONAL]
        if missing:
            raise TunerError(f"the records of sweep {sweep!r} are damaged: {table.name} lacks {', '.join(missing)}")


def bring_up_to_date(engine: sa.Engine) -> None:
    """Make our tables, or those of an older version, what this version writes. Only one may do so at a time.

    Raises `TunerError` where they are a newer version's.
    """
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        tables = sa.inspect(connection).get_table_names()
        version = _version(connection) if "tuner_sweeps" in tables else None
        if version == VERSIONS[-1]:
            return
        if version is not None and version not in VERSIONS:
            raise TunerError(f"storage.study: the database holds the tables of a newer tuner (schema {version})")
        _upgrade(connection, VERSION_TABLE not in tables and version is not None)


def _version(connection: sa.Connection) -> str:
    if VERSION_TABLE not in sa.inspect(connection).get_table_names():
        return VERSIONS[0]
    return str(connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar())


def _upgrade(connection: sa.Connection, is_0_1: bool) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    if is_0_1:
        command.stamp(config, VERSIONS[0])
    command.upgrade(config, VERSIONS[-1])
