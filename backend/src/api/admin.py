"""What insiders ask, on a listener of its own: `/metrics`, and `/health` in detail (ADMIN_PORT)."""

from fastapi import APIRouter, FastAPI

from . import problems
from .middleware import RequestMiddleware


def beside(app: FastAPI, router: APIRouter) -> FastAPI:
    """An application that answers these routes and shares the state of `app`, and is started and closed with it."""
    admin = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    admin.state = app.state
    admin.add_middleware(
        RequestMiddleware,
        metrics=app.state.metrics,
        max_body_bytes=app.state.settings.max_body_bytes,
    )
    problems.install(admin)
    admin.include_router(router)
    return admin
