# make demo        train three methods side by side on the embedded world, and write the report
# make test        the fast tests            make test-slow   the end-to-end tests
# make test-trl    those of the adapter for TRL, with its newest and its oldest release (a part of test-slow)
# make test-verl   those of the adapter for verl, training on this CPU included (a part of test-slow)
# make test-skyrl  those of the adapter for SkyRL, with its own methods (a part of test-slow)
# make bench       measure speed beside TRL, transformers, tantivy and bm25s: results/performance.json and .md, a quarter of an hour
# make tables      write the tables of README.md and docs/ anew from results/
# make check       lint, format, types, tests
# make clean       remove what these targets made, the environment included

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO := runs/demo
PURELIB := import sysconfig; print(sysconfig.get_path('purelib'))
TRL_NEWEST := 1.16.0
TRL_OLDEST := 1.8.0
VERL_RELEASE := 0.9.1
SKYRL_RELEASE := 0.3.0

export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slow test-trl test-verl test-skyrl tables bench check clean

demo: $(VENV)/.train-installed
	$(BIN)/turnwise reproduce --name demo --seeds 1 --runs runs --results $(DEMO) --eval-size 200 \
		--train.tasks-per-step 8 --train.group-size 12
	$(BIN)/turnwise report $(DEMO)/grpo-or-0 $(DEMO)/grpo-mr-0 $(DEMO)/mt-grpo-0 --out $(DEMO)/report.html

test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest

# pytest leaves with 5 where it finds no test: right only as long as no test is slow.
test-slow: $(VENV)/.dev-installed test-trl test-verl test-skyrl
	$(BIN)/python -m pytest -m slow || { [ $$? -eq 5 ] && ! grep -rq "mark\.slow" tests; }

# The two runs in two processes take most of the time: with the newest release alone.
test-trl: .venv-trl-$(TRL_NEWEST)/.installed .venv-trl-$(TRL_OLDEST)/.installed
	PYTHONPATH=src .venv-trl-$(TRL_NEWEST)/bin/python -m pytest -m slow tests/test_adapters_trl.py
	PYTHONPATH=src .venv-trl-$(TRL_OLDEST)/bin/python -m pytest -m slow tests/test_adapters_trl.py -k "not in_two_processes"

test-verl: .venv-verl/.installed
	.venv-verl/bin/python -m pytest -m slow tests/test_adapters_verl_live.py

test-skyrl: .venv-skyrl/.installed
	PYTHONPATH=src .venv-skyrl/bin/python -m pytest -m slow tests/test_adapters_skyrl_live.py

# BENCH="--quick" for a look; BENCH="--only floor scaling" for some of it, --data for where TriviaQA is.
bench: .venv-trl-$(TRL_NEWEST)/.installed $(VENV)/.bench-installed
	PYTHONPATH=src $(BIN)/python benchmarks/all.py --trl-python .venv-trl-$(TRL_NEWEST)/bin/python $(BENCH)

tables:
	$(PYTHON) experiments/tables.py

check: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) .venv-trl-* .venv-verl .venv-skyrl $(DEMO) build dist .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp per set of packages: a second call installs nothing.
$(VENV)/.train-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[train]"
	touch $@

$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e ".[dev]"
	touch $@ $(VENV)/.train-installed

$(VENV)/.bench-installed: pyproject.toml constraints.txt $(VENV)/.dev-installed
	$(PIP_INSTALL) -e ".[bench]"
	touch $@

# An environment per release of TRL: its packages beside those of the main one, which it sees through a path file.
# The oldest needs requests and jmespath without asking for them.
.venv-trl-%/.installed: constraints-trl.txt $(VENV)/.dev-installed
	$(PYTHON) -m venv .venv-trl-$*
	$(BIN)/python -c "$(PURELIB)" > $$(.venv-trl-$*/bin/python -c "$(PURELIB)")/main.pth
	.venv-trl-$*/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -c constraints-trl.txt "trl==$*" requests jmespath
	touch $@

# verl wants older releases of transformers and what goes with it: they stand before those of the main environment.
# This project is installed, as verl finds the plugin by its entry point.
.venv-verl/.installed: pyproject.toml constraints-verl.txt $(VENV)/.dev-installed
	$(PYTHON) -m venv .venv-verl
	$(BIN)/python -c "$(PURELIB)" > $$(.venv-verl/bin/python -c "$(PURELIB)")/main.pth
	.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints-verl.txt "verl==$(VERL_RELEASE)" TransferQueue pyzmq msgspec cachetools fastapi uvicorn
	.venv-verl/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# SkyRL itself without what its trainer wants for GPUs: its methods need these alone.
.venv-skyrl/.installed: constraints-skyrl.txt $(VENV)/.dev-installed
	$(PYTHON) -m venv .venv-skyrl
	$(BIN)/python -c "$(PURELIB)" > $$(.venv-skyrl/bin/python -c "$(PURELIB)")/main.pth
	.venv-skyrl/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		"skyrl==$(SKYRL_RELEASE)" skyrl-gym==0.4.0
	.venv-skyrl/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-skyrl.txt \
		aiohttp func_timeout loguru omegaconf ray torchdata
	touch $@
