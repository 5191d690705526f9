"""Tasks over HTTP. The bodies of answers are the bytes that the statements gave."""

# FastAPI reads these annotations when the application is built, so they stay real types here.

from typing import Final
from uuid import UUID

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..errors import (
    KeyReused,
    NotFound,
    OutcomeUnknown,
    Overloaded,
    PreconditionFailed,
    PreconditionRequired,
    Refused,
    Unauthenticated,
    Unavailable,
)
from ..models import TaskRead
from ..services import tasks
from . import examples, problems
from .conditions import quoted
from .contract import JSON, answers, header, links
from .deps import (
    ConditionDep,
    DatabaseDep,
    HasDep,
    ListingDep,
    NewTask,
    PrincipalDep,
    PutConditionDep,
    RepeatDep,
    TaskChange,
    WholeTask,
)
from .pages import TaskPage

PREFIX: Final = "/v1/tasks"
# A path that holds no UUID is no task's: 404, as for every id that is not there.
ONE: Final = "/{task_id:uuid}"

# A person's own, and worth keeping only together with its ETag; everything else is not kept at all.
_REVALIDATED: Final = {"cache-control": "private, no-cache", "vary": "authorization"}
_UNKEPT: Final = {"cache-control": "no-store"}

_ETAG: Final = header("ETag", "Stands for exactly this content; for If-Match and If-None-Match.")
_LOCATION: Final = header("Location", "Where the task is.")
_REPLAYED: Final = header("Idempotency-Replayed", "`true`: this is the answer to an earlier request.")
_NEXT: Final = header("Link", '`rel="next"`: the next page; absent on the last.')
_LINKS: Final = links(
    "What can be done with the task.",
    "$response.body#/id",
    "read_task",
    "update_task",
    "replace_task",
    "delete_task",
)
_CONDITIONAL: Final = (PreconditionFailed, PreconditionRequired, OutcomeUnknown)

router = APIRouter(
    prefix=PREFIX,
    tags=["tasks"],
    responses=problems.responses(Unauthenticated, Unavailable, Overloaded, Refused),
)


@router.get(
    "",
    summary="List tasks",
    response_model=TaskPage,
    responses=answers(200, "A page of your tasks.", examples.PAGE, headers=[_NEXT]),
)
async def list_tasks(principal: PrincipalDep, database: DatabaseDep, listing: ListingDep) -> Response:
    """Yours only, the newest first unless you ask otherwise.

    Follow `next_cursor` until it is null: every task that is there all the while is seen exactly once, however
    many come and go, and no page costs more than the first. A search, or an exact count, looks through all your
    tasks; it is given up with 503 when it takes too long.
    """
    return listing.answer(await tasks.page(database, principal.user_id, listing.query()))


@router.post(
    "",
    summary="Add a task",
    status_code=201,
    response_model=TaskRead,
    responses={
        **answers(201, "The new task.", examples.TASK, headers=[_LOCATION, _ETAG, _REPLAYED], linked=_LINKS),
        **problems.responses(KeyReused, OutcomeUnknown),
    },
)
async def create_task(
    request: Request, principal: PrincipalDep, database: DatabaseDep, repeat: RepeatDep, task: NewTask
) -> Response:
    """With an `Idempotency-Key` it is safe to send again: the answer is the first one's, and nothing is written
    twice. Without one, a 504 leaves open whether the task was stored.
    """
    created = await tasks.create(database, principal, task, idempotency=repeat.of("create_task", task))
    headers = {"location": _place(request, created.task_id)}
    if created.replayed:
        headers["idempotency-replayed"] = "true"
    return _task(created.body, created.etag, 201, headers)


@router.get(
    ONE,
    summary="Read a task",
    response_model=TaskRead,
    responses={
        **answers(200, "The task.", examples.TASK, headers=[_ETAG], linked=_LINKS),
        **answers(304, "It is what you have.", headers=[_ETAG]),
        **problems.responses(NotFound),
    },
)
async def read_task(principal: PrincipalDep, database: DatabaseDep, has: HasDep, task_id: UUID) -> Response:
    """Another person's task is answered as one that does not exist."""
    body, etag = await tasks.read(database, principal.user_id, task_id)
    headers = {"etag": quoted(etag), **_REVALIDATED}
    if has.hold(etag):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=JSON, headers=headers)


@router.patch(
    ONE,
    summary="Change a task",
    response_model=TaskRead,
    responses={
        **answers(200, "The task as it is now.", examples.CHANGED, headers=[_ETAG], linked=_LINKS),
        **problems.responses(NotFound, *_CONDITIONAL),
    },
)
async def update_task(
    principal: PrincipalDep,
    database: DatabaseDep,
    condition: ConditionDep,
    task_id: UUID,
    change: TaskChange,
) -> Response:
    """Only the fields that are sent change; null clears the description. With `If-Match` nobody's change is
    overwritten unseen: of two writers with the same ETag one gets 412.
    """
    body, etag = await tasks.update(database, principal.user_id, task_id, change, if_match=condition.if_match)
    return _task(body, etag)


@router.put(
    ONE,
    summary="Replace a task, or create it under your own id",
    response_model=TaskRead,
    responses={
        **answers(200, "The task in its new form.", examples.CHANGED, headers=[_ETAG], linked=_LINKS),
        **answers(201, "The new task.", examples.TASK, headers=[_LOCATION, _ETAG], linked=_LINKS),
        **problems.responses(*_CONDITIONAL),
    },
)
async def replace_task(
    request: Request,
    principal: PrincipalDep,
    database: DatabaseDep,
    condition: PutConditionDep,
    task_id: UUID,
    task: WholeTask,
) -> Response:
    """Fields that are not sent take their defaults. Without a task of yours under this id one is created; with
    `If-None-Match: *` only then. Whether somebody else has the id makes no difference.
    """
    put = await tasks.put(
        database,
        principal,
        task_id,
        task,
        if_match=condition.if_match,
        only_new=condition.only_new,
    )
    if put.created:
        return _task(put.body, put.etag, 201, {"location": _place(request, task_id)})
    return _task(put.body, put.etag)


@router.delete(
    ONE,
    summary="Delete a task",
    status_code=204,
    responses={**answers(204, "It is gone."), **problems.responses(NotFound, *_CONDITIONAL)},
)
async def delete_task(
    principal: PrincipalDep, database: DatabaseDep, condition: ConditionDep, task_id: UUID
) -> Response:
    """For good: there is no way back. A second time it is a 404."""
    await tasks.delete(database, principal.user_id, task_id, if_match=condition.if_match)
    return Response(status_code=204, headers=_UNKEPT)


def _task(body: str, etag: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        body, status, media_type=JSON, headers={"etag": quoted(etag), **_UNKEPT, **(headers or {})}
    )


def _place(request: Request, task_id: UUID) -> str:
    return f"{request.scope.get('root_path', '')}{PREFIX}/{task_id}"
