"""What insiders ask, on a listener of its own: `/metrics`, and `/health` in detail (ADMIN_PORT)."""

from fastapi import APIRouter, FastAPI

from .application import Application


def beside(app: FastAPI, router: APIRouter) -> FastAPI:
    """An application that answers these routes and shares the state of `app`, and is started and closed with it."""
    admin = Application(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    admin.state = app.state
    admin.passing(metrics=app.state.metrics, max_body_bytes=app.state.settings.max_body_bytes)
    admin.include_router(router)
    return admin
