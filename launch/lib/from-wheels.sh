# Sourced by setup, in the repository's root: the environment from the folder $wheels that launch/bundle filled, without
# network, compiler, root or pip. Nothing of it is used before its digests are checked.

# Sets what the file TARGET says of the machine that the wheels are for: for_python, for_machine, for_glibc, for_system.
read_target() {
    # In a bundle, SHA256SUMS is what was written last.
    [[ -f $wheels/TARGET && -f $wheels/SHA256SUMS && -f $wheels/requirements.txt && (! -f COMMIT || -f SHA256SUMS) ]] ||
        mistake "this bundle is not complete, or $wheels is no folder of wheels." "Copy the bundle again, or make it again: ./launch/bundle"
    for_python=$(sed -n 's/^python //p' "$wheels/TARGET")
    for_machine=$(sed -n 's/^machine //p' "$wheels/TARGET")
    for_glibc=$(sed -n 's/^glibc //p' "$wheels/TARGET")
    for_system=$(sed -n 's/^system //p' "$wheels/TARGET")
}

# check_machine: ends with a message unless processor and glibc are what the wheels are for.
check_machine() {
    local machine glibc
    machine=$(uname -sm)
    [[ $machine == "Linux $for_machine" ]] ||
        mistake "the wheels are for Linux $for_machine, and this is $machine. Make a bundle on such a machine."
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null) || glibc='another C library'
    [[ $glibc == 'glibc '* && $(printf '%s\n' "$for_glibc" "${glibc#glibc }" | sort -V | head -n 1) == "$for_glibc" ]] ||
        mistake "the wheels need glibc $for_glibc or newer, and this machine has $glibc." \
            "Make a bundle with a wheel of FFCV from an older system: ./launch/build-ffcv-wheel"
}

# check_digests FOLDER PATTERN: names each file of FOLDER/SHA256SUMS matching PATTERN that is missing or damaged.
check_digests() {
    local folder=$1 pattern=$2 bad
    bad=$(cd "$folder" && grep -E -- "$pattern" SHA256SUMS | LC_ALL=C sha256sum --check --quiet --strict - 2>/dev/null) ||
        [[ -n $bad ]] || bad='SHA256SUMS: not readable'
    bad=$(sed -e 's/: FAILED open or read$/ is missing/' -e 's/: FAILED$/ is damaged/' <<<"$bad")
    [[ -z $bad ]] || mistake "$folder is not as it was made:" "$(head -n 10 <<<"$bad")" \
        "Copy the bundle again; nothing of it was installed."
}

# The rest of a bundle: data is strictly checked, code may have been changed on purpose.
check_bundle() {
    local changed
    check_digests "$PWD" "  data/"
    changed=$(grep -vE '  (data|wheels)/' SHA256SUMS | LC_ALL=C sha256sum --check --quiet --strict - 2>/dev/null) || true
    [[ -z $(grep 'FAILED open' <<<"$changed") ]] ||
        mistake "this bundle is not complete:" "$(sed -n 's/: FAILED open or read$/ is missing/p' <<<"$changed" | head -n 10)" \
            "Copy it again; nothing of it was installed."
    [[ -z $changed ]] || printf 'note: not as it was bundled: %s\n' "$(sed 's/: FAILED.*//' <<<"$changed" | head -n 10 | paste -sd ' ')" >&2
}

# first_missing PYTHON: fails with the name of a package that the machine should have itself, and has not.
first_missing() {
    "$1" - $for_system <<'PYTHON'
import importlib.metadata, re, sys
for name in (re.match(r"[\w.-]+", word)[0] for word in sys.argv[1:]):
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        sys.exit(name)
PYTHON
}

# Sets `python` to the first Python here that the wheels are for; with packages of the machine's own, to one that has them.
choose_python() {
    local path version missing tried=()
    while read -r path; do
        [[ $path != "$PWD/.venv/"* ]] || continue  # activated, and about to be made again
        version=$("$path" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null) || continue
        if [[ $version != "$for_python" ]]; then
            tried+=("  $path is Python $version")
        elif missing=$(first_missing "$path" 2>&1); then
            python=$path
            return
        else
            tried+=("  $path has no $missing")
        fi
    done < <(
        for name in "${UV_PYTHON:-python3}" "python${UV_PYTHON:-$for_python}" "${UV_PYTHON:-python}"; do
            type -aP "$name" || true
        done | awk '!seen[$0]++'
    )
    mistake "the wheels are for Python $for_python${for_system:+ with ${for_system// /, } of its own}, and here:" \
        "${tried[@]:-  there is none}" \
        "Name a fitting one, e.g. UV_PYTHON=/usr/bin/python$for_python ./launch/setup, or make a bundle for this one:" \
        "  ./launch/bundle --python VERSION${for_system:+    (without --system-torch it brings torch itself)}"
}

# Sets `uv` to the one that lies among the wheels: a program, which needs no installing.
unpack_uv() {
    rm -rf .uv/bundled
    "$python" -m zipfile --extract "$wheels"/uv-*.whl .uv/bundled
    uv=$(echo "$PWD"/.uv/bundled/uv-*.data/scripts/uv)
    chmod 755 "$uv"
}

# Makes .venv. The packages of its own win over the machine's, which come last in the search.
install_wheels() {
    local site bin=$PWD/.venv/bin
    unset "${!UV_@}"  # the user's settings are for other environments
    # The cache is beside .venv, so that files are linked and not copied; the home directory may be small.
    export UV_OFFLINE=1 UV_NO_CONFIG=1 UV_CACHE_DIR=$PWD/.uv/cache UV_PYTHON_DOWNLOADS=never
    rm -rf .uv/cache
    "$uv" venv --quiet --clear --no-project --python "$python" .venv
    "$uv" pip install --quiet --python "$bin/python" --no-deps --no-index --no-build --require-hashes \
        --compile-bytecode --find-links "$wheels" --requirement "$wheels/requirements.txt"
    rm -rf .uv/cache
    site=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # Relative, so that the folder can be moved.
    "$bin/python" -c 'import os, sys; print(os.path.relpath(*sys.argv[1:]))' "$PWD" "$site" >"$site/cifar_dist.pth"
    if [[ -n $for_system ]]; then
        # Not --system-site-packages, by which the environment of an environment has the packages of neither.
        "$python" - >"$site/of_the_machine.pth" <<'PYTHON'
import os, sys
for path in sys.path:
    if os.path.basename(path) in ("site-packages", "dist-packages"):
        print(f"import site; site.addsitedir({path!r})")
PYTHON
        printf '#!/bin/sh\nexec "$(dirname "$0")/python" -m torch.distributed.run "$@"\n' >"$bin/torchrun"
        chmod 755 "$bin/torchrun"
    fi
}

# What was put together fits together, and the parts that were compiled for each other load.
check_environment() {
    local answer
    .venv/bin/python -m cifar_dist.offline.check_installed || exit 2
    answer=$(.venv/bin/python -c 'import torch, torchvision, cv2, ffcv.loader' 2>&1) ||
        mistake "the environment was installed, but cannot be loaded:" "$(tail -n 5 <<<"$answer")" \
            "\`.venv/bin/python -m cifar_dist.doctor\` checks this machine."
}
