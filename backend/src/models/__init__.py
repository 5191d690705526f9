"""The shape of data, in rows and on the wire. Importing it makes `SQLModel.metadata` whole."""

from .base import Base, make_engine, metadata
from .task import Task, TaskCreate, TaskRead, TaskUpdate
from .user import User, UserCreate, UserRead

__all__ = [
    "Base",
    "Task",
    "TaskCreate",
    "TaskRead",
    "TaskUpdate",
    "User",
    "UserCreate",
    "UserRead",
    "make_engine",
    "metadata",
]
