#!/bin/sh
# Makes the database of an empty folder, then runs the server in it.
set -eu
data=/var/lib/postgresql/data
if [ ! -s "$data/PG_VERSION" ]; then
  # Passwords are hashed as the server's own default says, whichever method is asked for.
  secret=$(mktemp)
  trap 'rm -f "$secret"' EXIT
  printf '%s' "${POSTGRES_PASSWORD:-}" >"$secret"
  method=${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}
  if [ -n "${POSTGRES_PASSWORD:-}" ]; then
    initdb -D "$data" -U "${POSTGRES_USER:-postgres}" --auth-local=trust -E UTF8 --pwfile="$secret" >/dev/null
  else
    initdb -D "$data" -U "${POSTGRES_USER:-postgres}" --auth-local=trust -E UTF8 >/dev/null
  fi
  rm -f "$secret"
  trap - EXIT
  echo "host all all all $method" >>"$data/pg_hba.conf"
fi
exec "$@" -D "$data" -c listen_addresses='*' -c unix_socket_directories=/tmp
