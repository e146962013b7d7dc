# Sourced by the other scripts: make_environment FOLDER REQUIREMENT makes a virtual environment with this package in it
# and activates it. A second call is quick: it installs only when pyproject.toml or the requirement has changed.

make_environment() {
    local folder="$1" requirement="$2" python stamp wanted
    python="$(find_python)"
    if [ ! -x "$folder/bin/python" ] || ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
        echo "Making the environment $folder with $("$python" --version)"
        rm -rf "$folder"
        if ! "$python" -m venv "$folder" >/dev/null 2>&1; then
            # Debian keeps venv's pip in a package of its own
            rm -rf "$folder"
            if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
                apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null
                "$python" -m venv "$folder"
            else
                echo "Python cannot make virtual environments here. Install them with: sudo apt-get install python3-venv" >&2
                exit 2
            fi
        fi
    fi
    # shellcheck disable=SC1091
    source "$folder/bin/activate"
    unset PYTHONDONTWRITEBYTECODE
    stamp="$folder/installed"
    wanted="$(cat pyproject.toml) $requirement"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        echo "Installing $requirement (torch is large: a few minutes the first time)"
        # pip would compile 16,000 modules, one after the other; Python compiles and keeps those that are imported
        local install=(python -m pip install --quiet --disable-pip-version-check --no-compile)
        "${install[@]}" --upgrade pip
        # sam2 is a source package that is built with torch: torch comes first, or pip downloads a second one for the build.
        # Its CUDA extension fills holes of masks; nothing here uses it, and it would need a compiler.
        "${install[@]}" "torch>=2.5.1" torchvision setuptools wheel
        SAM2_BUILD_CUDA=0 "${install[@]}" --no-build-isolation "sam2>=1.1,<2"
        "${install[@]}" --editable "$requirement"
        printf '%s' "$wanted" >"$stamp"
    fi
}

find_python() {
    local name
    for name in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10 python; do
        if [ -n "$name" ] && command -v "$name" >/dev/null &&
            "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "No Python from 3.10 to 3.13 was found. Install one, or name it: PYTHON=/path/to/python $0" >&2
    exit 2
}
