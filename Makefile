# The commands of every day. backend/bootstrap.py creates backend/.venv; everything else is here.

.DEFAULT_GOAL := help
.PHONY: help venv venv-dev install install-dev run dev test test-fast test-all test-debian test-versions test-issuers \
	test-neon faults mutants fuzz check format verify psql openapi sbom bench bench-quick clean reset-database \
	upgrade-database

# The first that exists starts backend/bootstrap.py, which goes on to one that is new enough.
candidates := python3 python3.14 python3.13 python3.12 python3.11
PYTHON ?= $(firstword $(foreach name,$(candidates),$(if $(shell command -v $(name) 2>/dev/null),$(name))))
ARGS ?=

# Variables that would point Python elsewhere, or keep it from storing bytecode: 10 s of CPU in each process of the tests.
unexport VIRTUAL_ENV VIRTUAL_ENV_PROMPT PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONUSERBASE PYTHONDONTWRITEBYTECODE \
	__PYVENV_LAUNCHER__ CONDA_PREFIX MAKEFLAGS MFLAGS MAKEOVERRIDES GNUMAKEFLAGS

bootstrap = @test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and none was found: apt-get install python3 python3-venv (Debian), brew install python (macOS)." >&2; exit 1; }; exec "$(PYTHON)" -I backend/bootstrap.py

# `exec` makes the shell become the program, so that Ctrl-C and exit codes reach it and make unchanged.
python := exec backend/.venv/bin/python
in_backend := cd backend && exec .venv/bin/python
sources := src tests benchmarks bootstrap.py

# Most tests wait for processes and clocks, so more of them than cores run side by side.
pytest := exec env GROUNDWORK_FORBID_SKIPS=1 backend/.venv/bin/python -m pytest -n 4 --dist loadgroup

# Few processes, and one PostgreSQL for all: what to run while writing code. About 120 CPU seconds.
fast := $(addprefix backend/tests/,config models server/test_admission.py test_house.py \
	$(addprefix services/,test_tasks.py test_task_pages.py test_isolation.py test_database.py) api/test_tasks.py)

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

venv:
	$(bootstrap)

venv-dev:
	$(bootstrap) --dev

install: venv ## Create backend/.venv and install what running needs (once)
	@echo "Installed in backend/.venv." >&2

install-dev: venv-dev ## Install what tests, linters and benchmarks need, too
	@echo "Installed in backend/.venv." >&2

run: venv ## Serve on http://127.0.0.1:8000 with a PostgreSQL of its own, or with DATABASE_URL; ARGS="--port 8001"
	@$(python) -m src serve --embedded=auto $(ARGS)

dev: venv ## The same, and restart whenever a source file changes
	@$(python) -m src serve --embedded=auto --reload $(ARGS)

test: venv-dev ## Run every test that needs only Python packages; ARGS="-k health"
	@$(pytest) -m "not debian and not root and not slow and not node and not neon" $(ARGS)

test-fast: venv-dev ## Run the quick tests of settings, models, statements and the tasks API (under 2 minutes)
	@$(pytest) $(fast) $(ARGS)

test-debian: venv-dev ## Run the tests that need Debian's PgBouncer, PostgreSQL 15 and faketime
	@.ci/install-debian --check
	@if [ "$$(id -u)" = 0 ]; then $(pytest) -m "(debian or root or slow) and not neon" $(ARGS); fi; \
	echo "Left out: the tests that mount a disk of their own, which only root may (marker root)." >&2; \
	$(pytest) -m "(debian or slow) and not root and not neon" $(ARGS)

test-versions: venv-dev ## Run the core of the tests on PostgreSQL 15, 16 and 17 (npm brings the last two)
	@.ci/install-debian --check
	@$(in_backend) tests/versions.py $(ARGS)

test-issuers: venv-dev ## Run the tests that need Node.js, for a real Better Auth server
	@.ci/install-node --check
	@$(pytest) -m "node and not neon" $(ARGS)

test-all: ## Run all four, also after one that failed or lacks a package
	@$(MAKE) --keep-going PYTHON="$(PYTHON)" test test-debian test-versions test-issuers

