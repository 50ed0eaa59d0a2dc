#!/usr/bin/env bash
# Makes .venv with everything prefopt needs. Usage: scripts/setup.sh [extra], e.g. test. Needs Python 3.11 or newer, nothing else.
# A torch that the machine's Python already has is used as it is. Otherwise: a CUDA build where there is an NVIDIA GPU, a CPU build elsewhere.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-}
stamp=.venv/.ready-${extra:-base}
if [ -f "$stamp" ] && [ "$stamp" -nt pyproject.toml ]; then exit 0; fi

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "prefopt needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)

if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  if host_torch=$("$python" -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parent.parent)' 2>/dev/null); then
    echo "using the torch of $python"
    # After .venv's own packages on the path, so that only what is missing there comes from the host.
    echo "$host_torch" > "$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/zz_host_torch.pth"
  elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo "installing torch with CUDA"; "${pip[@]}" torch==2.13.0
  else
    echo "installing torch for the CPU"
    # The CPU index is not reachable from every network; plain PyPI has the same version.
    "${pip[@]}" --index-url https://download.pytorch.org/whl/cpu --retries 0 --timeout 10 torch==2.13.0 2>/dev/null || "${pip[@]}" torch==2.13.0
  fi
fi
echo "installing prefopt"
"${pip[@]}" uv 2>/dev/null || true
target=".${extra:+[$extra]}"
# uv takes seconds where pip takes minutes. It does not look at the host's packages, so torch, which is there by now, is taken off its list.
if [ -x .venv/bin/uv ] && echo "torch; python_version < '3'" > .venv/no-torch.txt &&
   VIRTUAL_ENV=$PWD/.venv .venv/bin/uv pip install --quiet --override .venv/no-torch.txt -e "$target"; then :
else "${pip[@]}" -e "$target"; fi
touch "$stamp"
