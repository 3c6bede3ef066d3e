# Runs a server that dies with the process that started it, even when that process is killed with
# SIGKILL: our standard input is a pipe that only the starter holds open, so its end is the starter's end.
#   supervise.sh HOME LOG COMMAND...   prints the server's process id; exits when the server exits
home=$1 log=$2
shift 2
exec 3<&0
"$@" 3<&- </dev/null >>"$log" 2>&1 &
server=$!
(
  read -r _ <&3
  # From here on the clean-up must finish although the shell outside has seen the server end.
  trap '' TERM
  kill -KILL "$server"
  rm -rf -- "$home"
) >/dev/null 2>&1 &
watcher=$!
exec 3<&-
echo "$server"
wait "$server"
code=$?
kill -TERM "$watcher" 2>/dev/null
exit "$code"
