# Sourced by setup, build-ffcv-wheel and bundle after args.sh, in the repository's root: what FFCV compiles against, uv, and uv.lock's FFCV.
python_header='import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
have_python() { python3 -c "$python_header" 2>/dev/null; }
have_headers() { command -v pkg-config >/dev/null && pkg-config --exists opencv4 libturbojpeg && command -v c++ >/dev/null && have_python; }
have_venv() { command -v uv >/dev/null || [[ -x .uv/bin/uv ]] || python3 -c 'import ensurepip' 2>/dev/null; }

# Headers and compiler are there afterwards, or the script ends with what is missing.
ensure_headers() {
    have_headers && have_venv && return
    local packages=(g++ pkg-config libopencv-dev libturbojpeg0-dev)
    have_python || packages+=(python3-dev)
    have_venv || packages+=(python3-venv)
    local root=()
    if [[ $(id -u) != 0 ]]; then
        command -v sudo >/dev/null && sudo -n true 2>/dev/null && root=(sudo) || root=(false)
    fi
    if command -v apt-get >/dev/null && [[ ${root[*]-} != false ]]; then
        echo "setup: installing ${packages[*]} (FFCV compiles against them)"
        "${root[@]}" apt-get update -qq
        DEBIAN_FRONTEND=noninteractive "${root[@]}" apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
    fi
    have_headers && have_venv && return
    cat >&2 <<MESSAGE
error: FFCV has to be compiled, and this machine lacks what that needs. Missing:
$(command -v c++ >/dev/null || echo "  a C++ compiler (c++)")
$(command -v pkg-config >/dev/null || echo "  pkg-config")
$(pkg-config --exists opencv4 2>/dev/null || echo "  the OpenCV 4 headers (pkg-config opencv4)")
$(pkg-config --exists libturbojpeg 2>/dev/null || echo "  the TurboJPEG headers (pkg-config libturbojpeg)")
$(have_python || echo "  Python's headers (Python.h)")
$(have_venv || echo "  Python's venv module, or uv")
Debian or Ubuntu, as root:
  apt-get install ${packages[*]}
conda, without root:
  conda install -c conda-forge cxx-compiler pkg-config libopencv libjpeg-turbo python=3.11 uv
Then run ./launch/${0##*/} again. Or make a wheel on another machine with ./launch/build-ffcv-wheel, and here:
  ./launch/setup --ffcv-wheel PATH
MESSAGE
    exit 2
}

# Sets `uv` to a uv that runs.
ensure_uv() {
    uv=$(command -v uv || echo "$PWD/.uv/bin/uv")
    [[ ! -x $uv ]] || return 0
    have_venv ||
        mistake "this machine has neither uv nor Python's venv module. Without root, one of these brings uv:" \
            "  python3 -m pip install --user uv" "  conda install -c conda-forge uv"
    echo "setup: installing uv into .uv"
    python3 -m venv .uv
    .uv/bin/python -m pip install --quiet uv
}

# Sets what uv.lock says of FFCV's source archive: `ffcv_version`, `ffcv_url` and `ffcv_sha256`.
read_locked_ffcv() {
    local entry
    entry=$(sed -n '/^name = "ffcv"$/,/^$/p' uv.lock)
    ffcv_version=$(sed -n 's/^version = "\(.*\)"$/\1/p' <<<"$entry")
    ffcv_url=$(sed -n 's/^sdist = { url = "\([^"]*\)".*/\1/p' <<<"$entry")
    ffcv_sha256=$(sed -n 's/^sdist = .*hash = "sha256:\([0-9a-f]\{64\}\)".*/\1/p' <<<"$entry")
    [[ -n $ffcv_version && -n $ffcv_url && -n $ffcv_sha256 ]] ||
        mistake "uv.lock names no source archive of ffcv with its SHA-256. Restore it: git checkout uv.lock"
}
