"""What the reference shows: requests and answers that the service would really take and give."""

from __future__ import annotations

import json
from typing import Any, Final

TASK_ID: Final = "019ac0de-7a10-7c55-8a1c-0d6f3b9e4a21"

TASK: Final[dict[str, Any]] = {
    "id": TASK_ID,
    "user_id": "019ac0dd-01b2-7f00-9d3e-5a7c1e2b4f60",
    "title": "Water the tomatoes",
    "description": "Two litres each, not on the leaves.",
    "is_completed": False,
    "version": 1,
    "created_at": "2026-11-22T09:30:00.000000Z",
    "updated_at": "2026-11-22T09:30:00.000000Z",
}
CHANGED: Final = {**TASK, "is_completed": True, "version": 2, "updated_at": "2026-11-22T18:05:12.250000Z"}
PAGE: Final = {"items": [TASK], "next_cursor": None, "count": None}

NEW: Final = {
    "full": {"title": "Water the tomatoes", "description": "Two litres each, not on the leaves."},
    "least": {"title": "Water the tomatoes"},
}
WHOLE: Final = {"full": {"title": "Water the tomatoes", "description": None, "is_completed": True}}
CHANGE: Final = {"complete": {"is_completed": True}, "clear the description": {"description": None}}
BATCH: Final = {
    "three at once": {
        "operations": [
            {"op": "create", "task": {"title": "Buy stakes"}},
            {"op": "update", "id": TASK_ID, "task": {"is_completed": True}, "if_match": "1-5f3c8a2b4e6d7"},
            {"op": "delete", "id": "019ac0de-8f22-7d31-b7c4-61f5a0e9d310"},
        ]
    }
}
BATCHED: Final = {
    "results": [
        {"op": "update", "id": TASK_ID, "etag": "3b9c1de0a4f275860d1e5b7c92f4a683", "task": CHANGED},
        {"op": "delete", "id": "019ac0de-8f22-7d31-b7c4-61f5a0e9d310", "etag": None, "task": None},
    ]
}
LINES: Final = {
    "titles": '{"title":"Water the tomatoes"}\n{"title":"Buy stakes"}\n',
    "exported": json.dumps(TASK, separators=(",", ":")) + "\n",
}
IMPORTED: Final = {"count": 2}

USER_ID: Final = TASK["user_id"]
USER: Final = {
    "id": USER_ID,
    "email": "ada@example.com",
    "created_at": "2026-11-22T09:12:44.518203Z",
    "updated_at": "2026-11-22T09:12:44.518203Z",
}
# No password and no token that anybody has.
SIGN_UP: Final = {"a new account": {"email": "ada@example.com", "password": "correct horse battery staple"}}
LOG_IN: Final = {"log in": SIGN_UP["a new account"]}
ACCOUNT_CHANGE: Final = {
    "another e-mail": {"current_password": "correct horse battery staple", "email": "ada.l@example.com"},
    "another password": {
        "current_password": "correct horse battery staple",
        "password": "seven small boats at noon",
    },
}
_REFRESH_TOKEN: Final = "gwr_" + "A" * 64
REFRESH: Final = {"the token last given": {"refresh_token": _REFRESH_TOKEN}}
TOKENS: Final = {
    "access_token": "eyJhbGciOiJFZERTQSIsInR5cCI6ImF0K2p3dCJ9.e30.c2lnbmF0dXJl",
    "token_type": "Bearer",
    "expires_in": 300,
    "refresh_token": _REFRESH_TOKEN,
}
JWKS: Final = {
    "keys": [
        {
            "crv": "Ed25519",
            "kty": "OKP",
            "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",
            "kid": "kPrK_qmxVWaYVA9w",
            "use": "sig",
            "alg": "EdDSA",
        }
    ]
}
