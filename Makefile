# make test    lint, types and tests
# make bench   the main benchmark: table, plots and JSON under bench/results/latest
# make paper   the paper's experiments in small: a page with pictures, bench/results/paper/index.html, in fifteen minutes
# make machine every kernel in every way that a CPU can execute it, in half an hour; writes tests/evidence.json
# make fuzz    ten minutes of random networks against autograd; FUZZ_OPTIONS="--seed 7 --minutes 0" repeats one seed
# All create .venv and install what they need on first use; PYTHON chooses the interpreter (>= 3.10).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH_OPTIONS ?=
PAPER_OPTIONS ?=
FUZZ_OPTIONS ?= --minutes 10
EVIDENCE := $(CURDIR)/build/evidence.jsonl

.PHONY: test bench paper machine fuzz lint format clean

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

bench: $(VENV)/installed
	$(BIN)/python -m bench $(BENCH_OPTIONS)

paper: $(VENV)/installed
	$(BIN)/python -m bench.paper $(PAPER_OPTIONS)

machine: $(VENV)/installed
	rm -f $(EVIDENCE)
	mkdir -p $(dir $(EVIDENCE))
	RESODE_EVIDENCE=$(EVIDENCE) $(BIN)/python -m pytest -n 2 --dist worksteal -m "machine or not machine" tests/machine tests/fused tests/ops
	$(BIN)/python -m tests.support.evidence --write $(EVIDENCE)

fuzz: $(VENV)/installed
	$(BIN)/python -m tests.support.fuzz $(FUZZ_OPTIONS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The package is installed in place: Python changes need no new install, changes to what is compiled do.
$(VENV)/installed: requirements-dev.txt pyproject.toml setup.py CMakeLists.txt MANIFEST.in $(wildcard csrc/* csrc/*/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "resode_cuda needs Python >= 3.10, got " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt -e .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info resode_cuda/_kernels*.so bench/results/latest
