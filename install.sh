#!/usr/bin/env bash
# Installs tkpo into a virtual environment: `bash install.sh [EXTRAS]`, e.g. `bash install.sh dev,deepspeed`.
#   VENV    where to put it (default .venv)        PYTHON  which Python to use (default python3, 3.10 or newer)
# On a machine without an NVIDIA GPU, torch comes from PyTorch's index of CPU builds, so that no CUDA package is
# downloaded. On Python 3.11, requirements.lock holds every other package to the versions the tests ran with.
set -euo pipefail
cd "$(dirname "$0")"
venv="${VENV:-.venv}"
python="${PYTHON:-python3}"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "install.sh: $("$python" --version) is too old, tkpo needs Python 3.10 or newer: set PYTHON" >&2
  exit 1
}
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"

torch=$(sed -n 's/^ *"\(torch==[^"]*\)",$/\1/p' pyproject.toml)
index=()
command -v nvidia-smi > /dev/null || index=(--extra-index-url https://download.pytorch.org/whl/cpu)
"$venv/bin/pip" install --quiet --no-deps "${index[@]}" "$torch"  # what it needs comes with the rest
lock=()
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' && lock=(--constraint requirements.lock)
extras="${1:-}"
if [[ ",$extras," == *,llamafactory,* ]]; then
  if [ ${#index[@]} -gt 0 ]; then
    # Its torchvision and torchaudio are linked against CUDA and break the CPU build of torch; of what it names,
    # training on text needs, beyond tkpo's own packages, only omegaconf.
    extras=$(tr , '\n' <<< "$extras" | { grep -vx llamafactory || true; } | paste -sd, -)
    llamafactory=$(sed -n 's/^llamafactory = \["\(.*\)"\]$/\1/p' pyproject.toml)
    "$venv/bin/pip" install --quiet "${lock[@]}" --no-deps "$llamafactory"
    "$venv/bin/pip" install --quiet "${lock[@]}" omegaconf
  else
    lock=()  # it wants an older accelerate than the lock
  fi
fi
"$venv/bin/pip" install --quiet "${lock[@]}" --editable ".${extras:+[$extras]}"
echo "installed: $("$venv/bin/tkpo" --version) in $venv"
