#!/usr/bin/env bash
# Installs tkpo into a virtual environment: `bash install.sh [EXTRAS]`, e.g. `bash install.sh dev,deepspeed`.
#   VENV    where to put it (default .venv, for LLaMA-Factory .venv-llamafactory)
#   PYTHON  which Python makes it (default python3; 3.10 or newer); an environment that exists keeps its own
# `bash install.sh llamafactory` makes an environment apart, on requirements-llamafactory.lock; all else is on
# requirements.lock. Python 3.11 and newer get the exact versions of the lock, Python 3.10 the newest that run there.
# Linux without an NVIDIA GPU gets the CPU build of torch and no CUDA package. A second run needs no network.
set -euo pipefail
cd "$(dirname "$0")"
extras="${1:-}"

say() { echo "install.sh: $*"; }
die() { say "$@" >&2; exit 1; }

lock=requirements.lock
llamafactory=
venv="${VENV:-.venv}"
if [[ ",$extras," == *,llamafactory,* ]]; then
  [[ ",$extras," != *,app,* ]] || die "the app and LLaMA-Factory need different releases of gradio: install them apart"
  lock=requirements-llamafactory.lock
  llamafactory=llamafactory==$(sed -n 's/^llamafactory==//p' "$lock")
  venv="${VENV:-.venv-llamafactory}"
fi

# ---- the environment and its Python
if [ -e "$venv/bin/python" ] || [ -L "$venv/bin/python" ]; then
  "$venv/bin/python" -c "" 2> /dev/null ||
    die "$venv/bin/python no longer runs (was its Python removed?): delete the folder $venv and run this again"
  python="$venv/bin/python"
else
  python="${PYTHON:-python3}"
  command -v "$python" > /dev/null || die "no $python found: install Python 3.10 or newer, or name one in PYTHON"
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  die "$("$python" --version) of $python is too old, tkpo needs 3.10 or newer: set PYTHON (and delete $venv if it exists)"
if [ "$python" != "$venv/bin/python" ]; then
  "$python" -m venv "$venv" || die "$python could not make $venv (on Debian and Ubuntu: apt install python3-venv)"
fi
"$venv/bin/python" -m pip --version > /dev/null 2>&1 || "$venv/bin/python" -m ensurepip > /dev/null ||
  die "$venv has no pip: delete the folder and run this again"
pip() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-warn-conflicts "$@"; }

constraint=(--constraint "$lock")
"$venv/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 11))' && constraint=()
[ ${#constraint[@]} -gt 0 ] || say "Python 3.10: some versions of $lock need 3.11, so the newest that run here are taken"

# ---- torch first, so that what follows finds it
torch=torch==$(sed -n 's/^torch==//p' "$lock")
index=()
gpu=yes
command -v nvidia-smi > /dev/null || gpu=
if [ -z "$gpu" ] && [ "$(uname -s)" = Linux ]; then
  torch+=+cpu
  index=(--extra-index-url https://download.pytorch.org/whl/cpu)
fi
say "1 of 2: $torch"
pip --no-deps ${index[@]+"${index[@]}"} "$torch" ||
  die "no $torch for $("$venv/bin/python" --version): is the network there, and has this Python a build of it?"

# ---- then tkpo and the rest, built with what is in the environment: pip's isolated build would need the network
say "2 of 2: tkpo${extras:+[$extras]}"
if [ -n "$llamafactory" ] && [ -z "$gpu" ]; then
  # Its torchvision and torchaudio are linked against CUDA and break the CPU build of torch; of what it names,
  # training on text needs, beyond tkpo's own packages, only omegaconf.
  extras=$(tr , '\n' <<< "$extras" | { grep -vx llamafactory || true; } | paste -sd, -)
  pip --no-deps "$llamafactory"
  pip ${constraint[@]+"${constraint[@]}"} omegaconf
fi
pip ${constraint[@]+"${constraint[@]}"} "setuptools>=77"
pip ${constraint[@]+"${constraint[@]}"} --no-build-isolation --editable ".${extras:+[$extras]}"
say "installed $("$venv/bin/tkpo" --version) in $venv with $("$venv/bin/python" --version)"
say "to use it: source $venv/bin/activate"
