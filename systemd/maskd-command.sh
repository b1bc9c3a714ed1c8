#!/bin/sh
# /usr/local/bin/maskd: any command of maskd with the settings of the service, as its user. Name files by their whole path.
cd /var/lib/maskd 2>/dev/null || { echo "maskd: run this as root: sudo maskd …" >&2; exit 1; }
if [ "$(id -u)" != 0 ]; then exec /opt/maskd/.venv/bin/maskd "$@"; fi
exec env HOME=/var/lib/maskd setpriv --reuid=maskd --regid=maskd --clear-groups /opt/maskd/.venv/bin/maskd "$@"
