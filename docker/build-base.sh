#!/bin/sh
# Makes the image from which the others are built where no registry can be reached: Debian's smallest root, from the
# source that this machine is configured for, imported as it is. Needs root, debootstrap and a daemon.
#   build-base.sh [IMAGE]      nothing is done if the image is there already
set -eu
image=${1:-quorate/base:local}
if docker image inspect "$image" >/dev/null 2>&1; then
  exit 0
fi
codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
# The archive of the release itself, in either format of apt's sources.
uri=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
  awk -v codename="$codename" '
    function stanza() { if (deb && suite && uri != "") { print uri; found = 1; exit } deb = suite = 0; uri = "" }
    /^[ \t]*$/ { stanza() }
    /^Types:/ { deb = / deb( |$)/; suite = 0; uri = "" }
    /^URIs:/ { uri = $2 }
    /^Enabled: *no/ { deb = 0; uri = "" }
    /^Suites:/ { for (i = 2; i <= NF; i++) if ($i == codename) suite = 1 }
    /^deb[ \t]/ { sub(/\[[^]]*\]/, ""); if ($3 == codename) { print $2; found = 1; exit } }
    END { if (!found) stanza() }')
if [ -z "$uri" ]; then
  echo "no apt source of Debian $codename is configured on this machine" >&2
  exit 1
fi
# What apt is told to go through.
for scheme in http https; do
  proxy=$(apt-config dump --format '%v%n' "Acquire::$scheme::Proxy" | head -n 1)
  if [ -n "$proxy" ] && [ "$proxy" != DIRECT ]; then
    export "${scheme}_proxy=$proxy"
  fi
done
work=$(mktemp --directory)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
if ! debootstrap --variant=minbase --include=ca-certificates "$codename" "$work/root" "$uri" >"$work/log" 2>&1; then
  tail -n 20 "$work/log" "$work/root/debootstrap/debootstrap.log" >&2 || true
  exit 1
fi
rm -rf "$work/root/var/cache/apt/archives" "$work/root/var/lib/apt/lists"
mkdir -p "$work/root/var/cache/apt/archives/partial" "$work/root/var/lib/apt/lists/partial"
tar --create --directory="$work/root" --numeric-owner . | docker import - "$image" >/dev/null
