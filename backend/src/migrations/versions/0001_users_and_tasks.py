"""Users, and the tasks they own.

Revision 0001, the first. Written in PostgreSQL's own words, because a migration is history: it must go on
saying what it said when the models have long moved on.
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

USERS = r"""
CREATE TABLE users (
    id          uuid NOT NULL DEFAULT gen_random_uuid(),
    email       text COLLATE "C" NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now(),

    CONSTRAINT pk_users PRIMARY KEY (id),
    CONSTRAINT uq_users_email UNIQUE (email),
    CONSTRAINT ck_users_email_length CHECK (char_length(email) BETWEEN 3 AND 255),
    CONSTRAINT ck_users_email_lower CHECK (email = lower(email)),
    CONSTRAINT ck_users_email_shape CHECK (email ~ '^[!-?A-~]+@[!-?A-~]+$'),
    CONSTRAINT ck_users_created_at_finite CHECK (
        isfinite(created_at) AND extract(year FROM created_at AT TIME ZONE 'UTC') BETWEEN 1 AND 9999),
    CONSTRAINT ck_users_updated_at_finite CHECK (
        isfinite(updated_at) AND extract(year FROM updated_at AT TIME ZONE 'UTC') BETWEEN 1 AND 9999)
)
"""

# The white space of a blank title is listed character by character, as the models list it.
TASKS = r"""
CREATE TABLE tasks (
    user_id       uuid NOT NULL,
    id            uuid NOT NULL DEFAULT gen_random_uuid(),
    title         text NOT NULL,
    description   text,
    is_completed  boolean NOT NULL DEFAULT false,
    version       integer NOT NULL DEFAULT 1,
    created_at    timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now(),

    CONSTRAINT pk_tasks PRIMARY KEY (user_id, id),
    CONSTRAINT fk_tasks_user_id FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE,
    CONSTRAINT ck_tasks_title_length CHECK (char_length(title) BETWEEN 1 AND 255),
    CONSTRAINT ck_tasks_title_not_blank CHECK (
        btrim(title, E'\u0009\u000A\u000B\u000C\u000D\u001C\u001D\u001E\u001F\u0020\u0085\u00A0\u1680'
                     '\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200A'
                     '\u2028\u2029\u202F\u205F\u3000') <> ''),
    CONSTRAINT ck_tasks_description_length CHECK (char_length(description) <= 10000),
    CONSTRAINT ck_tasks_version_positive CHECK (version >= 1),
    CONSTRAINT ck_tasks_created_at_finite CHECK (
        isfinite(created_at) AND extract(year FROM created_at AT TIME ZONE 'UTC') BETWEEN 1 AND 9999),
    CONSTRAINT ck_tasks_updated_at_finite CHECK (
        isfinite(updated_at) AND extract(year FROM updated_at AT TIME ZONE 'UTC') BETWEEN 1 AND 9999)
)
"""

INDEXES = (
    "CREATE INDEX ix_tasks_user_id_created_at_id ON tasks (user_id, created_at, id)",
    "CREATE INDEX ix_tasks_user_id_updated_at_id ON tasks (user_id, updated_at, id)",
    "CREATE INDEX ix_tasks_open ON tasks (user_id, created_at, id) WHERE NOT is_completed",
)


def upgrade() -> None:
    # One command a call: several in one string are refused by prepared statements and by sharding engines.
    op.execute(USERS)
    op.execute(TASKS)
    for index in INDEXES:
        op.execute(index)


def downgrade() -> None:
    op.execute("DROP TABLE tasks")
    op.execute("DROP TABLE users")
