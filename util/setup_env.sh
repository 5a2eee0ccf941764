# Sourced by the launchers: source util/setup_env.sh REQUIREMENTS_FILE [FILE_TO_INSTALL_NO_DEPS]
#
# VENV_DIR set:          that virtual environment is used; made and filled when missing.
# an environment active: it is used, checked, and never changed.
# neither:               .venv is used; made and filled when missing.
# PYTHON set:            the interpreter that environments are made with, python3 otherwise.

if [[ -z "${VENV_DIR:-}" && -n "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]]; then
    python util/check_requirements.py "$@"
else
    VENV_DIR="${VENV_DIR:-.venv}"
    if [[ ! -x "$VENV_DIR/bin/python" ]]; then
        "${PYTHON:-python3}" util/check_requirements.py
        echo "Making the virtual environment $VENV_DIR ..."
        "${PYTHON:-python3}" -m venv "$VENV_DIR"
    fi
    source "$VENV_DIR/bin/activate"
    # Filled to the end, with these very files? The stamp says so; an interrupted filling has none.
    stamp="$VENV_DIR/.filled-$(cat requirements.txt "$@" | cksum | tr -d ' ')"
    if [[ ! -e "$stamp" ]]; then
        echo "Installing $* into $VENV_DIR (some minutes, 6 GB: torch with CUDA) ..."
        python -m pip install --quiet --disable-pip-version-check -r "$1"
        if [[ $# -gt 1 ]]; then
            python -m pip install --quiet --disable-pip-version-check --no-deps -r "$2"
        fi
        touch "$stamp"
    fi
fi
