"""The version of the product; `pyproject.toml` states the same, and a test holds the two together."""

VERSION = "0.1.0"
