PYTHON ?= python3
PY := .venv/bin/python

.PHONY: help setup dry-run test lint train infer vendor rehearse push chaos bench bench-quality bench-vendor bench-clock bench-lm bench-families bench-encoders clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/.ready ## install everything into .venv, exactly as in wheels/dev.lock

dry-run: .venv/.ready ## the whole flow on the embedded sample competition
	$(PY) -m kit dry-run $(ARGS)

test: .venv/.ready ## run the tests
	$(PY) -m pytest $(ARGS)

lint: .venv/.ready ## check style and types
	$(PY) -m ruff check . && $(PY) -m mypy

train: .venv/.ready ## fit all folds of a recipe: make train RECIPE=name
	$(PY) -m kit train $(RECIPE) $(ARGS)

infer: .venv/.ready ## write a submission: make infer ARGS="…"
	$(PY) -m kit infer $(ARGS)

vendor: .venv/.ready ## the wheels that the competition image lacks, and the kit's own
	$(PY) -m kit vendor wheels $(ARGS)

rehearse: .venv/.ready ## the submission in a sealed box, on the public and on a hidden-like test set
	$(PY) -m kit rehearse $(ARGS)

push: .venv/.ready ## say what would be published; make push SEND=1 publishes
	$(PY) -m kit push $(if $(SEND),,--dry-run) $(ARGS)

chaos: .venv/.ready ## kill and injure runs of the sample competition, and see what becomes of them
	$(PY) -m kit chaos $(ARGS)

bench: bench-quality bench-vendor bench-clock bench-lm bench-families bench-encoders ## run every benchmark, and show all on one page
	$(PY) -m tests.bench.figures

bench-quality: .venv/.ready ## run the benchmark of prediction quality
	$(PY) -m tests.bench.quality $(ARGS)

bench-vendor: .venv/.ready ## run the benchmark of wheel resolution and installation
	$(PY) -m tests.bench.vendor $(ARGS)

bench-clock: .venv/.ready ## run the benchmark of the planner and of what isolation costs
	$(PY) -m tests.bench.clock $(ARGS)

bench-lm: .venv/.ready ## run the benchmark of language-model members
	$(PY) -m tests.bench.lm $(ARGS)

bench-families: .venv/.ready ## run the benchmark of essay regression, extractive QA and language models from scratch
	$(PY) -m tests.bench.families $(ARGS)

bench-encoders: .venv/.ready ## run the benchmark of packed encoders: scoring, training, embedding
	$(PY) -m tests.bench.encoders $(ARGS)

clean: ## remove what was made and the caches; .venv stays
	rm -rf artifacts/* dist .hypothesis .mypy_cache .pytest_cache .ruff_cache && find kit tests -name __pycache__ -prune -exec rm -rf {} +

# The stamps are touched last: an installation that was interrupted starts again from nothing.
.venv/.installed: wheels/dev.lock
	"$(PYTHON)" -m venv --clear .venv && $(PY) -m pip install -r wheels/dev.lock && touch $@

.venv/.ready: .venv/.installed pyproject.toml
	$(PY) -m pip install -q --no-deps --no-build-isolation -e . && touch $@
