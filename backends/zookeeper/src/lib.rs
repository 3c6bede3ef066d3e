//! ZooKeeper backend for quorate
