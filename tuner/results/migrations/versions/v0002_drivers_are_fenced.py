"""The token of the driver that may write, which a successor replaces."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("tuner_sweeps", sa.Column("driver", sa.String(32)))


def downgrade() -> None:
    op.drop_column("tuner_sweeps", "driver")
