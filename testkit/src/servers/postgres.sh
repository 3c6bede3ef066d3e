# Starts PostgreSQL on a data directory, which is made first if it is empty. As root it goes on as another user: the
# server refuses to run as root.
#   postgres.sh BIN DATA PORT PREPARED [CERTIFICATE KEY]
set -e
bin=$1 data=$2 port=$3
as=
if [ "$(id -u)" = 0 ]; then
  user=postgres
  id "$user" >/dev/null 2>&1 || user=nobody
  chmod 711 "$(dirname "$data")"
  chown "$user" "$data"
  as="setpriv --reuid=$user --regid=$(id -g "$user") --clear-groups"
fi
cd "$data"
if [ ! -s PG_VERSION ]; then
  $as "$bin/initdb" -D "$data" -U quorate -A trust -E UTF8 --no-locale --no-sync
fi
# After a kill its children end by themselves, a moment later; until then their memory is in the way.
if [ -s postmaster.pid ]; then
  memory=$(sed -n 7p postmaster.pid | awk '{ print $2 }')
  left=200
  while [ "$left" -gt 0 ] && awk -v id="$memory" '$2 == id && $7 > 0 { found = 1 } END { exit !found }' /proc/sysvipc/shm
  do
    sleep 0.05
    left=$((left - 1))
  done
fi
tls=off
if [ -n "$5" ]; then
  # It takes a key only from a file that is its own and that nobody else can read.
  (umask 077 && cp "$5" server.crt && cp "$6" server.key)
  [ -z "$as" ] || chown "$user" server.crt server.key
  tls=on
fi
# A process that is killed loses nothing that it has handed to the kernel: only a crash of the machine needs fsync.
exec $as "$bin/postgres" -D "$data" -p "$port" -c listen_addresses=127.0.0.1 -c unix_socket_directories= \
  -c max_prepared_transactions="$4" -c max_connections=100 -c fsync=off -c shared_buffers=16MB -c ssl=$tls
