# Everything a newcomer types. The environment is .venv; each step leaves a stamp there, so a
# second run starts at once.

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet --no-input
INSTALL := $(PIP) install --no-deps --require-hashes
ARGS ?=

.PHONY: serve test check test-reference test-clients test-cluster docs generated wheel lock clean

serve: $(VENV)/.serve
	@exec $(VENV)/bin/trivec serve $(ARGS)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not reference" --ignore=tests/reference --ignore=tests/clients --ignore=tests/cluster $(ARGS)

check: $(VENV)/.test $(VENV)/.check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# Other people's clients and fuzzers, whose packages would slow `make test` down.
test-clients: $(VENV)/.clients $(VENV)-apart/.done $(VENV)-weaviate/.done
	$(VENV)/bin/python -m pytest tests/clients $(ARGS)

# On a Ray cluster of two nodes, which are processes of this machine, and through Ray's handles.
test-cluster: $(VENV)/.cluster
	$(VENV)/bin/python -m pytest tests/cluster $(ARGS)
	$(VENV)/bin/python -m pytest tests/contract -k ray $(ARGS)

# Compares with torch, transformers and FlagEmbedding: about 1 GB of packages.
test-reference: $(VENV)/.test $(VENV)/.reference
	$(VENV)/bin/python -m pytest -m reference --ignore=tests/clients --ignore=tests/cluster $(ARGS)

# The site, into build/site; a broken link or anchor stops it.
docs: $(VENV)-docs/.done
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

# What is made from the code and the pins, `man trivec` among it; tests say when something is stale.
generated: $(VENV)/.test
	$(VENV)/bin/python scripts/configuration.py > docs/configuration.md
	$(VENV)/bin/python scripts/reference.py
	$(VENV)/bin/python scripts/sbom.py

# The wheel that is published, with Swagger UI for /docs; needs npm.
wheel: $(VENV)/.serve
	scripts/vendor
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

# Moves every pin to the newest version that fits; needs uv on the path.
lock:
	python3 scripts/lock.py

clean:
	rm -rf $(VENV) $(VENV)-* build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@scripts/make-venv $(VENV)

$(VENV)/.serve: requirements/serve.txt pyproject.toml | $(VENV)/bin/python
	@echo "Installing Trivec into $(VENV): about a minute, once." >&2
	@$(INSTALL) -r requirements/serve.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.test: requirements/test.txt $(VENV)/.serve
	@echo "Installing the tests' tools." >&2
	@$(INSTALL) -r $<
	@touch $@

$(VENV)/.check: requirements/check.txt $(VENV)/.serve
	@$(INSTALL) -r $<
	@touch $@

$(VENV)/.clients: requirements/clients.txt $(VENV)/.test
	@echo "Installing the clients that CI tries." >&2
	@$(INSTALL) -r $<
	@touch $@

$(VENV)/.cluster: requirements/cluster.txt $(VENV)/.test
	@echo "Installing Ray." >&2
	@$(INSTALL) -r $<
	@touch $@

# Environments of their own: tools and clients that want other versions than ours.
$(VENV)-%/.done: requirements/%.txt
	@scripts/make-venv $(VENV)-$*
	@$(VENV)-$*/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --require-hashes -r $<
	@touch $@

$(VENV)/.reference: requirements/reference.txt requirements/torch.txt $(VENV)/.test
	@echo "Installing the reference implementations: some minutes, once." >&2
	@$(PIP) install -r requirements/torch.txt
	@$(INSTALL) -r $<
	@touch $@
