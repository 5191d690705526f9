"""The shape of data, in rows and on the wire. Importing it makes `SQLModel.metadata` whole."""

from .base import Base, make_engine, metadata
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
from .user import User, UserCreate, UserRead

__all__ = [
    "Base",
    "CreateOperation",
    "DeleteOperation",
    "OperationResult",
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
    "make_engine",
    "metadata",
]
