# Makes .venv and installs this project into it; sourced by quickstart.sh and test.sh.
# A stamp inside .venv holds the hash of pyproject.toml, so that a second call takes no time.

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed and was not found as python3.11, python3.12, python3.13 or python3." >&2
    echo "Install it from your system's packages or from https://www.python.org/downloads/ ." >&2
    return 1
}

# ensure_environment [EXTRA]: afterwards .venv/bin/python has this project and its EXTRA packages.
ensure_environment() {
    local extra=${1:-} python wanted found
    local stamp=.venv/installed-${extra:-run}
    wanted="$(pwd) $(cksum <pyproject.toml)"
    # The larger installation serves for the smaller one.
    for found in "$stamp" .venv/installed-test; do
        if [ "$(cat "$found" 2>/dev/null)" = "$wanted" ] && .venv/bin/python -c '' 2>/dev/null; then
            return
        fi
    done
    python=$(find_python) || return 1
    if ! .venv/bin/python -c '' 2>/dev/null; then
        echo "making .venv with $python"
        "$python" -m venv --clear .venv || {
            echo "$python cannot make a virtual environment; on Debian and Ubuntu install python3-venv." >&2
            return 1
        }
    fi
    echo "installing packages into .venv (once; a few minutes)"
    local quiet=--quiet
    [ -t 1 ] && quiet=
    .venv/bin/python -m pip install --disable-pip-version-check $quiet -e ".${extra:+[$extra]}" || {
        echo "the installation failed; the same command tries again." >&2
        return 1
    }
    echo "$wanted" >"$stamp"
}
