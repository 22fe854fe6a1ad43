"""Runs the scripts on the connection that `tuner.results.schema` gives, in its transaction."""

from alembic import context

from tuner.results.schema import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
context.run_migrations()
