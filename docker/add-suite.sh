#!/bin/sh
# Lets one package come from another release of Debian, from the archive that this image is configured for.
#   add-suite.sh SUITE PACKAGE
set -eu
uri=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
  awk '/^URIs:/ { print $2; exit } /^deb / { print $2; exit }')
# The pin first: without it, a newer release would be preferred for everything.
printf 'Package: *\nPin: release n=%s\nPin-Priority: 100\n\nPackage: %s\nPin: release n=%s\nPin-Priority: 500\n' \
  "$1" "$2" "$1" >/etc/apt/preferences.d/quorate
printf 'deb %s %s main\n' "$uri" "$1" >/etc/apt/sources.list.d/quorate.list
