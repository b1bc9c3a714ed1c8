#!/usr/bin/env bash
# Installs maskd on this machine, or brings an installed one up to date. Run it again whenever you like: what is right stays.
set -euo pipefail
umask 022

usage() {
  cat <<'END'
usage: systemd/install.sh [--supervisor] [--gpus N] [--extras A,B] [--no-start]

Puts maskd into /opt/maskd with a Python environment of its own, makes the user maskd, and a service that is started as soon as
/etc/maskd/maskd.env holds what it needs. An existing maskd.env is never touched. Needs root, and pip's package index.

  --supervisor    for supervisord, in containers without systemd
  --gpus N        one process for each of N GPUs, at ports MASKD_PORT + 0 … N-1; else one process serves all of them
  --extras A,B    extras of maskd to install; else torch where there is a GPU, and none elsewhere
  --no-start      enable the service and start nothing
  --no-pip        leave the Python environment as it is
  --root DIR      install below DIR, for images and tests: no user is made and nothing is started
END
}

say() { printf 'maskd: %s\n' "$*"; }
fail() { printf 'maskd: %s\n' "$*" >&2; exit 1; }

root='' supervisor='' gpus='' extras='' start=yes pip=yes
while [ $# -gt 0 ]; do
  case $1 in
    --supervisor) supervisor=yes ;;
    --no-start) start='' ;;
    --no-pip) pip='' ;;
    --gpus | --extras | --root)
      [ $# -gt 1 ] || fail "$1 needs a value; see --help"
      declare "${1#--}=$2"
      shift
      ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; fail "there is no option $1" ;;
  esac
  shift
done
case $gpus in '' | [1-9] | [1-9][0-9]) ;; *) fail "--gpus takes a number from 1 to 99, not $gpus" ;; esac

source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -z "$root" ] || { mkdir -p "$root" && root=$(cd "$root" && pwd); }
home=$root/opt/maskd venv=$root/opt/maskd/.venv state=$root/var/lib/maskd settings=$root/etc/maskd/maskd.env
changed='' scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd / # python -c looks for modules where it was started, which may be anybody's folder

[ -n "$root" ] || [ "$(id -u)" = 0 ] || fail "run this as root: sudo $0"
[ -n "$root$supervisor" ] || [ -d /run/systemd/system ] || fail "no systemd runs here; in a container: $0 --supervisor"

# --- Python -----------------------------------------------------------------------------------------------------------

# A Python in somebody's home is none: the service may not look there.
suits() {
  "$1" -c 'import sys, venv, ensurepip
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.base_prefix.startswith(("/root/", "/home/")))' >/dev/null 2>&1
}

