"""Tasks over HTTP. The bodies of answers are the bytes that the statements gave."""

# FastAPI reads these annotations when the application is built, so they stay real types here.

from typing import Final
from uuid import UUID

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ..errors import (
    BatchRefused,
    Conflict,
    Invalid,
    KeyReused,
    NotFound,
    OutcomeUnknown,
    Overloaded,
    PreconditionFailed,
    PreconditionRequired,
    Refused,
    TooManyRequests,
    Unauthenticated,
    Unavailable,
)
from ..models import TaskBatchRead, TaskRead
from ..services import tasks
from . import examples, problems
from .contract import answers, header, links
from .deps import (
    Batch,
    ConditionDep,
    DatabaseDep,
    HasDep,
    Lines,
    ListingDep,
    NewTask,
    PrincipalDep,
    PutConditionDep,
    RepeatDep,
    TaskChange,
    WholeTask,
)
from .pages import TaskPage
from .transfers import LINES, Imported, Stream, begun
from .written import Written, tagged

PREFIX: Final = "/v1/tasks"
# A path that holds no UUID is no task's: 404, as for every id that is not there.
ONE: Final = "/{task_id:uuid}"

# A person's own, and worth keeping only together with its ETag; everything else is not kept at all.
_REVALIDATED: Final = ((b"cache-control", b"private, no-cache"), (b"vary", b"authorization"))
_UNKEPT: Final = (b"cache-control", b"no-store")
_REPLAY: Final = (b"idempotency-replayed", b"true")

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
_CONDITIONAL: Final = (Invalid, PreconditionFailed, PreconditionRequired, OutcomeUnknown)

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
    place = _placed(request, created.task_id)
    if created.replayed:
        return _task(created.body, created.etag, 201, place, _REPLAY)
    return _task(created.body, created.etag, 201, place)


@router.post(
    "/batch",
    summary="Do many operations as one",
    response_model=TaskBatchRead,
    responses={
        **answers(200, "All were done.", examples.BATCHED, headers=[_REPLAYED]),
        **problems.responses(KeyReused, BatchRefused, Conflict, OutcomeUnknown),
    },
)
async def batch_tasks(
    principal: PrincipalDep, database: DatabaseDep, repeat: RepeatDep, batch: Batch
) -> Response:
    """Up to 1,000 operations, all done in their order or none; those that cannot be done are named by index.

    An ETag in `if_match` stands without its quotes, as the answers of a batch give it.
    """
    key = repeat.of("batch_tasks", batch)
    done = await tasks.batch(database, principal, batch.operations, idempotency=key)
    return Written(done.body, [_UNKEPT, _REPLAY] if done.replayed else [_UNKEPT])


@router.get(
    "/export",
    summary="Export all tasks",
    response_class=StreamingResponse,
    responses={
        **answers(200, "A task a line, the oldest first.", examples.LINES["exported"], media_type=LINES),
        **problems.responses(TooManyRequests),
    },
)
async def export_tasks(principal: PrincipalDep, database: DatabaseDep) -> Response:
    """All of yours as they are at one moment, as newline-delimited JSON, each line as `TaskRead` describes it.

    An answer that ends before its last chunk is not whole. One export or import runs at a time.
    """
    pieces = await begun(tasks.export(database, principal.user_id))
    attached = {"content-disposition": 'attachment; filename="tasks.ndjson"'}
    return Stream(pieces, media_type=LINES, headers={"cache-control": "no-store", **attached})


@router.post(
    "/import",
    summary="Import tasks",
    response_model=Imported,
    responses={
        **answers(200, "All were made.", examples.IMPORTED),
        **problems.responses(TooManyRequests, Conflict, OutcomeUnknown),
    },
)
async def import_tasks(principal: PrincipalDep, database: DatabaseDep, lines: Lines) -> Response:
    """All lines or none. What is wrong is told by line, with the first as `/0`; an id that you have already is.

    The lines of an export give the same tasks, ids and times included, in whoever's account they are imported.
    """
    loaded = await tasks.load(database, principal, lines)
    return Written(Imported(count=loaded.count).model_dump_json(), [_UNKEPT])


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
    headers = (tagged(etag), *_REVALIDATED)
    if has.hold(etag):
        return Written(None, headers, 304)
    return Written(body, headers)


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
    body, etag = await tasks.update(database, principal, task_id, change, if_match=condition.if_match)
    return _task(body, etag)


@router.put(
    ONE,
    summary="Replace a task, or create it under your own id",
    response_model=TaskRead,
    responses={
        **answers(200, "The task in its new form.", examples.CHANGED, headers=[_ETAG], linked=_LINKS),
        **answers(
            201,
            "The new task.",
            examples.TASK,
            model=TaskRead,
            headers=[_LOCATION, _ETAG],
            linked=_LINKS,
        ),
        **problems.responses(NotFound, *_CONDITIONAL),
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
        return _task(put.body, put.etag, 201, _placed(request, task_id))
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
    await tasks.delete(database, principal, task_id, if_match=condition.if_match)
    return Written(None, [_UNKEPT], 204)


def _task(body: str, etag: str, status: int = 200, *more: tuple[bytes, bytes]) -> Response:
    return Written(body, (tagged(etag), _UNKEPT, *more), status)


def _placed(request: Request, task_id: UUID) -> tuple[bytes, bytes]:
    return b"location", f"{request.scope.get('root_path', '')}{PREFIX}/{task_id}".encode("latin-1")
