"""Which web pages may call: origins are taken as browsers write them, and anything else is refused at the start."""

from __future__ import annotations

import pytest

from src.config.settings import as_environment, load_settings
from src.errors import ConfigurationError


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("https://app.example.com", ("https://app.example.com",)),
        (" https://App.Example.com/ ,http://localhost:5173", ("https://app.example.com", "http://localhost:5173")),
        ("https://a.example.com:443,http://a.example.com:80", ("https://a.example.com", "http://a.example.com")),
        ("https://a.example.com:80", ("https://a.example.com:80",)),
        ("http://[::1]:3000,capacitor://localhost", ("http://[::1]:3000", "capacitor://localhost")),
        ("https://a.example.com,https://a.example.com/", ("https://a.example.com",)),
        ("*", ("*",)),
        (" , ", ()),
    ],
)  # fmt: skip
def test_origins_are_kept_as_browsers_write_them(
    monkeypatch: pytest.MonkeyPatch, given: str, taken: tuple[str, ...]
) -> None:
    monkeypatch.setenv("CORS_ORIGINS", given)
    settings = load_settings()
    assert settings.cors_origins == taken
    monkeypatch.setenv("CORS_ORIGINS", as_environment(settings)["CORS_ORIGINS"])
    assert load_settings().cors_origins == taken


@pytest.mark.parametrize(
    "given",
    [
        "null",
        "app.example.com",
        "https://app.example.com/path",
        "https://*.example.com",
        "https://user@app.example.com",
        "https://a.example.com https://b.example.com",
        "*,https://app.example.com",
        "https://",
    ],
)
def test_what_is_no_origin_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("CORS_ORIGINS", given)
    with pytest.raises(ConfigurationError) as refused:
        load_settings()
    (fault,) = refused.value.faults
    assert fault.variable == "CORS_ORIGINS"
    assert given not in fault.problem
