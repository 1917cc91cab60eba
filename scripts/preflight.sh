#!/usr/bin/env bash
# Checks that this machine can build Seraph. Prints the Python to use on stdout; where something is missing, prints
# what to install on stderr and exits 1.
#
#   scripts/preflight.sh [PYTHON]     PYTHON: a command or path; without it the first Python 3.11+ found
set -euo pipefail

missing=()
need() { # need WHAT DEBIAN FEDORA
  missing+=("  $1
      Debian, Ubuntu:  sudo apt-get install $2
      Fedora, RHEL:    sudo dnf install $3")
}

version_ok='import sys; sys.exit(sys.version_info < (3, 11))'
has_venv='import ensurepip, venv'
has_headers='import pathlib, sys, sysconfig; sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").is_file())'

if [ "$(uname -s)" != Linux ]; then
  echo "preflight: Seraph's engine runs on Linux, this is $(uname -s)" >&2
  exit 1
fi

python=
for candidate in ${1:-python3 python3.14 python3.13 python3.12 python3.11}; do
  if "$candidate" -c "$version_ok" 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  need "Python 3.11 or newer${1:+ ($1 is not one)}" "python3 python3-venv python3-dev" "python3.11 python3.11-devel"
else
  # A Python beside the system's own has packages of its own name: python3.12-venv, python3.12-devel.
  version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
  "$python" -c "$has_venv" 2>/dev/null || need "the venv module of $python" "$version-venv" "$version"
  "$python" -c "$has_headers" || need "Python.h for $python" "$version-dev" "$version-devel"
fi

cxx=${CXX:-}
if [ -z "$cxx" ]; then
  for candidate in g++ c++ clang++; do
    if command -v "$candidate" >/dev/null; then
      cxx=$candidate
      break
    fi
  done
fi
if [ -z "$cxx" ] || ! command -v ${cxx%% *} >/dev/null; then
  need "a C++20 compiler (g++ 12 or newer)${cxx:+: \$CXX is $cxx}" "g++" "gcc-c++"
else
  # Clang calls itself GCC 4.2 in __GNUC__, so it is asked first. 14 is the first with the C++20 that the kernels use.
  macros=$($cxx -dM -E -x c++ /dev/null 2>/dev/null || true)
  clang=$(awk '$2 == "__clang_major__" {print $3}' <<<"$macros")
  gnu=$(awk '$2 == "__GNUC__" {print $3}' <<<"$macros")
  if [ -n "$clang" ]; then
    [ "$clang" -ge 14 ] || need "clang 14 or newer ($cxx is clang $clang)" "g++" "gcc-c++"
  elif [ -z "$gnu" ] || [ "$gnu" -lt 12 ]; then
    need "g++ 12 or newer ($cxx is ${gnu:-not a working compiler})" "g++-12, then set CXX=g++-12" \
      "gcc-toolset-12-gcc-c++, then run under scl enable gcc-toolset-12"
  fi
fi

command -v make >/dev/null || need "make" "make" "make"

if [ ${#missing[@]} -gt 0 ]; then
  {
    echo "preflight: this machine lacks"
    printf '%s\n' "${missing[@]}"
    echo "Then run the same make command again."
  } >&2
  exit 1
fi
"$python" -c 'import sys; print(sys.executable)' # the interpreter itself, not a version manager's shim
