#!/usr/bin/env bash
# Build the stand-ins into a folder: tests/nullgpu/build.sh FOLDER

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
packages="$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")"
mkdir -p "$1"
library=(gcc -O2 -shared -fPIC -Wno-unused-parameter)
"${library[@]}" -Wl,-soname,libnvidia-ml.so.1 -o "$1/libnvidia-ml.so.1" nvml.c
"${library[@]}" -Wl,-soname,libcuda.so.1 -o "$1/libcuda.so.1" \
    nullgpu.c driver.c libraries.c -Iinclude -I"$packages/nvidia/cu13/include" -lpthread \
    -Wl,--no-as-needed -L"$1" -l:libnvidia-ml.so.1 -Wl,-rpath,'$ORIGIN'
