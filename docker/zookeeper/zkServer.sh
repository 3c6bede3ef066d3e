#!/bin/sh
# start-foreground as in the published image, on a JVM that starts fast.
set -eu
if [ "${1:-}" != start-foreground ]; then
  exec "$@"
fi
if [ ! -s /data/myid ]; then
  echo "${ZOO_MY_ID:-1}" >/data/myid
fi
jars=/usr/share/java/zookeeper.jar:/usr/share/java/slf4j-simple.jar
# Needed for TLS only, and not in the manifest of Debian's jar as the others are.
for part in codec resolver transport-native-unix-common; do
  jars=$jars:/usr/share/java/netty-$part.jar
done
# shellcheck disable=SC2086
exec java -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Dzookeeper.jmx.log4j.disable=true \
  -Dorg.slf4j.simpleLogger.defaultLogLevel=warn ${JVMFLAGS:-} \
  -cp "$jars" org.apache.zookeeper.server.quorum.QuorumPeerMain /conf/zoo.cfg
