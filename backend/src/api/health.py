"""How the service is: /livez, /readyz, /health and /metrics.

None of them sends anything to the database but `database.check()`, and that only in active mode and at most
once an interval, however many ask. What is said about the database carries the time of its last evidence.
"""

import time
from datetime import UTC, datetime
from typing import Any, Literal

from anyio import to_thread
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from ..config.settings import Settings
from ..config.version import VERSION
from ..services.database import Database
from ..services.metrics import Lag, Metrics
from ..services.vitality import Observation
from .deps import AcceptDep, DatabaseDep, DrainingDep, MetricsDep, SettingsDep

Outcome = Literal["pass", "warn", "fail"]
DatabaseStatus = Literal["starting", "up", "asleep", "down"]

# An active check is never this old; a passive one says so when nothing has been heard for a while.
STALE_EVIDENCE_SECONDS = 60.0
LAG_WARNING_SECONDS = 0.25
_NO_STORE = {"cache-control": "no-store"}
_started = time.monotonic()

router = APIRouter(tags=["health"])
numbers = APIRouter(tags=["health"])
"""`/metrics`, for where it is asked on the public port."""
insiders = APIRouter()
"""All of it, for a listener of its own; then the public port shows nothing but that it works."""


class HealthResponse(JSONResponse):
    media_type = "application/health+json"


class Liveness(BaseModel):
    status: Literal["alive"]


class Readiness(BaseModel):
    status: Literal["ready", "not_ready"]
    database: DatabaseStatus = Field(description="`asleep` is ready: the next request wakes the database.")
    reason: str | None = Field(None, description="Why not, as one word; null when there is nothing to say.")


class Check(BaseModel):
    """One check. `time` is when the last evidence was seen, which is not always now."""

    model_config = ConfigDict(extra="forbid")

    component_type: str = Field(alias="componentType")
    status: Outcome
    time: datetime | None = Field(None, description="When the last evidence was seen; null before the first.")
    observed_value: float | int | str | None = Field(None, alias="observedValue")
    observed_unit: str | None = Field(None, alias="observedUnit")
    output: str | None = Field(None, description="What is wrong, as one word or a sentence.")
    # database:connectivity
    mode: Literal["passive", "active"] | None = Field(None, description="Whether the database may be asked.")
    evidence: str | None = Field(None, description="Who saw it last: `traffic`, `probe` or `connect`.")
    evidence_age_seconds: float | None = None
    server_version: str | None = None
    read_only: bool | None = None
    # schema:revision
    expected: str | None = Field(None, description="The revision that this code was written for.")
    # database:pool
    size: int | None = Field(None, description="Connections that this process may hold.")
    open: int | None = None
    waiting: int | None = Field(None, description="Requests in the queue for a connection.")


class Health(BaseModel):
    """draft-inadarei-api-health-check; all but `status` is left out where details are hidden."""

    model_config = ConfigDict(extra="forbid")

    status: Outcome
    version: str | None = None
    uptime_seconds: float | None = None
    notes: list[str] | None = None
    checks: dict[str, list[Check]] | None = None


def _health_example(overall: Outcome, database: DatabaseStatus, **more: Any) -> dict[str, Any]:
    seen = "2026-11-22T09:30:00Z"
    outcome = {"up": "pass", "asleep": "pass"}.get(database, "fail")
    connectivity = {"componentType": "datastore", "status": outcome, "time": seen, "observedValue": database}
    schema = {"componentType": "datastore", "status": "pass", "time": seen, "observedValue": "0001"}
    pool = {"componentType": "component", "status": "pass", "time": seen, "observedValue": 1}
    lag = {"componentType": "system", "status": "pass", "time": seen, "observedValue": 0.0004}
    return {
        "status": overall,
        "version": VERSION,
        "uptime_seconds": 86400.0,
        "checks": {
            "database:connectivity": [{**connectivity, "evidence": "probe", "mode": "active", **more}],
            "schema:revision": [{**schema, "expected": "0001"}],
            "database:pool": [{**pool, "observedUnit": "connections", "size": 4, "open": 2, "waiting": 0}],
            "event_loop:lag": [{**lag, "observedUnit": "s"}],
        },
    }


