"""How our tables came to be what they are, step by step: Alembic's scripts, run by `tuner.results.schema`."""
