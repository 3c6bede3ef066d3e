#!/bin/sh
# Builds the servers' images on this machine, for where no registry can be reached.
#   build.sh [SERVER...]       quorate/SERVER:local for each; by default for all
# BASE_IMAGE names an image of Debian to build from; by default build-base.sh makes one.
set -eu
cd "$(dirname "$0")"
[ $# -gt 0 ] || set -- etcd redis valkey consul zookeeper postgres
base=${BASE_IMAGE:-}
if [ -z "$base" ]; then
  base=quorate/base:local
  ./build-base.sh "$base"
fi
# What apt goes through here, it goes through there as well.
proxy=$(apt-config dump --format '%v%n' Acquire::http::Proxy 2>/dev/null | head -n 1)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for server in "$@"; do
  # The network of this machine: a build needs no bridge.
  if ! docker build --network host --build-arg "BASE_IMAGE=$base" --build-arg "http_proxy=$proxy" \
    --tag "quorate/$server:local" --tag "localhost/quorate/$server:local" --file "$server/Dockerfile" . >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    exit 1
  fi
  echo "quorate/$server:local"
done
