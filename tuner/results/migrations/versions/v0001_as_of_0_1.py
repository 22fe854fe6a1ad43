"""The tables of tuner 0.1, which noted no version."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    times = ("created", "started", "heartbeat", "finished")
    op.create_table(
        "tuner_sweeps",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("message", sa.Text),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("tokens_per_trial", sa.BigInteger),
        *(sa.Column(name, sa.JSON) for name in ("data", "baseline", "sharing", "promoted")),
        sa.Column("pid", sa.Integer),
        sa.Column("host", sa.String(255)),
        sa.Column("driven_s", sa.Double),
        *(sa.Column(name, sa.DateTime) for name in times),
    )
    op.create_table(
        "tuner_reports",
        sa.Column("sweep", sa.String(64), primary_key=True),
        sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("tokens", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("trained_tokens", sa.BigInteger),
        sa.Column("step", sa.BigInteger),
        *(
            sa.Column(name, sa.Double)
            for name in (
                *("epoch", "train_loss", "eval_loss", "mean_token_accuracy"),
                *("learning_rate", "grad_norm", "tokens_per_s"),
            )
        ),
        sa.Column("peak_memory_bytes", sa.BigInteger),
        sa.Column("duration_s", sa.Double),
        sa.Column("adapter_path", sa.Text),
        sa.Column("time", sa.DateTime),
    )
    op.create_table(
        "tuner_requests",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("sweep", sa.String(64), nullable=False, index=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("value", sa.JSON),
        sa.Column("answer", sa.JSON),
        sa.Column("refusal", sa.Text),
        *(sa.Column(name, sa.DateTime) for name in ("asked", "taken", "answered")),
    )


def downgrade() -> None:
    for table in ("tuner_requests", "tuner_reports", "tuner_sweeps"):
        op.drop_table(table)
