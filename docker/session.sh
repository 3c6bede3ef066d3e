#!/bin/sh
# A Docker daemon for as long as standard input stays open: the one that answers already, or one that is started here. At
# the end all containers and networks of the run are removed, and a daemon that was started is stopped; its images stay in FOLDER.
#   session.sh RUN FOLDER      prints DOCKER_HOST when the daemon answers
set -eu

end() {
  trap '' EXIT HUP INT TERM
  if [ -n "$daemon" ] && kill -0 "$daemon" 2>/dev/null; then
    docker ps --all --quiet 2>/dev/null | xargs --no-run-if-empty docker rm --force --volumes >/dev/null 2>&1 || true
    docker network prune --force >/dev/null 2>&1 || true
    kill "$daemon" 2>/dev/null || true
    wait "$daemon" 2>/dev/null || true
  fi
  # It leaves the network of containers mounted.
  awk -v under="$short/" 'index($2, under) == 1 { print $2 }' /proc/mounts | xargs --no-run-if-empty umount
  rm -rf "$short"
}

# start OPTION...: true when the daemon answers
start() {
  dockerd --host "$DOCKER_HOST" --data-root "$folder/data" --exec-root "$short/exec" --pidfile "$short/pid" \
    --storage-driver overlay2 "$@" </dev/null >"$folder/log" 2>&1 &
  daemon=$!
  left=300
  while [ "$left" -gt 0 ] && kill -0 "$daemon" 2>/dev/null; do
    if docker version >/dev/null 2>&1; then
      return 0
    fi
    sleep 0.1
    left=$((left - 1))
  done
  kill "$daemon" 2>/dev/null || true
  wait "$daemon" 2>/dev/null || true
  daemon=
  return 1
}

# Read to its end before anything is done: it runs for long, and may be edited meanwhile.
main() {
  run=$1 folder=$2
  if docker version >/dev/null 2>&1; then
    echo "${DOCKER_HOST:-$(docker context inspect --format '{{.Endpoints.docker.Host}}' 2>/dev/null || true)}"
    # Whoever started us ends us by ending: Ctrl-C is for them.
    trap '' INT
    read -r _ || true
    label=label=org.quorate.testcontainers=$run
    docker ps --all --quiet --filter "$label" | xargs --no-run-if-empty docker rm --force --volumes >/dev/null
    docker network prune --force --filter "$label" >/dev/null
    exit 0
  fi

  mkdir -p -m 0700 "$folder"
  if [ ! -O "$folder" ]; then
    echo "$folder belongs to somebody else" >&2
    exit 1
  fi
  exec 9>"$folder/lock"
  if ! flock --timeout 900 9; then
    echo "another run has had $folder for 15 minutes" >&2
    exit 1
  fi
  # A socket's path may have 107 characters.
  short=$(mktemp --directory /tmp/quorate-docker-XXXXXX)
  DOCKER_HOST=unix://$short/docker.sock
  export DOCKER_HOST
  daemon=
  trap end EXIT
  trap 'exit 1' HUP INT TERM

  # Where the kernel lacks address translation, ports are published all the same: by Docker's own proxy.
  if ! start && ! start --iptables=false; then
    echo "dockerd does not start on this machine; the end of $folder/log:" >&2
    grep -v 'level=info' "$folder/log" | tail -n 20 >&2
    exit 1
  fi
  echo "$DOCKER_HOST"
  read -r _ || true
}

main "$@"
exit
