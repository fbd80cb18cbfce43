# Each target works in a fresh clone: it makes .venv if it is missing and installs what it needs.
PYTHON ?= python3
# `make CPU=1 brains` installs PyTorch without CUDA, 0.9 GB instead of 5.7
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
export NO_CPU_BUILD = error: $(CPU_INDEX) gives no CPU build of PyTorch here; leave CPU=1 out, or name another index with CPU_INDEX=URL

brains: .venv/installed
	.venv/bin/python predict.py resources/pretrained/vqvae.pth --prior resources/pretrained/autoregressive.pth
	.venv/bin/python predict.py resources/pretrained/vqvae.pth --prior resources/pretrained/autoregressive.pth --slice 0-31

demo: .venv/installed
	.venv/bin/python train.py --demo --out gen_imgs/demo
	run="$$(dirname "$$(ls -td gen_imgs/demo/*/vqvae.pth | head -n 1)")" && \
	.venv/bin/python predict.py "$$run/vqvae.pth" --out "$$run" && \
	.venv/bin/python predict.py "$$run/vqvae.pth" --prior "$$run/generator.pth" --samples 64 --out "$$run" && \
	echo "The demo is done. Look at $$run/index.html; docs/usage.md says what each file is."

# two workers with a thread each, files kept together because their tests share trained networks
test: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# longer versions of some tests, by hand: 72,500 strange inputs; 1,000 kills. Hypothesis keeps each input until its test
# ends, so ten processes do it, of 2 GB each.
fuzz: .venv/installed
	for seed in 1 2 3 4 5 6 7 8 9 10; do \
	FUZZ=1000 .venv/bin/python -m pytest --hypothesis-seed=$$seed tests/test_fuzz*.py || exit 1; done

kills: .venv/installed
	KILLS=80 OMP_NUM_THREADS=1 .venv/bin/python -m pytest -s tests/test_interruption.py -k killed

# what only a machine with a GPU can show
gpu-check: .venv/installed
	.venv/bin/python benchmarks/gpu_check.py

# written last, so that an installation that was interrupted starts again
.venv/installed: requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=/path/to/python3.11 …" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --upgrade --quiet pip
	$(if $(CPU),.venv/bin/pip install --quiet --index-url $(CPU_INDEX) torch torchvision || { echo "$$NO_CPU_BUILD"; exit 1; })
	.venv/bin/pip install --quiet -r requirements.txt -r requirements-dev.txt $(if $(CPU),,-c constraints.txt)
	touch $@

# the newest versions, to be tested before they are committed
constraints: .venv/installed
	.venv/bin/pip install --upgrade --quiet -r requirements.txt -r requirements-dev.txt
	.venv/bin/pip freeze | grep -iE "^($$(sed -n 's/>=.*//p' requirements.txt requirements-dev.txt | paste -sd '|'))==" | sed 's/+.*//' > constraints.txt

.PHONY: brains demo test fuzz kills gpu-check constraints