test-neon: venv-dev ## Run the tests against NEON_DATABASE_URL, in a throw-away schema
	@test -n "$$NEON_DATABASE_URL" || { echo "NEON_DATABASE_URL is not set: NEON_DATABASE_URL='postgresql://...' make test-neon" >&2; exit 1; }
	@$(pytest) -m neon $(ARGS)

faults: venv-dev ## Load a service while everything fails, then compare (3 minutes); SECONDS= SEED= KINDS= WORKERS= CLIENTS=
	@$(in_backend) -m tests.faults run $(if $(SECONDS),--seconds "$(SECONDS)") $(if $(SEED),--seed "$(SEED)") \
		$(if $(KINDS),--kinds "$(KINDS)") $(if $(WORKERS),--workers "$(WORKERS)") $(if $(CLIENTS),--clients "$(CLIENTS)") $(ARGS)

mutants: venv-dev ## Break the service in twenty ways, and check that make faults would find each; ARGS="ignores-the-key"
	@$(in_backend) -m tests.faults mutants $(if $(SECONDS),--seconds "$(SECONDS)") $(if $(SEED),--seed "$(SEED)") $(ARGS)

fuzz: venv-dev ## Let schemathesis, hypothesis and the corpora search for faults; SECONDS=600 SEED=1
	@$(in_backend) -m tests.fuzzing $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))

check: venv-dev ## Run ruff, import-linter, mypy, and the tests of code base and documents
	@cd backend; failed=; \
	for step in "python -m ruff check $(sources)" "python -m ruff format --check $(sources)" "lint-imports" "python -m mypy" \
		"python -m pytest -q tests/test_house.py tests/test_docs.py"; \
	do echo "== $$step" >&2; .venv/bin/$$step || failed="$$failed $$step;"; done; \
	test -z "$$failed" || { echo "Failed:$$failed" >&2; exit 1; }; echo "All checks passed." >&2

format: venv-dev ## Format the code, and apply ruff's safe fixes
	@cd backend && .venv/bin/python -m ruff check --fix --quiet $(sources); .venv/bin/python -m ruff format $(sources)

verify: venv ## Verify configuration, database, schema and service, each failure with its remedy
	@$(python) -m src verify $(ARGS)

psql: venv ## Open psql on the configured or the running embedded database
	@$(python) -m src psql $(ARGS)

openapi: venv ## Print the OpenAPI description
	@$(python) -m src openapi

bench: venv-dev ## Measure this service and its peers side by side (about 20 minutes); ARGS="--servers ours,floor"
	@$(in_backend) -m benchmarks $(ARGS)

bench-quick: venv-dev ## Check in a minute or two that the benchmark works; its figures mean nothing
	@$(in_backend) -m benchmarks quick

sbom: venv-dev ## Print the bill of materials of what production installs (CycloneDX)
	@production=$$(mktemp -d); trap 'rm -rf "$$production"' EXIT; \
	backend/.venv/bin/python -m venv --without-pip "$$production" && \
	backend/.venv/bin/python -m pip --python "$$production/bin/python" install --quiet --require-hashes \
		--requirement backend/requirements.txt >&2 && \
	backend/.venv/bin/python -m cyclonedx_py environment --pyproject backend/pyproject.toml --output-reproducible \
		"$$production/bin/python"

clean: ## Remove backend/.venv and caches; never data
	@find . \( -name .git -o -name .data \) -prune -o -type d \( -name __pycache__ -o -name .pytest_cache -o -name .mypy_cache \
		-o -name .ruff_cache -o -name .hypothesis -o -name node_modules -o -path './backend/*.venv' \) -prune -exec rm -rf {} +
	@echo "Removed backend/.venv and the caches; data and backend/.env are untouched." >&2

reset-database: venv ## Delete the embedded database and its rows (asks first, refuses while it runs)
	@$(python) -m src.cli.reset_database $(ARGS)

upgrade-database: venv ## Move the embedded database's rows to the installed major version of PostgreSQL
	@$(python) -m src embedded upgrade $(ARGS)
