# `make` alone prints what there is to do. PYTHON=/path/to/python3.11 chooses the interpreter .venv is made from,
# ARGS="--run.steps 200" is passed on to the program behind the target, UV=/path/to/uv is used by `make lock`.

SHELL := /bin/bash
VENV := .venv
STAMP := $(VENV)/.complete
# Lies beside the environment, so that it outlives an installation that is interrupted at any moment.
UNFINISHED := .cache/environment-unfinished
# Agents are started as `python ...`: they get the environment's interpreter, as in an activated shell.
ACTIVATE := export VIRTUAL_ENV="$(CURDIR)/$(VENV)" PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
LOG := .cache/install.log
# Torch and transformers side by side with jax: an environment on top of .venv, for `make parity` alone.
PARITY := .venv-parity
PARITY_STAMP := $(PARITY)/.complete
PARITY_MODEL := .cache/smollm2-135m-instruct
# The TPU compiler, which needs no TPU: an environment of its own, for `make tpu-compile` alone.
TPU := .venv-tpu
TPU_STAMP := $(TPU)/.complete
UV ?= uv

.DEFAULT_GOAL := help
.PHONY: help env train serve gateway test parity tpu-compile scaffolds check format lock clean

help:
	@echo 'make train    trains the quickstart on this CPU: report and figures land in runs/quickstart-N'
	@echo 'make serve    serves a policy, ids in and out (ARGS="--policy.path DIR", ARGS=--help)'
	@echo 'make gateway  an LLM API for agents in front of such a server (ARGS="--engine URL --tokenizer DIR", ARGS=--help)'
	@echo 'make test     runs the tests'
	@echo 'make parity   compares policies with transformers on torch (fetches both, and a model of 100 MB)'
	@echo 'make tpu-compile  compiles kernels and train steps for v5e TPUs, on any machine (fetches 0.2 GB)'
	@echo 'make scaffolds  installs the agent programs of configs/scaffolds (ARGS="codex aider" for some of them)'
	@echo 'make check    formatting, lint, types and tests: what CI runs'
	@echo 'make format   formats the code and sorts its imports'
	@echo 'make env      installs .venv (the targets above do it on their own)'
	@echo 'make lock     pins requirements.txt anew from pyproject.toml (needs uv)'
	@echo 'make clean    removes the environments and all caches; runs/ stays'
	@echo
	@echo 'Options: ARGS="..." for the program behind a target, PYTHON=... for the interpreter of .venv.'

env: $(STAMP)

train: $(STAMP)
	@$(ACTIVATE); exec python scripts/train.py $(ARGS)

serve: $(STAMP)
	@$(ACTIVATE); exec python scripts/serve.py $(ARGS)

gateway: $(STAMP)
	@$(ACTIVATE); exec python scripts/gateway.py $(ARGS)

test: $(STAMP)
	@$(ACTIVATE); exec python -m pytest $(ARGS)

parity: $(PARITY_STAMP) $(PARITY_MODEL)/config.json
	@exec $(PARITY)/bin/python -m pytest tests/parity --override-ini 'python_files=parity_*.py' $(ARGS)

tpu-compile: $(TPU_STAMP)
	@exec $(TPU)/bin/python -m pytest -c tests/tpu_compile/pytest.ini tests/tpu_compile $(ARGS)

scaffolds: $(STAMP)
	@$(ACTIVATE); exec python scripts/install_scaffolds.py $(ARGS)

check: $(STAMP)
	@$(ACTIVATE); ruff format --check .
	@$(ACTIVATE); ruff check .
	@$(ACTIVATE); mypy
	@$(ACTIVATE); exec python -m pytest $(ARGS)

format: $(STAMP)
	@$(ACTIVATE); ruff check --fix --select I .
	@$(ACTIVATE); ruff format .

clean:
	rm -rf $(VENV) $(PARITY) $(TPU) .scaffolds .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info

# The pins hold what the package and its tests need, without TensorFlow: docs/adr/001-jetstream-without-tensorflow.md.
lock:
	@mkdir -p .cache
	@echo 'setuptools>=77' > .cache/build.in
	@echo "seqio ; sys_platform == 'never'" > .cache/override.txt
	$(UV) pip compile pyproject.toml .cache/build.in --extra dev --python-version 3.11 --generate-hashes \
	    --no-emit-index-url --no-annotate --override .cache/override.txt --custom-compile-command 'make lock' \
	    --quiet --output-file requirements.txt