find_python() {
  local candidate
  while read -r candidate; do
    if suits "$candidate"; then echo "$candidate"; return; fi
  done < <(type -aP python3.13 python3.12 python3.11 python3; ls -d "$home"/python/*/bin/python3.12 2>/dev/null)
  return 1
}

packages() {
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return 1; fi
  say "installing $* by apt-get"
  apt-get update -qq >/dev/null 2>&1 || true
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# Ubuntu 22.04 has Python 3.10. uv brings the same Python to every distribution, into a folder of ours, and takes nothing of the
# system's over; a PPA would do for some releases of Ubuntu only, and stay among the sources of every later upgrade.
python_by_uv() {
  local uv=uv
  if ! command -v uv >/dev/null; then
    python3 -c 'import venv, ensurepip' 2>/dev/null || packages python3-venv ||
      fail "there is no Python 3.11 to 3.13 here, and no python3 with venv to fetch one by; install one of them"
    python3 -m venv "$home/.uv"
    "$home/.uv/bin/python" -m pip install --quiet --disable-pip-version-check uv
    uv=$home/.uv/bin/uv
  fi
  say "fetching Python 3.12 by uv into $home/python"
  "$uv" python install --quiet --install-dir "$home/python" --no-bin 3.12
}

make_environment() {
  local python
  if [ -x "$venv/bin/python" ] && suits "$venv/bin/python" && "$venv/bin/python" -c 'import pip' 2>/dev/null; then return; fi
  if ! python=$(find_python); then
    # A distribution that has a Python which suits may lack its venv.
    if python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then packages python3-venv || true; fi
    python=$(find_python) || { python_by_uv && python=$(find_python); } || fail "there is no Python 3.11 to 3.13 to be had"
  fi
  say "making $venv with $("$python" --version)"
  rm -rf "$venv" && "$python" -m venv "$venv"
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# What would be installed, as one sum: the same sum needs no pip.
wanted_sum() {
  (
    cd "$source" && find daemon handlers models storage migrations pyproject.toml constraints.txt \
      -type f ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    "$venv/bin/python" --version
    printf '%s\n' "$extras"
  ) | sha256sum | cut -d' ' -f1
}

install_code() {
  local sum what=$source
  [ -n "$extras" ] || ! has_gpu || extras=torch
  make_environment
  sum=$(wanted_sum)
  if [ "$sum" = "$(cat "$home/.installed" 2>/dev/null)" ]; then return; fi
  rm -f "$home/.installed"
  [ -z "$extras" ] || what="${source}[$extras]"
  say "installing maskd${extras:+ with $extras} into $venv (minutes, the first time)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --progress-bar off -c "$source/constraints.txt" "$what"
  printf '%s\n' "$sum" >"$home/.installed"
  changed=yes
  case ",$extras," in *,torch,*) look_at_gpu ;; esac
}

# torch may be built for a newer CUDA than the driver knows: say so now and not when the daemon starts.
look_at_gpu() {
  "$venv/bin/python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null || ! has_gpu ||
    say "warning: $("$venv/bin/python" -c 'from models.torch_device import why_no_cuda; print(why_no_cuda())')" \
      "— PIP_INDEX_URL or PIP_EXTRA_INDEX_URL may name an index with torch for an older CUDA"
}

# --- Files ------------------------------------------------------------------------------------------------------------

# put FILE MODE DESTINATION: only where it differs.
put() {
  if cmp -s "$1" "$3"; then return; fi
  mkdir -p "$(dirname "$3")"
  install -m "$2" "$1" "$3"
  say "wrote $3"
  changed=yes
}

own() { [ -n "$root" ] || chown "$1" "$2"; }

make_user() {
  if [ -n "$root" ]; then return; fi
  if id maskd >/dev/null 2>&1; then
    getent group maskd >/dev/null || groupadd --system maskd # that of the service, whoever made the user
    return
  fi
  useradd --system --user-group --home-dir /var/lib/maskd --no-create-home --shell /usr/sbin/nologin maskd
  say "made the user maskd"
}

make_folders() {
  mkdir -p "$home" "$state/weights" "$root/etc/maskd"
  chmod 750 "$state"
  own maskd:maskd "$state"
  own maskd:maskd "$state/weights"
  if [ ! -e "$settings" ]; then
    install -m 640 "$source/systemd/maskd.env.example" "$settings.new"
    own root:maskd "$settings.new"
    mv "$settings.new" "$settings"
    say "wrote $settings, which is yours from now on"
  fi
  local open
  open=$(find -L "$root/etc/maskd" -maxdepth 1 -name '*.env' -perm /o=rwx | tr '\n' ' ')
  [ -n "$root" ] || setpriv --reuid=maskd --regid=maskd --clear-groups test -r "$settings" ||
    say "warning: the user maskd cannot read $settings — chown root:maskd $settings; chmod 640 $settings"
  [ -z "$open" ] || say "warning: everybody may read $open— chmod 640 $root/etc/maskd/*.env"
  # So that every command of maskd finds the settings when it runs in the state folder.
  [ -L "$state/.env" ] || ln -s /etc/maskd/maskd.env "$state/.env"
  put "$source/systemd/maskd-command.sh" 755 "$root/usr/local/bin/maskd"
}

# The settings as the daemon itself reads them: its own sentences, or nothing when they are complete.
what_is_missing() {
  (cd "$root/etc/maskd" && "$venv/bin/python" - "$settings" <<'END'
import sys
from pathlib import Path

from daemon.config import load
from storage.base import ConfigurationError

try:
    load({}, Path(sys.argv[1]))
except ConfigurationError as error:
    print(error)
END
  ) || echo "maskd cannot be imported from $venv; run this again without --no-pip"
}

# --- Services ---------------------------------------------------------------------------------------------------------

services() {
  local number
  if [ -z "$gpus" ]; then echo maskd.service; return; fi
  for ((number = 0; number < gpus; number++)); do echo "maskd@$number.service"; done
}

for_systemd() {
  local wanted unneeded
  put "$source/systemd/maskd.service" 644 "$root/etc/systemd/system/maskd.service"
  put "$source/systemd/maskd@.service" 644 "$root/etc/systemd/system/maskd@.service"
  if has_gpu; then # devices that appear after the start would be hidden from the service
    echo nvidia-uvm >"$scratch/modules"
    put "$scratch/modules" 644 "$root/etc/modules-load.d/maskd.conf"
    [ -n "$root" ] || modprobe nvidia-uvm 2>/dev/null || true
  fi
  mapfile -t wanted < <(services)
  mapfile -t unneeded < <(cd "$root/etc/systemd/system/multi-user.target.wants" 2>/dev/null &&
    find . -name maskd.service -o -name 'maskd@*.service' | sed 's|^\./||' | LC_ALL=C sort | grep -vxF "$(services)")
  local systemctl=(systemctl --quiet)
  [ -z "$root" ] || systemctl+=("--root=$root")
  [ -n "$root" ] || systemctl daemon-reload
  if [ ${#unneeded[@]} -gt 0 ]; then
    say "disabling ${unneeded[*]}"
    "${systemctl[@]}" disable "${unneeded[@]}"
    [ -n "$root" ] || systemctl stop "${unneeded[@]}"
  fi
  "${systemctl[@]}" enable "${wanted[@]}"
  [ -n "$root" ] || [ -z "$start" ] || begin "${wanted[@]}"
}

begin() {
  if [ -n "$missing" ]; then return; fi
  systemctl "$([ -n "$changed" ] && echo restart || echo start)" --no-block "$@"
  say "started $*; look at it with: systemctl status maskd*"
}

for_supervisor() {
  local file=$source/systemd/supervisor/maskd.conf code_changed=$changed
  if [ -n "$gpus" ]; then
    file=$scratch/maskd.conf
    sed "s/^numprocs=.*/numprocs=$gpus/" "$source/systemd/supervisor/maskd-gpus.conf" >"$file"
  fi
  [ -n "$root" ] || command -v supervisord >/dev/null || packages supervisor ||
    fail "there is no supervisord; install the package supervisor"
  changed=''
  put "$file" 644 "$root/etc/supervisor/conf.d/maskd.conf"
  if [ -n "$root" ] || [ -z "$start" ] || [ -n "$missing" ]; then return; fi
  supervisorctl pid >/dev/null 2>&1 || fail "supervisord does not run; start it: supervisord -c /etc/supervisor/supervisord.conf"
  supervisorctl update
  [ -n "$changed" ] || [ -z "$code_changed" ] || supervisorctl restart 'maskd:*' # update has restarted what it changed
  say "started; look at it with: supervisorctl status, and tail -f /var/log/maskd*.log"
}

make_user
make_folders
[ -z "$pip" ] || install_code
missing=$(what_is_missing)
if [ -n "$supervisor" ]; then for_supervisor; else for_systemd; fi

if [ -n "$missing" ]; then
  say "not started, since $settings lacks something:"
  printf '%s\n' "$missing" | sed 's/^/maskd:   /'
  say "then: maskd migrate (once, and after updates), and this script again"
elif [ -z "$start$root" ]; then
  say "installed, not started, as you asked"
else
  say "everything is in place"
fi
