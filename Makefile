.PHONY: setup demo test check bench
VENV := .venv
BIN := $(VENV)/bin

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@found=""; for python in python3 python3.13 python3.12; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then found=$$python; break; fi; done; \
	if [ -z "$$found" ]; then echo "X-Former needs Python 3.12 or newer; none of python3, python3.13, python3.12 is. Install one and run make setup again." >&2; exit 1; fi; \
	echo "Preparing $(VENV) with $$($$found --version) (about 6 GB, a few minutes the first time)"; \
	$$found -m venv --clear $(VENV) && \
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' && touch $@

demo: setup
	$(BIN)/xformer demo --out demo

test: setup
	$(BIN)/python -m pytest -q

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks --json bench.json
