"""A kazoo client that takes orders on stdin and reports on stdout."""
import sys
import time
from kazoo.client import KazooClient

client = KazooClient(hosts=sys.argv[1], timeout=10)
client.start()
locks = {}
print("ready", flush=True)
for line in sys.stdin:
    order, path = line.split()
    lock = None
    if order != "count":
        lock = locks.setdefault(path, client.Lock(path, "kazoo", extra_lock_patterns=("-lock-",)))
    if order == "acquire":
        lock.acquire()
        print("acquired", flush=True)
    elif order == "count":
        # Reads, lets others run, and writes: without exclusion counts get lost.
        path, file = path.split(",")
        for _ in range(100):
            with client.Lock(path, "kazoo", extra_lock_patterns=("-lock-",)):
                with open(file) as f:
                    count = int(f.read())
                time.sleep(0.001)
                with open(file, "w") as f:
                    f.write(str(count + 1))
        print("counted", flush=True)
    elif order == "release":
        lock.release()
        print("released", flush=True)
client.stop()
