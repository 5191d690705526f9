"""Configuration: the settings, the database address, and how the service logs."""

from pathlib import Path

BACKEND = Path(__file__).resolve().parents[2]
