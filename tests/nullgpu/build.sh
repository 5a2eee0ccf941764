#!/usr/bin/env bash
# Build the stand-ins into a folder: tests/nullgpu/build.sh FOLDER

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
packages="$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")"
mkdir -p "$1"
gcc -O2 -shared -fPIC -Wno-unused-parameter -Wl,-soname,libcuda.so.1 -o "$1/libcuda.so.1" \
    nullgpu.c driver.c libraries.c -Iinclude -I"$packages/nvidia/cu13/include" -lpthread
