"""Issuers of tokens for the tests: keys made on the spot, and a real HTTP server that publishes them, well or badly."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

ALGORITHMS = ("RS256", "ES256", "EdDSA")


def private_key(algorithm: str) -> Any:
    if algorithm == "RS256":
        return rsa.generate_private_key(65537, 2048)
    return ec.generate_private_key(ec.SECP256R1()) if algorithm == "ES256" else Ed25519PrivateKey.generate()


def public_jwk(key: Any, **members: Any) -> dict[str, Any]:
    public = key.public_key()
    kinds = {rsa.RSAPublicKey: RSAAlgorithm, ec.EllipticCurvePublicKey: ECAlgorithm}
    method = next((method for kind, method in kinds.items() if isinstance(public, kind)), OKPAlgorithm)
    return {**method.to_jwk(public, as_dict=True), **members}  # type: ignore[attr-defined]


def encoded(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def by_hand(header: object, claims: object, sign: Callable[[bytes], bytes] = lambda _: b"x" * 64) -> str:
    """A token of any header and claims, also such as no library would make."""
    signed = f"{encoded(header)}.{encoded(claims)}"
    return f"{signed}.{encoded(sign(signed.encode()))}"


def hs256(secret: bytes) -> Callable[[bytes], bytes]:
    return lambda data: hmac.new(secret, data, hashlib.sha256).digest()


class Issuer:
    """Signs tokens with one of its keys, and knows its JWKS."""

    def __init__(self, name: str = "https://id.example.com/", audience: str = "tasks", **keys: str) -> None:
        """`keys`: the algorithm of each key id; without any, one Ed25519 key called `first`."""
        self.name = name
        self.audience = audience
        self.keys: dict[str, tuple[str, Any]] = {}
        for kid, algorithm in (keys or {"first": "EdDSA"}).items():
            self.add(kid, algorithm)

    def add(self, kid: str, algorithm: str = "EdDSA") -> None:
        self.keys[kid] = (algorithm, private_key(algorithm))

    def rotate(self, kid: str, algorithm: str = "EdDSA") -> None:
        self.keys.clear()
        self.add(kid, algorithm)

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Good claims, changed; one that is set to `...` is left out."""
        now = int(time.time())
        good = {"iss": self.name, "aud": self.audience, "sub": "ana", "iat": now, "exp": now + 600}
        return {name: value for name, value in {**good, **changes}.items() if value is not ...}

    def token(self, kid: str | None = None, headers: Mapping[str, Any] | None = None, **changes: Any) -> str:
        kid = kid if kid is not None else next(iter(self.keys))
        algorithm, key = self.keys[kid]
        return jwt.encode(self.claims(**changes), key, algorithm, headers={"kid": kid, **(headers or {})})

    def bearer(self, kid: str | None = None, **changes: Any) -> str:
        return f"Bearer {self.token(kid, **changes)}"

    def jwks(self) -> dict[str, Any]:
        return {
            "keys": [
                public_jwk(key, kid=kid, alg=algorithm, use="sig")
                for kid, (algorithm, key) in self.keys.items()
            ]
        }


class JwksServer:
    """Publishes what `document` gives at the moment of asking. `answer`, where set, replaces the whole answer.

    `asked` holds the times of all requests. While `held` is cleared an answer that is already chosen waits.
    """

    def __init__(self, document: Callable[[], Any], tls: ssl.SSLContext | None = None) -> None:
        self.document = document
        self.answer: Callable[[BaseHTTPRequestHandler], None] | None = None
        self.asked: list[float] = []
        self.held = threading.Event()
        self.held.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(time.monotonic())
                if outer.answer is not None:
                    outer.answer(self)
                    return
                found = outer.document()
                body = found if isinstance(found, bytes) else json.dumps(found).encode()
                outer.held.wait(30)
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            # Clients that hang up are a part of the tests.
            handle_error = staticmethod(lambda *_: None)  # type: ignore[assignment]

        self._server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._scheme = "https" if tls is not None else "http"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        host = "localhost" if self._scheme == "https" else "127.0.0.1"
        return f"{self._scheme}://{host}:{self.port}/.well-known/jwks.json"

    def entry(self, issuer: Issuer) -> dict[str, str]:
        """The issuer as AUTH_ISSUERS has it."""
        return {"issuer": issuer.name, "jwks_url": self.url, "audience": issuer.audience}

    def __enter__(self) -> JwksServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.held.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