# The first Python that is new enough and can make environments; 3.11 is the one the pins were resolved for.
define FIND_PYTHON
found=; bare=; \
for candidate in $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3 python); do \
    "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
    if "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then found=$$candidate; break; fi; \
    bare=$${bare:-$$candidate}; \
done; \
if [ -z "$$found" ] && [ -n "$$bare" ]; then \
    version=$$("$$bare" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
    echo "make: $$bare cannot make virtual environments: its modules venv and ensurepip are missing;" \
        "on Debian and Ubuntu: apt install python$$version-venv" >&2; \
    exit 1; \
fi; \
if [ -z "$$found" ]; then \
    echo "make: no Python 3.11 or newer among: $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python);" \
        "install one (Debian and Ubuntu: apt install python3.11 python3.11-venv)" \
        "or name it: make PYTHON=/path/to/python3.11" >&2; \
    exit 1; \
fi
endef

# Setuptools goes first, so that source packages are built with the pinned one and nothing is fetched beside the pins.
# People see how far it is; what pip says in full is kept in LOG.
define INSTALL
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off; \
pinned="$(VENV)/bin/python -m pip install --no-deps --require-hashes"; \
local="$(VENV)/bin/python -m pip install --no-deps --no-build-isolation"; \
awk '/^[^ ]/ { wanted = /^setuptools==/ } wanted' requirements.txt > .cache/setuptools.txt; \
{ { $$pinned -r .cache/setuptools.txt && $$pinned --no-build-isolation --use-pep517 -r requirements.txt \
    && $$local --editable .; } 2>&1 | tee $(LOG) | awk ' \
    /^Collecting/ { if (++n % 25 == 0) { print "  " n " fetched"; fflush() } } \
    /^Installing collected packages: .*,/ { print "  all fetched, unpacking ..."; fflush() }'; } \
    || { grep -v '^WARNING' $(LOG) | tail -n 15 >&2; \
         echo "make: the installation failed, see above; all of it is in $(LOG)" >&2; exit 1; }
endef

$(STAMP): requirements.txt pyproject.toml
	@set -eu -o pipefail; \
	$(FIND_PYTHON); \
	mkdir -p .cache; \
	rm -f $@; \
	if [ -e $(UNFINISHED) ]; then echo 'the last installation was interrupted: starting afresh'; rm -rf $(VENV); fi; \
	touch $(UNFINISHED); \
	echo "installing $$(grep -c '==' requirements.txt) packages into $(VENV) with $$found, about 2 minutes ..."; \
	"$$found" -m venv $(VENV); \
	$(INSTALL); \
	rm $(UNFINISHED); \
	touch $@; \
	echo "$(VENV) is ready"

# Installs $(2) into the environment $(1) on top of .venv: $(3). The packages of .venv and the folder of the tests are on
# its path, so that pip adds only what is new. The stamp goes first and comes last: an interrupted installation starts
# afresh.
define INSTALL_ON_TOP
@set -eu -o pipefail; \
rm -rf $(1); \
echo "installing $(3) into $(1), about 1 minute ..."; \
$(VENV)/bin/python -m venv $(1); \
below=$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
own=$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
printf '%s\n' "import site; site.addsitedir('$$below')" "$(CURDIR)" > "$$own/below.pth"; \
$(1)/bin/python -m pip install --disable-pip-version-check --progress-bar off -r $(2) \
    > $(1)/install.log 2>&1 || { tail -n 15 $(1)/install.log >&2; \
        echo "make: the installation failed, see above; all of it is in $(1)/install.log" >&2; exit 1; }; \
touch $(1)/.complete; \
echo "$(1) is ready"
endef

$(PARITY_STAMP): requirements-parity.txt $(STAMP)
	$(call INSTALL_ON_TOP,$(PARITY),$<,torch)

$(TPU_STAMP): requirements-tpu.txt $(STAMP)
	$(call INSTALL_ON_TOP,$(TPU),$<,the TPU compiler)

$(PARITY_MODEL)/config.json: scripts/fetch_model.py | $(PARITY_STAMP)
	@rm -rf $(PARITY_MODEL)
	@$(PARITY)/bin/python scripts/fetch_model.py smollm2 --out $(PARITY_MODEL)
