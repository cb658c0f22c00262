# Front doors of a fresh machine (Python 3.11-3.13 is enough): each target first makes .venv.
#   make serve   the server with the bundled 2-bit demonstration model and its chat page
#   make demo    one question about a bundled picture: answer, tokens/s, memory
#   make test    every test
#   make check   formatter, linter, type checker, import contracts
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: serve demo test check clean
serve: $(VENV)/.runtime
	$(BIN)/mgvq-serve $(ARGS)

demo: $(VENV)/.runtime
	$(BIN)/python -m benchmarks.demo $(ARGS)

test: $(VENV)/.development
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(ARGS)

check: $(VENV)/.development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/.runtime: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -e ".[cpu,serve]"
	touch $@

$(VENV)/.development: $(VENV)/.runtime
	$(BIN)/pip install --disable-pip-version-check -q -e ".[cpu,serve,bench,test,dev]"
	touch $@
