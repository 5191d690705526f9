"""The shape of data, in rows and on the wire. Importing it makes `SQLModel.metadata` whole."""

from . import isolation
from .base import Base, make_engine, metadata
from .credential import Credential, Session
from .kept_answer import KeptAnswer
from .task import (
    CreateOperation,
    DeleteOperation,
    OperationResult,
    Task,
    TaskBatch,
    TaskBatchRead,
    TaskCreate,
    TaskImport,
    TaskOperation,
    TaskPut,
    TaskRead,
    TaskUpdate,
    UpdateOperation,
)
from .user import DeletedUser, User, UserCreate, UserRead

__all__ = [
    "Base",
    "CreateOperation",
    "Credential",
    "DeleteOperation",
    "DeletedUser",
    "KeptAnswer",
    "OperationResult",
    "Session",
    "Task",
    "TaskBatch",
    "TaskBatchRead",
    "TaskCreate",
    "TaskImport",
    "TaskOperation",
    "TaskPut",
    "TaskRead",
    "TaskUpdate",
    "UpdateOperation",
    "User",
    "UserCreate",
    "UserRead",
    "isolation",
    "make_engine",
    "metadata",
]
