import java.util.Scanner;
import org.apache.curator.framework.CuratorFramework;
import org.apache.curator.framework.CuratorFrameworkFactory;
import org.apache.curator.framework.recipes.locks.InterProcessMutex;
import org.apache.curator.framework.recipes.locks.InterProcessReadWriteLock;
import org.apache.curator.retry.RetryOneTime;

/** A Curator client that takes orders on stdin and reports on stdout. */
public class CuratorClient {
    public static void main(String[] args) throws Exception {
        CuratorFramework client = CuratorFrameworkFactory.newClient(args[0], 10000, 10000, new RetryOneTime(100));
        client.start();
        client.blockUntilConnected();
        System.out.println("ready");
        InterProcessMutex mutex = null;
        InterProcessReadWriteLock shared = null;
        Scanner orders = new Scanner(System.in);
        while (orders.hasNext()) {
            String order = orders.next();
            String path = orders.next();
            if (mutex == null) {
                mutex = new InterProcessMutex(client, path);
                shared = new InterProcessReadWriteLock(client, path);
            }
            switch (order) {
                case "acquire": mutex.acquire(); System.out.println("acquired"); break;
                case "release": mutex.release(); System.out.println("released"); break;
                case "read": shared.readLock().acquire(); System.out.println("read"); break;
                case "unread": shared.readLock().release(); System.out.println("unread"); break;
                case "write": shared.writeLock().acquire(); System.out.println("write"); break;
                case "unwrite": shared.writeLock().release(); System.out.println("unwrite"); break;
                default: throw new IllegalArgumentException(order);
            }
        }
    }
}
