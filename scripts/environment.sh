# Sourced by quickstart and test: make .venv once, install under constraints.txt, again only when either file changed.
# usage: ensure_environment EXTRA, where EXTRA is empty or [dev]
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

ensure_environment() {
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "scoresde needs Python 3.11 or newer; name one by PYTHON=/path/to/python $0" >&2
    exit 2
  }
  local extra=$1 stamp="$root/.venv/.installed$1" wanted
  wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum; echo "$root")
  [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing scoresde$extra into $root/.venv (a few minutes the first time)"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      -c "$root/constraints.txt" -e "$root$extra"
    echo "$wanted" > "$stamp"
  fi
}