def _examples(media_type: str, **named: dict[str, Any]) -> dict[str, Any]:
    return {"content": {media_type: {"examples": {name: {"value": value} for name, value in named.items()}}}}


_READY = {
    "up": {"status": "ready", "database": "up", "reason": None},
    "asleep": {"status": "ready", "database": "asleep", "reason": None},
}
_NOT_READY = {
    "starting": {"status": "not_ready", "database": "starting", "reason": "connecting"},
    "down": {"status": "not_ready", "database": "down", "reason": "connection-refused"},
    "draining": {"status": "not_ready", "database": "up", "reason": "draining"},
}


@insiders.get("/livez")
@router.get("/livez", response_model=Liveness, summary="Is the process alive?")
async def livez() -> JSONResponse:
    """200 as long as the process can answer at all. It never looks at the database: restarting this process
    does not mend a database."""
    return JSONResponse({"status": "alive"}, headers=_NO_STORE)


@insiders.get("/readyz")
@router.get(
    "/readyz",
    response_model=Readiness,
    summary="Should it get traffic?",
    responses={
        200: {"description": "Ready.", **_examples("application/json", **_READY)},
        503: {
            "description": "Not ready: send requests elsewhere.",
            "model": Readiness,
            **_examples("application/json", **_NOT_READY),
        },
    },
)
async def readyz(database: DatabaseDep, metrics: MetricsDep, draining: DrainingDep) -> JSONResponse:
    """200 when requests that need the database are expected to succeed, else 503."""
    with metrics.checking("readiness") as conclude:
        observation = await database.check()
        ready = observation.ready and not draining
        conclude("pass" if ready else "fail")
    body = {
        "status": "ready" if ready else "not_ready",
        "database": observation.status,
        "reason": "draining" if draining else observation.reason,
    }
    return JSONResponse(body, 200 if ready else 503, headers=_NO_STORE)


@router.get(
    "/health",
    response_model=Health,
    response_class=HealthResponse,
    summary="How is it, in detail?",
    responses={
        200: {
            "description": "`pass`, or `warn`: it works, and somebody should look.",
            **_examples(
                HealthResponse.media_type,
                up=_health_example("pass", "up"),
                asleep=_health_example("pass", "asleep", evidence="traffic", mode="passive"),
                warn=_health_example("warn", "up", status="warn", output="read-only"),
                hidden={"status": "pass"},
            ),
        },
        503: {
            "description": "`fail`: it does not do its work.",
            "model": Health,
            **_examples(
                HealthResponse.media_type,
                starting=_health_example("fail", "starting", output="connecting"),
                down=_health_example("fail", "down", output="connection-refused"),
            ),
        },
    },
)
async def health(
    database: DatabaseDep, metrics: MetricsDep, settings: SettingsDep, draining: DrainingDep
) -> HealthResponse:
    """The health of the service by draft-inadarei-api-health-check. Details are hidden in production unless
    `HEALTH_DETAILS=true`, and where `ADMIN_PORT` shows them."""
    return await _health(database, metrics, draining, details=_shows_details(settings))


@insiders.get("/health")
async def health_inside(
    database: DatabaseDep, metrics: MetricsDep, settings: SettingsDep, draining: DrainingDep
) -> HealthResponse:
    return await _health(database, metrics, draining, details=settings.health_details is not False)


