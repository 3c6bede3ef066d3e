//! Free loopback ports that stay ours while a server is down between `kill` and `restart`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::OpenOptionsExt;

use rand::RngExt;
use rustix::fs::{FlockOperation, flock};

use super::Error;

/// Below the range from which Linux takes the source port of outgoing connections: otherwise a client's
/// connection could sit on the port of a stopped server and make its restart fail.
const RANGE: std::ops::Range<u16> = 12_000..32_000;

/// A port of 127.0.0.1 that nobody listened on, reserved against other users of this crate.
#[derive(Debug)]
pub(crate) struct Port {
    number: u16,
    /// Locked for as long as the port is ours; the kernel unlocks it when this process ends. The file is
    /// never deleted: a second process could then hold a lock on a file that is no longer there.
    _lock: File,
}

impl Port {
    pub(crate) fn reserve() -> Result<Self, Error> {
        let uid = rustix::process::getuid().as_raw();
        let dir = std::env::temp_dir().join(format!("quorate-testkit-ports-{uid}"));
        fs::create_dir_all(&dir).map_err(|e| Error::writing(&dir, e))?;
        for _ in 0..500 {
            let number = rand::rng().random_range(RANGE);
            let path = dir.join(number.to_string());
            let lock = OpenOptions::new()
                .create(true)
                .append(true)
                .mode(0o600)
                .open(&path)
                .map_err(|e| Error::writing(&path, e))?;
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() && is_free(number) {
                return Ok(Self { number, _lock: lock });
            }
        }
        Err(Error::io(
            "reserve a loopback port",
            io::Error::new(io::ErrorKind::AddrInUse, "500 ports tried, none free"),
        ))
    }

    pub(crate) fn number(&self) -> u16 {
        self.number
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        loopback(self.number)
    }
}

pub(crate) fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// Whether a server could listen on that port of 127.0.0.1 now.
pub(crate) fn is_free(port: u16) -> bool {
    TcpListener::bind(loopback(port)).is_ok()
}
