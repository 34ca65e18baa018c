# Sourced by the other scripts: changes to the root of the repository and checks whether the setup is current.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Allow Python to write bytecode even where the environment forbids it, as in many containers: scripts/setup compiles
# nothing in advance, and compiling torch takes seconds.
export PYTHONDONTWRITEBYTECODE=

stamp=.venv/.setup-complete
dev_stamp=.venv/.dev-setup-complete

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

python_version() {
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

# The inputs of the environment. The path is one of them: a moved virtual environment does not work.
fingerprint() {
    { cat requirements.lock pyproject.toml scripts/setup; pwd; python_version .venv/bin/python; } | sha256sum
}

setup_is_current() {
    [[ -f $stamp && -x .venv/bin/python ]] || return 1
    [[ "$(<"$stamp")" == "$(fingerprint)" ]] || return 1
    [[ -z ${PYTHON:-} || "$(python_version "$PYTHON")" == "$(python_version .venv/bin/python)" ]]
}

ensure_setup() {
    setup_is_current || scripts/setup
}

# The same for the packages of checks and tests.
dev_fingerprint() {
    { fingerprint; cat requirements-dev.lock; } | sha256sum
}

dev_setup_is_current() {
    setup_is_current && [[ -f $dev_stamp && "$(<"$dev_stamp")" == "$(dev_fingerprint)" ]]
}

ensure_dev_setup() {
    dev_setup_is_current || scripts/setup --dev
}
