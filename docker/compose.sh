#!/bin/sh
# Compose for one profile, with whichever Compose this machine has.
#   compose.sh PROFILE up [SERVICE...]   starts, and waits until every health check passes
#   compose.sh PROFILE down              stops, and forgets all data
#   compose.sh PROFILE ARGS...           anything else, such as ps, logs redis, kill etcd2
# docker/local.env, made by `images.sh >local.env`, names other images than .env does.
set -eu
cd "$(dirname "$0")"
if [ $# -lt 2 ]; then
  sed -n 's/^#   //p' compose.sh >&2
  exit 64
fi
profile=$1 command=$2
# A project for each: `down` of one leaves the others and their data alone.
if docker compose version >/dev/null 2>&1; then
  compose() { docker compose --project-name "quorate-$profile" --profile "$profile" "$@"; }
elif command -v docker-compose >/dev/null; then
  compose() { docker-compose --project-name "quorate-$profile" --profile "$profile" "$@"; }
else
  echo "neither docker compose nor docker-compose is installed; Debian's package is docker-compose" >&2
  exit 1
fi
if [ -s local.env ]; then
  set -a
  # shellcheck disable=SC1091
  . ./local.env
  set +a
fi
shift
[ "$command" != down ] || set -- down --volumes
if [ "$command" != up ]; then
  compose "$@"
  exit
fi
shift
compose up --detach "$@"
left=120
while :; do
  waits=$(compose ps --all --quiet | xargs docker inspect --format \
    '{{.Name}} {{if .State.Health}}{{.State.Health.Status}}{{else}}{{.State.Status}}{{end}}' | grep -v -E ' (healthy|running)$' || true)
  [ -n "$waits" ] || exit 0
  if [ "$left" = 0 ]; then
    echo "not healthy after 120 s:" >&2
    echo "$waits" >&2
    exit 1
  fi
  sleep 1
  left=$((left - 1))
done
