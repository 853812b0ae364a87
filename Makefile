# The series in two commands: `make run` and `make test`. Everything below them is a convenience.
PYTHON ?= python3
VENV ?= .venv
PROFILE ?= auto
PARAMS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup run test lab pocket refresh clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  for run: PROFILE=auto|pocket|gpt2-medium  RUN=name  PARAMS=\"-p key value ...\""

setup: $(READY)  ## make the environment alone (.venv)

$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Python 3.11 to 3.13 is needed: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e ".[test]"
	@touch $@

run: $(READY)  ## run the four notebooks into runs/RUN and print the before/after table
	$(BIN)/python -m alpaca_helpers.series --profile $(PROFILE) $(if $(RUN),--run $(RUN)) $(PARAMS)

test: $(READY)  ## unit tests, then the notebooks' stored outputs against fresh ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest
	$(BIN)/python -m alpaca_helpers.series --prepare build/nbval --profile pocket
	$(BIN)/python -m pytest --nbval build/nbval

lab: $(READY)  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

pocket: $(READY)  ## rebuild the shipped model from its facts
	$(BIN)/python -m alpaca_helpers.pocket.build

refresh: $(READY)  ## execute the notebooks in place on the pocket and clean them
	$(BIN)/python -m alpaca_helpers.series --refresh

clean:  ## remove what can be made again, runs excepted
	rm -rf build $(VENV) .pytest_cache .ruff_cache *.egg-info
