"""The schema's history. `services.schema` runs it; `catalogue` says what its head looks like.

Importing this package does nothing: alembic alone runs `env.py`.
"""
