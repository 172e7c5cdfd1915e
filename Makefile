# Two commands: `make demo` does the main job, `make test` runs every check. Both set up .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := runs/demo
# Empty is unset: a process keeps the bytecode it compiles, which is not installed, and the next ones need not compile it again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test check unit setup format clean

demo: $(STAMP)
	$(BIN)/fraqat demo --out $(DEMO)

test: $(STAMP)
	$(MAKE) --no-print-directory -j 2 check unit  # the type checker runs beside the tests

# No worker is replaced: xdist would hand the groups of a lost one to nobody, and wait for them.
unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart 0

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(STAMP)

$(STAMP): constraints.txt pyproject.toml
	@echo "Setting up $(VENV), once: downloads torch and the tools of the tests; minutes without a word."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt "torch" -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis
