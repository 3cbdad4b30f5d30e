# Sourced by measure: use a lean bundle. Sets `python`, CIFAR_DIST_PYTHON and PYTHONPATH. Its own files there are in
# .unpacked-KEY, by the names and sizes of the wheels.
use_lean() {
    local file wheels=() pictures=() folder answer
    [[ -d $lean ]] || mistake "there is no folder $lean; ./launch/bundle --lean makes one."
    lean=$(cd "$lean" && pwd)
    # In pieces, or copied into one folder.
    for file in "$lean"/* "$lean"/piece-*/*; do
        case $file in
            *.whl) wheels+=("$file") ;;
            *.webp | */labels.bin) pictures+=("$file") ;;
        esac
    done
    [[ ${wheels[*]-} == */ffcv-*.whl* ]] ||
        mistake "$lean has no wheel of FFCV. Copy the piece that has it, of those that ./launch/bundle --lean made."
    # Seven files of CIFAR-10; part 1 needs none.
    [[ $part == 1 || ${#pictures[@]} -ge 7 ]] ||
        mistake "part $part needs CIFAR-10, and $lean has ${#pictures[@]} of its 7 files. Copy all pieces into it."
    python=$(command -v "${UV_PYTHON:-python3}") || mistake "there is no ${UV_PYTHON:-python3} on this machine."
    python=$(cd "$(dirname "$python")" && pwd)/${python##*/}
    export CIFAR_DIST_PYTHON=$python

    [[ -w $lean ]] || mistake "cannot write into $lean, where its packages are unpacked. Copy it to where you can."
    folder=$lean/.unpacked-$(cd "$lean" && wc -c "${wheels[@]}" | sha256sum | cut -c1-12)
    if [[ ! -d $folder ]]; then
        rm -rf "$folder.partial"
        for file in "${wheels[@]}"; do
            answer=$("$python" -m zipfile --extract "$file" "$folder.partial" 2>&1) ||
                mistake "$file could not be unpacked. If it is damaged, copy it again." "$(tail -n 1 <<<"$answer")"
        done
        mv "$folder.partial" "$folder"
    fi
    dataset=$folder.dataset
    mkdir -p "$dataset"
    [[ ${#pictures[@]} == 0 ]] || ln -sf "${pictures[@]}" "$dataset/"
    PYTHONPATH=$(cd "$here/.." && pwd):$folder${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
    answer=$("$python" -c 'import torch, torchvision, cv2, numba, scipy, matplotlib, PIL, yaml, psutil, tyro, ffcv.loader' 2>&1) ||
        mistake "$python and $lean do not have all that is needed:" "$(tail -n 1 <<<"$answer")"
}
