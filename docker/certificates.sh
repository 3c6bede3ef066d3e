#!/bin/sh
# Makes a throw-away authority, a server's and a client's certificate in docker/tls, valid for a month, for the servers of
# the profile `tls`. Every user of this machine can read the keys, because the servers' users inside must: never use them
# elsewhere. Needs openssl. What is there already is replaced.
set -eu
cd "$(dirname "$0")"
umask 022
mkdir -p tls
cd tls
quiet() {
  "$@" 2>log || { cat log >&2; exit 1; }
  rm -f log
}
key() {
  quiet openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1-key.pem"
  chmod 644 "$1-key.pem"
}
# issue NAME COMMON-NAME EXTENSIONS
issue() {
  key "$1"
  printf '%s\n' "$3" >"$1.ext"
  quiet openssl req -new -key "$1-key.pem" -subj "/CN=$2" -out "$1.csr"
  quiet openssl x509 -req -in "$1.csr" -CA ca.pem -CAkey ca-key.pem -set_serial "0x$(openssl rand -hex 8)" -days 30 \
    -extfile "$1.ext" -out "$1.pem"
  rm "$1.csr" "$1.ext"
}
key ca
quiet openssl req -new -x509 -key ca-key.pem -subj '/CN=quorate compose CA' -days 30 -out ca.pem \
  -addext 'keyUsage=critical,keyCertSign,cRLSign'
# A server certificate is a client certificate too: etcd's own gateway dials its listener with it.
issue server localhost 'subjectAltName=DNS:localhost,IP:127.0.0.1
extendedKeyUsage=serverAuth,clientAuth'
issue client quorate-client 'extendedKeyUsage=clientAuth'
rm ca-key.pem
# ZooKeeper wants both in one file.
cat server-key.pem server.pem >server-store.pem
