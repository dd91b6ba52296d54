#!/usr/bin/env bash
# Makes `import bmtrain` work beside the torch that is installed: from the wheel where there is one for this Python, else
# built from the source distribution for this GPU.
set -euo pipefail

VERSION=1.0.1
usage="usage: tools/build_bmtrain.sh [--python FILE] [--arch CAPABILITY] [--nccl FOLDER] [--source] [--keep FOLDER]

  --python FILE      the Python to install into (python3)
  --arch CAPABILITY  of the GPU: 8.0 (A100), 9.0 (H100), '8.0 9.0'; default: those of the GPUs that torch sees here
  --nccl FOLDER      with include/nccl.h and lib/libnccl.so.2; default: the one that torch uses
  --source           build it even where there is a wheel
  --keep FOLDER      leave the sources and what was built there"

say() { printf 'bmtrain: %s\n' "$*"; }
fail() {
    printf 'bmtrain: %s\n' "$*" >&2
    exit 1
}

python=python3 arch="" nccl="" source="" keep=""
while (($#)); do
    case $1 in
        --python | --arch | --nccl | --keep)
            (($# > 1)) || fail "$1 wants a value"
            printf -v "${1#--}" '%s' "$2"
            shift 2
            ;;
        --source) source=yes && shift ;;
        -h | --help) printf '%s\n' "$usage" && exit ;;
        *) printf '%s\n' "$usage" >&2 && exit 2 ;;
    esac
done
python=$(command -v "$python") || fail "no such Python; name one with --python FILE"

ask() { # what a line of Python prints; warnings of torch go nowhere
    "$python" -W ignore -c "$1" 2>/dev/null
}

# --- what is here

ask "import torch" || fail "torch is not installed for $python. Install the project first: pip install -e ."
built_for=$(ask "import torch; print(torch.version.cuda or '')")
release=$(ask "import sys; print('{}.{}'.format(*sys.version_info))")
seen=$(ask "import torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(*sorted({'{}.{}'.format(*torch.cuda.get_device_capability(i)) for i in range(n)}))")
if [[ -z $seen && -z $arch ]]; then
    fail "torch sees no NVIDIA GPU here (torch $(ask "import torch; print(torch.__version__)")), and bmtrain needs one;" \
        "the engine torch does without. To build for the GPUs of another machine, name them: --arch 9.0"
fi
[[ -n $arch ]] || arch=$seen
for one in $arch; do
    [[ $one =~ ^[0-9]+\.[0-9]$ ]] || fail "--arch: found '$one', expected a compute capability such as 9.0"
done

find_nccl() {
    # libtorch_cuda of the wheels loads the NCCL of the package nvidia-nccl-cu*; others bring the system's.
    ask "import nvidia.nccl; print(nvidia.nccl.__path__[0])" && return
    local place
    for place in "${CUDA_HOME:-/usr/local/cuda}" /usr/local /usr; do
        [[ -e $place/include/nccl.h ]] && printf '%s\n' "$place" && return
    done
}

check() { # with torch's own NCCL, which torch loads first
    local said
    if said=$("$python" -W ignore -c "import torch, bmtrain, bmtrain.nccl; print(bmtrain.__file__)" 2>&1); then
        say "import bmtrain works: $(tail -n 1 <<<"$said")"
    else
        printf '%s\n' "$said" >&2
        [[ -n $built_for ]] || fail "installed, but not importable: this torch is built for CPUs and brings no NCCL"
        fail "installed, but not importable; \`fm9g doctor\` may say more"
    fi
}

# Its requirement nvidia-nccl-cu11 would be written over the NCCL of torch, file by file: never install requirements.
install=("$python" -m pip install --disable-pip-version-check --quiet --no-deps --no-cache-dir)

# --- the wheel

if [[ -z $source && $release =~ ^3\.1[01]$ && $(uname -sm) == "Linux x86_64" ]]; then
    say "installing the wheel of bmtrain $VERSION for Python $release"
    # Its own kernels end at 8.0, but the engine calls none of them: NCCL carries its messages, torch does the rest.
    "${install[@]}" --only-binary=:all: "bmtrain==$VERSION"
    check
    exit
fi

# --- the source distribution

work=${keep:-$(mktemp -d)}
[[ -n $keep ]] || trap 'rm -rf "$work"' EXIT
mkdir -p "$work"
work=$(cd "$work" && pwd)

