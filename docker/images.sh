#!/bin/sh
# Brings the images of servers, and prints one line VARIABLE=IMAGE for each: what compose.yml and the tests read.
#   images.sh [SERVER...]      by default all
# The environment's choice comes first, then the published image, and where no registry can be reached one that is built
# on this machine.
set -eu
cd "$(dirname "$0")"
[ $# -gt 0 ] || set -- etcd redis valkey consul zookeeper postgres
build=
own=
for server in "$@"; do
  variable=QUORATE_$(echo "$server" | tr '[:lower:]' '[:upper:]')_IMAGE
  eval "image=\${$variable:-}"
  if [ -n "$image" ]; then
    echo "$variable=$image"
    continue
  fi
  image=$(sed -n "s/^$variable=//p" .env)
  # Nobody publishes these.
  case "$image" in
    localhost/*)
      docker image inspect "$image" >/dev/null 2>&1 || own="$own $server"
      echo "$variable=$image"
      continue
      ;;
  esac
  # A registry that could not be reached for one is not asked for the others.
  if docker image inspect "$image" >/dev/null 2>&1 ||
    { [ -z "$build" ] && timeout 300 docker pull --quiet "$image" >/dev/null; }; then
    echo "$variable=$image"
  else
    build="$build $server"
    echo "$variable=quorate/$server:local"
  fi
done
if [ -n "$build$own" ]; then
  [ -z "$build" ] || echo "no registry: images are built on this machine" >&2
  # shellcheck disable=SC2086
  ./build.sh $own $build >/dev/null
fi
