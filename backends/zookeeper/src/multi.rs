//! One `multi` request under construction.

use quorate_core::{ErrorKind, Result};
use zookeeper_client as zk;

use crate::{connect::Conn, error::Call};

/// The largest request that we send: the server's default limit of 1 MiB − 1 (`jute.maxbuffer`), less what headers and
/// the access list take.
pub(crate) const MAX_REQUEST: usize = 1024 * 1024 - 4096;
/// What an operation takes besides its path and data, at the most.
const OVERHEAD: usize = 96;

/// Why a `multi` was refused: nothing of it was applied.
pub(crate) struct Refused {
    /// The operation that could not be done.
    pub(crate) index: usize,
    pub(crate) error: zk::Error,
}

/// What was done.
pub(crate) struct Done(Vec<zk::MultiWriteResult>);

impl Done {
    /// The statistics after the last `set`.
    pub(crate) fn last_set(&self) -> Option<zk::Stat> {
        self.0.iter().rev().find_map(|result| match result {
            zk::MultiWriteResult::SetData { stat } => Some(*stat),
            _ => None,
        })
    }

    /// The transaction's zxid, if any of its answers carries it. That of a plain create in a `multi` does not, on
    /// servers with ZOOKEEPER-4026.
    pub(crate) fn zxid(&self) -> Option<i64> {
        self.0.iter().find_map(|result| match result {
            zk::MultiWriteResult::SetData { stat } => Some(stat.mzxid),
            zk::MultiWriteResult::Create { stat, .. } if stat.czxid > 0 => Some(stat.czxid),
            _ => None,
        })
    }

    /// The node that the create at `index` made.
    pub(crate) fn path(&self, index: usize) -> Option<&str> {
        match self.0.get(index) {
            Some(zk::MultiWriteResult::Create { path, .. }) => Some(path),
            _ => None,
        }
    }

    /// The data version after the `set` at `index`.
    pub(crate) fn version(&self, index: usize) -> Option<i32> {
        match self.0.get(index) {
            Some(zk::MultiWriteResult::SetData { stat }) => Some(stat.version),
            _ => None,
        }
    }
}

pub(crate) struct Multi<'a> {
    conn: &'a Conn,
    writer: zk::MultiWriter<'a>,
    acls: zk::Acls<'static>,
    count: usize,
    bytes: usize,
    bad: Option<zk::Error>,
}

impl<'a> Multi<'a> {
    pub(crate) fn new(conn: &'a Conn, acls: zk::Acls<'static>) -> Self {
        Self { conn, writer: conn.client.new_multi_writer(), acls, count: 0, bytes: 0, bad: None }
    }

    /// Every operation returns its index.
    fn added(&mut self, outcome: Result<(), zk::Error>, bytes: usize) -> usize {
        self.bad = self.bad.take().or(outcome.err());
        self.bytes += bytes + OVERHEAD;
        self.count += 1;
        self.count - 1
    }

    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Version −1 stands for any.
    pub(crate) fn check(&mut self, path: &str, version: i32) -> usize {
        let outcome = self.writer.add_check_version(path, version);
        self.added(outcome, path.len())
    }

    pub(crate) fn create(&mut self, path: &str, data: &[u8], mode: zk::CreateMode) -> usize {
        let outcome = self.writer.add_create(path, data, &mode.with_acls(self.acls));
        self.added(outcome, path.len() + data.len())
    }

    pub(crate) fn set(&mut self, path: &str, data: &[u8], version: i32) -> usize {
        let outcome = self.writer.add_set_data(path, data, Some(version));
        self.added(outcome, path.len() + data.len())
    }

    pub(crate) fn delete(&mut self, path: &str, version: i32) -> usize {
        let outcome = self.writer.add_delete(path, Some(version));
        self.added(outcome, path.len())
    }

    /// Sends it. The inner result is the server's answer.
    pub(crate) async fn commit(mut self, call: &Call<'_>) -> Result<Result<Done, Refused>> {
        if let Some(error) = self.bad {
            return Err(call.failed(error));
        }
        if self.bytes > MAX_REQUEST {
            let message = format!("the transaction has {} bytes, at most {MAX_REQUEST} are allowed", self.bytes);
            return Err(call.error(ErrorKind::InvalidInput, message));
        }
        match self.conn.call(self.writer.commit()).await {
            Ok(results) => Ok(Ok(Done(results))),
            Err(zk::MultiWriteError::OperationFailed { index, source }) => Ok(Err(Refused { index, error: source })),
            Err(zk::MultiWriteError::RequestFailed { source }) => Err(self.conn.failed(call, source)),
        }
    }
}