command -v nvcc >/dev/null || PATH=${CUDA_HOME:-/usr/local/cuda}/bin:$PATH
command -v nvcc >/dev/null || fail "nvcc is missing. Install the CUDA toolkit${built_for:+ $built_for, the version that this torch was" \
    "built for}, and set CUDA_HOME to its folder or put nvcc on the PATH"
command -v "${CXX:-c++}" >/dev/null || fail "there is no C++ compiler. Install g++, or set CXX"
headers=$(ask "import sysconfig; print(sysconfig.get_path('include'))")
[[ -e $headers/Python.h ]] || fail "$headers/Python.h is missing. Install the headers of Python $release (python$release-dev)"
[[ -n $nccl ]] || nccl=$(find_nccl) || true
[[ -n $nccl ]] || fail "NCCL is not found: neither the package nvidia-nccl-cu* beside torch nor nccl.h of the system. Name its folder with --nccl"
[[ -e $nccl/include/nccl.h ]] || fail "$nccl/include/nccl.h is missing; name another folder with --nccl"
compiler=$(nvcc --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
known=$(nvcc --list-gpu-code)
architectures=""
for one in $arch; do
    grep -qx "sm_${one/./}" <<<"$known" || fail "nvcc $compiler does not know GPUs of capability $one. Take another CUDA toolkit"
    architectures+="${architectures:+;}${one/./}"
done
if [[ -n $built_for && ${built_for%%.*} != "${compiler%%.*}" ]]; then
    say "note: nvcc is of CUDA $compiler, torch of $built_for; bmtrain links its own runtime, which the driver must be new enough for"
fi

say "building bmtrain $VERSION for Python $release, capability $arch, nvcc $compiler, NCCL in $nccl"
# Fetched without running its build file, whose own requirements include nvidia-nccl-cu11.
"$python" -m pip download --disable-pip-version-check --quiet --no-deps --no-binary=:all: --no-build-isolation \
    --dest "$work" "bmtrain==$VERSION"
tar -xzf "$work/bmtrain-$VERSION.tar.gz" -C "$work"
folder=$work/bmtrain-$VERSION

# It names GPUs from 6.1 to 8.6, of which newer compilers know only some, and C++14, which they have left.
sed -i \
    -e "s/set(CMAKE_CUDA_ARCHITECTURES .*/set(CMAKE_CUDA_ARCHITECTURES \"$architectures\")/" \
    -e "s/CUDA_ARCHITECTURES \"[0-9;]*\"/CUDA_ARCHITECTURES \"$architectures\"/" \
    -e '/CMAKE_CUDA_FLAGS.*-gencode/d' \
    -e 's/\(CMAKE_\(CXX\|CUDA\)_STANDARD\) 14/\1 17/' \
    "$folder/CMakeLists.txt"
sed -i -e '/nvidia-nccl-cu11/d' -e 's/CXX_STANDARD=14/CXX_STANDARD=17/' "$folder/setup.py"
sed -i -e '/nvidia-nccl-cu11/d' -e '/"cmake /d' "$folder/pyproject.toml"
if grep -q 'gencode\|STANDARD 14\|61;62' "$folder/CMakeLists.txt" || grep -q 'nccl-cu11' "$folder/setup.py" "$folder/pyproject.toml"; then
    fail "the sources of bmtrain $VERSION are not those that this script knows how to change"
fi

tools=$work/tools
needed=(pybind11 "setuptools>=68" wheel)
command -v cmake >/dev/null || needed+=(cmake)
"$python" -m pip install --disable-pip-version-check --quiet --no-cache-dir --upgrade --target "$tools" "${needed[@]}"
export PYTHONPATH=$tools${PYTHONPATH:+:$PYTHONPATH} PATH=$tools/bin:$PATH
export NCCL_INCLUDE_DIR=$nccl/include NCCL_LIB_DIR=$nccl/lib
export CUDACXX=${CUDACXX:-$(command -v nvcc)} CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
export CMAKE_ARGS="-DPython_EXECUTABLE=$python -DPython_INCLUDE_DIR=$headers -DCMAKE_POLICY_VERSION_MINIMUM=3.5"
log=$work/build.log
if ! "${install[@]}" --no-build-isolation --verbose "$folder" >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    fail "the build failed; the end of its messages is above. With --keep FOLDER all of them stay, in FOLDER/build.log"
fi
check
