"""A task: what somebody wants done. The table, and the shapes that come in and go out."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal
from uuid import UUID

from pydantic import Discriminator, StrictBool, StrictInt, StringConstraints
from sqlalchemy import Boolean, CheckConstraint, Column, ForeignKey, Index, Integer, Uuid, text
from sqlalchemy import Text as SqlText
from sqlmodel import Field, Relationship

from .base import NOT_BLANK, STORABLE, Shape, Stamped, finite_check, new_id, not_blank_check
from .rendering import Timestamp

if TYPE_CHECKING:
    from .user import User

TITLE_MAX_LENGTH: Final = 255
DESCRIPTION_MAX_LENGTH: Final = 10_000
# Far from the column's bound, so that an imported task can still be changed a billion times.
VERSION_MAX: Final = 1_000_000_000

Title = Annotated[str, StringConstraints(min_length=1, max_length=TITLE_MAX_LENGTH), STORABLE, NOT_BLANK]
Description = Annotated[str, StringConstraints(max_length=DESCRIPTION_MAX_LENGTH), STORABLE]

_version: Final = Column(
    "version", Integer, nullable=False, server_default=text("1"), onupdate=text("tasks.version + 1")
)


class Task(Stamped, table=True):
    """The table `tasks`. The owner leads its key and every index (docs/decisions/0010-owner-leads-the-key.md).

    `version` rises by one in every UPDATE that SQLAlchemy writes, be it a session's flush or a statement of
    its own, and a session's flush that finds another version than it read raises `StaleDataError`.
    """

    __tablename__ = "tasks"
    __table_args__ = (
        # That it is not blank says already that it is not empty.
        CheckConstraint(f"char_length(title) <= {TITLE_MAX_LENGTH}", name="title_length"),
        CheckConstraint(not_blank_check("title"), name="title_not_blank"),
        CheckConstraint(f"char_length(description) <= {DESCRIPTION_MAX_LENGTH}", name="description_length"),
        CheckConstraint("version >= 1", name="version_positive"),
        CheckConstraint(finite_check("created_at"), name="created_at_finite"),
        CheckConstraint(finite_check("updated_at"), name="updated_at_finite"),
        Index("ix_tasks_user_id_created_at_id", "user_id", "created_at", "id"),
        Index("ix_tasks_user_id_updated_at_id", "user_id", "updated_at", "id"),
        Index("ix_tasks_open", "user_id", "created_at", "id", postgresql_where=text("NOT is_completed")),
    )

    user_id: UUID = Field(
        sa_column=Column(Uuid, ForeignKey("users.id", ondelete="CASCADE"), primary_key=True, nullable=False)
    )
    id: UUID = Field(
        default_factory=new_id,
        primary_key=True,
        sa_type=Uuid,
        sa_column_kwargs={"server_default": text("gen_random_uuid()")},
    )
    title: str = Field(sa_type=SqlText, nullable=False)
    description: str | None = Field(default=None, sa_type=SqlText, nullable=True)
    is_completed: bool = Field(
        default=False, sa_type=Boolean, nullable=False, sa_column_kwargs={"server_default": text("false")}
    )
    version: int = Field(default=1, sa_column=_version)

    user: "User" = Relationship(back_populates="tasks", sa_relationship_kwargs={"lazy": "raise"})

    # PostgreSQL does the counting (`onupdate` above), so SQLAlchemy makes no number of its own: it adds
    # `AND version = <as read>` to a flush and takes the new number from RETURNING.
    __mapper_args__: ClassVar[dict[str, Any]] = {
        "eager_defaults": True,
        "version_id_col": _version,
        "version_id_generator": False,
    }


class TaskCreate(Shape):
    """What makes a task. The title is stored as it was sent."""

    title: Title
    description: Description | None = None
    is_completed: StrictBool = False


class TaskUpdate(Shape):
    """What changes in a task: absent means "leave it", and only `description` may be null.

    A field that was not sent has no place in `changes()`; its attribute holds nothing meaningful.
    """

    title: Title = Field(default_factory=lambda: "")
    description: Description | None = Field(default_factory=lambda: None)
    is_completed: StrictBool = Field(default_factory=lambda: False)

    def changes(self) -> dict[str, Any]:
        """The fields that were sent, by name; a null description is among them."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class TaskPut(TaskCreate):
    """A task as it is to be from now on: what is absent takes its default, as in a new task."""


class TaskRead(Shape):
    """A task as it is shown. The fields stand in the order in which PostgreSQL writes them."""

    id: UUID
    user_id: UUID
    title: str
    description: str | None
    is_completed: bool
    version: int
    created_at: Timestamp
    updated_at: Timestamp


# Many at once. An ETag is written here as `services.tasks` gives it: without the quotes of the header.

BATCH_MAX_OPERATIONS: Final = 1_000

ETag = Annotated[str, StringConstraints(min_length=1, max_length=64), STORABLE]


class CreateOperation(Shape):
    """`id` may be chosen, so that a later operation of the same batch can name the task."""

    op: Literal["create"]
    id: UUID = Field(default_factory=new_id)
    task: TaskCreate


class UpdateOperation(Shape):
    """With `if_match` only the version that bears this ETag is changed."""

    op: Literal["update"]
    id: UUID
    task: TaskUpdate
    if_match: ETag | None = None


class DeleteOperation(Shape):
    """With `if_match` only the version that bears this ETag is deleted."""

    op: Literal["delete"]
    id: UUID
    if_match: ETag | None = None


TaskOperation = Annotated[CreateOperation | UpdateOperation | DeleteOperation, Discriminator("op")]


class TaskBatch(Shape):
    """Operations that are all done, in their order, or none of them."""

    operations: list[TaskOperation] = Field(min_length=1, max_length=BATCH_MAX_OPERATIONS)


class OperationResult(Shape):
    """What became of one operation: the task as that operation left it; nothing is left of a deleted one."""

    op: Literal["create", "update", "delete"]
    id: UUID
    etag: str | None
    task: TaskRead | None


class TaskBatchRead(Shape):
    """One result for each operation, in their order."""

    results: list[OperationResult]


Version = Annotated[StrictInt, Field(ge=1, le=VERSION_MAX)]


class TaskImport(TaskCreate):
    """A line of an import. A line of an export is one, and gives the same task in whoever's account it lands.

    `user_id` is taken and not used: what is imported belongs to whoever imports it.
    """

    id: UUID = Field(default_factory=new_id)
    user_id: UUID | None = None
    version: Version = 1
    created_at: Timestamp | None = None
    updated_at: Timestamp | None = None
