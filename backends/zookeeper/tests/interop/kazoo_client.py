"""A kazoo client that takes orders on stdin and reports on stdout."""
import sys
from kazoo.client import KazooClient

client = KazooClient(hosts=sys.argv[1], timeout=10)
client.start()
locks = {}
print("ready", flush=True)
for line in sys.stdin:
    order, path = line.split()
    lock = locks.setdefault(path, client.Lock(path, "kazoo", extra_lock_patterns=("-lock-",)))
    if order == "acquire":
        lock.acquire()
        print("acquired", flush=True)
    elif order == "release":
        lock.release()
        print("released", flush=True)
client.stop()