async def _health(database: Database, metrics: Metrics, draining: bool, *, details: bool) -> HealthResponse:
    checks = {}
    with metrics.checking("database:connectivity") as conclude:
        observation = await database.check()
        checks["database:connectivity"] = check = _connectivity(observation)
        conclude(check["status"])
    for name, look in (("schema:revision", _schema), ("database:pool", _pool)):
        with metrics.checking(name) as conclude:
            checks[name] = check = look(observation)
            conclude(check["status"])
    with metrics.checking("event_loop:lag") as conclude:
        checks["event_loop:lag"] = check = _loop(metrics.lag())
        conclude(check["status"])
    status = _worst([check["status"] for check in checks.values()], observation.ready)
    if draining and status == "pass":
        status = "warn"
    body: dict[str, Any] = {"status": status}
    if details:
        body["version"] = VERSION
        body["uptime_seconds"] = round(time.monotonic() - _started, 3)
        if draining:
            body["notes"] = ["The process is draining: it answers, and takes no new work."]
        body["checks"] = {name: [check] for name, check in checks.items()}
    return HealthResponse(body, 503 if status == "fail" else 200, headers=_NO_STORE)


@insiders.get("/metrics")
@numbers.get(
    "/metrics",
    response_class=Response,
    summary="The numbers, for Prometheus",
    responses={
        200: {
            "description": "The Prometheus text format, or OpenMetrics where the Accept header asks for it.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
    },
)
async def exposition(database: DatabaseDep, metrics: MetricsDep, accept: AcceptDep) -> Response:
    """Gauges are read at this moment from what the process knows; nothing is sent to the database."""
    metrics.observe(database.observe())
    # With several workers this reads their files, which the event loop need not wait for.
    body, content_type = await to_thread.run_sync(metrics.render, accept)
    return Response(body, headers={**_NO_STORE, "content-type": content_type})


def _shows_details(settings: Settings) -> bool:
    if settings.admin_port is not None:
        return False
    if settings.health_details is None:
        return settings.environment != "production"
    return bool(settings.health_details)


def _worst(outcomes: list[Outcome], ready: bool) -> Outcome:
    if not ready or "fail" in outcomes:
        return "fail"
    return "warn" if "warn" in outcomes else "pass"


def _check(kind: str, status: Outcome, at: datetime | None, value: object, **facts: object) -> dict[str, Any]:
    time_text = None if at is None else at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    check = {"componentType": kind, "status": status, "time": time_text, "observedValue": value}
    return check | {name: fact for name, fact in facts.items() if fact is not None}


def _connectivity(seen: Observation) -> dict[str, Any]:
    age = seen.evidence_age_seconds
    status: Outcome = "pass"
    output = seen.reason
    if seen.status in ("starting", "down"):
        status = "fail"
    elif seen.read_only:
        status, output = "warn", output or "read-only"
    elif seen.status == "up" and (age is None or age > STALE_EVIDENCE_SECONDS):
        status, output = "warn", output or "stale-evidence"
    return _check(
        "datastore",
        status,
        seen.evidence_at,
        seen.status,
        output=output,
        evidence=seen.evidence,
        evidence_age_seconds=None if age is None else round(age, 3),
        mode=seen.mode,
        server_version=seen.server_version,
        read_only=seen.read_only,
    )


_SCHEMA_OUTCOMES: dict[str, Outcome] = {
    "current": "pass",
    "ahead": "warn",
    "unknown": "warn",
    "behind": "fail",
    "foreign": "fail",
}


def _schema(seen: Observation) -> dict[str, Any]:
    schema = seen.schema
    return _check(
        "datastore",
        _SCHEMA_OUTCOMES[schema.status],
        schema.seen_at,
        schema.found,
        expected=schema.expected,
        output=None if schema.status == "current" else f"schema-{schema.status}",
    )


def _pool(seen: Observation) -> dict[str, Any]:
    pool = seen.pool
    crowded = pool.waiting > 0
    return _check(
        "component",
        "warn" if crowded else "pass",
        datetime.now(UTC),
        pool.in_use,
        observedUnit="connections",
        size=pool.size,
        open=pool.open,
        waiting=pool.waiting,
        output="requests are waiting for a connection" if crowded else None,
    )


def _loop(lag: Lag) -> dict[str, Any]:
    late = lag.seconds is not None and lag.seconds > LAG_WARNING_SECONDS
    return _check(
        "system",
        "warn" if late else "pass",
        lag.at,
        None if lag.seconds is None else round(lag.seconds, 6),
        observedUnit="s",
        output="the event loop was blocked within the last ten seconds" if late else None,
    )
