//! The scripts, and how they are sent.
//!
//! Promise: every call is one request and one answer; only after the server has forgotten a script (restart,
//! `SCRIPT FLUSH`, failover) does a call take a second one, which brings the script along.

use std::{fmt, sync::LazyLock};

use redis::{Cmd, RedisError, RedisResult, ServerErrorKind, Value, aio::MultiplexedConnection};

const PRELUDE: &str = include_str!("lua/prelude.lua");
const REVISING: &str = include_str!("lua/revising.lua");
const TICKETS: &str = include_str!("lua/tickets.lua");
const ENDS: &str = include_str!("lua/ends.lua");
const WATCHING: &str = include_str!("lua/watching.lua");

/// A script of this crate.
pub(crate) struct Script {
    code: String,
    sha: String,
}

impl Script {
    /// A script that makes no key go by itself: it needs to know how only if a lease has ended, which is rare.
    fn lean(body: &str) -> Self {
        Self::of(&["if #due > 0 then", REVISING, TICKETS, ENDS, "reap() store() tell()", "end", body])
    }

    /// A lean script that watches directories.
    fn watching(body: &str) -> Self {
        Self::lean(&[REVISING, WATCHING, body].concat())
    }

    /// A script that makes keys or leases go if this Lua expression says so; it calls `tell` when all is done,
    /// once, so that watchers get one message for each revision.
    fn full(needed: &str, body: &str) -> Self {
        let needed = format!("if #due > 0 or {needed} then");
        Self::of(&[REVISING, TICKETS, &needed, ENDS, "reap()", "end", body])
    }

    fn of(parts: &[&str]) -> Self {
        let code = format!("{PRELUDE}\n{}", parts.join("\n"));
        let sha = redis::Script::new(&code).get_hash().to_owned();
        Self { code, sha }
    }
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Script({})", self.sha)
    }
}

pub(crate) static HELLO: LazyLock<Script> =
    LazyLock::new(|| Script::of(&[REVISING, TICKETS, ENDS, include_str!("lua/hello.lua")]));
pub(crate) static GRANT: LazyLock<Script> = LazyLock::new(|| Script::lean(include_str!("lua/grant.lua")));
pub(crate) static RENEW: LazyLock<Script> = LazyLock::new(|| Script::lean(include_str!("lua/renew.lua")));
pub(crate) static CLOCK: LazyLock<Script> = LazyLock::new(|| Script::of(&[include_str!("lua/clock.lua")]));
pub(crate) static REVOKE: LazyLock<Script> = LazyLock::new(|| Script::full("true", include_str!("lua/revoke.lua")));
pub(crate) static READ: LazyLock<Script> = LazyLock::new(|| Script::watching(include_str!("lua/read.lua")));
pub(crate) static COMMIT: LazyLock<Script> =
    LazyLock::new(|| Script::full("ARGV[1] ~= ''", include_str!("lua/commit.lua")));
pub(crate) static RELEASE: LazyLock<Script> = LazyLock::new(|| Script::lean(include_str!("lua/release.lua")));
pub(crate) static ENQUEUE: LazyLock<Script> = LazyLock::new(|| Script::lean(include_str!("lua/enqueue.lua")));
pub(crate) static LOOK: LazyLock<Script> = LazyLock::new(|| Script::lean(include_str!("lua/look.lua")));
pub(crate) static LINE: LazyLock<Script> = LazyLock::new(|| Script::lean(include_str!("lua/line.lua")));
pub(crate) static WAIT: LazyLock<Script> = LazyLock::new(|| Script::watching(include_str!("lua/wait.lua")));

/// The three keys of a namespace. All carry the same hash tag, so that they share one slot of a cluster.
#[derive(Debug, Clone)]
pub(crate) struct Keys {
    base: String,
    records: String,
    index: String,
    timers: String,
}

impl Keys {
    /// The tag is never empty and never holds the first `}` of a namespace by itself, so that any namespace
    /// gives one slot and no two share keys.
    pub(crate) fn new(namespace: &str, db: i64) -> Self {
        let slash = if namespace.is_empty() { "" } else { "/" };
        let db = if db == 0 { String::new() } else { format!("@{db}") };
        let base = format!("{{quorate{slash}{namespace}}}{db}:");
        Self { records: format!("{base}h"), index: format!("{base}z"), timers: format!("{base}t"), base }
    }

    /// The channel on which a client is told of tickets that went.
    pub(crate) fn client_channel(&self, client: &str) -> String {
        format!("{}c:{client}", self.base)
    }

    /// The channel of a directory's changes.
    pub(crate) fn dir_channel(&self, dir: &str) -> String {
        format!("{}d:{dir}", self.base)
    }

    /// The directory of a channel, if it is one.
    pub(crate) fn dir_of<'a>(&self, channel: &'a str) -> Option<&'a str> {
        channel.strip_prefix(&*self.base)?.strip_prefix("d:")
    }
}

/// A call of a script, ready to be sent.
pub(crate) struct Call {
    script: &'static Script,
    cmd: Cmd,
}

impl Call {
    pub(crate) fn new(script: &'static Script, keys: &Keys) -> Self {
        let mut cmd = redis::cmd("EVALSHA");
        cmd.arg(&script.sha).arg(3).arg(&keys.records).arg(&keys.index).arg(&keys.timers);
        Self { script, cmd }
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<[u8]>) -> Self {
        self.push(arg);
        self
    }

    pub(crate) fn push(&mut self, arg: impl AsRef<[u8]>) {
        self.cmd.arg(arg.as_ref());
    }

    /// Sends it and waits for the answer.
    pub(crate) async fn send(&self, conn: &mut MultiplexedConnection) -> RedisResult<Value> {
        let answer = conn.send_packed_command(&self.cmd).await.and_then(Value::extract_error);
        match answer {
            Err(e) if e.kind() == ServerErrorKind::NoScript.into() => self.load_and_send(conn).await,
            other => other,
        }
    }

    async fn load_and_send(&self, conn: &mut MultiplexedConnection) -> RedisResult<Value> {
        let mut pipe = redis::pipe();
        pipe.cmd("SCRIPT").arg("LOAD").arg(&self.script.code).add_command(self.cmd.clone());
        let answers = conn.send_packed_commands(&pipe, 0, 2).await?;
        let mut answers = answers.into_iter();
        // If the load was refused, its reason says more than the second NOSCRIPT.
        answers.next().map(Value::extract_error).transpose()?;
        answers.next().ok_or_else(|| malformed("a missing answer"))?.extract_error()
    }
}

/// The answer does not have the form that the script gives it.
pub(crate) fn malformed(what: &'static str) -> RedisError {
    RedisError::from((redis::ErrorKind::UnexpectedReturnType, "a script's answer is malformed", what.to_owned()))
}

/// The parts of an answer, taken one after another.
pub(crate) struct Parts(std::vec::IntoIter<Value>);

impl Parts {
    pub(crate) fn of(value: Value) -> RedisResult<Self> {
        match value {
            Value::Array(parts) => Ok(Self(parts.into_iter())),
            _ => Err(malformed("no array")),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.as_slice().is_empty()
    }

    pub(crate) fn int(&mut self) -> RedisResult<i64> {
        match self.0.next() {
            Some(Value::Int(n)) => Ok(n),
            _ => Err(malformed("no number")),
        }
    }

    pub(crate) fn number(&mut self) -> RedisResult<u64> {
        u64::try_from(self.int()?).map_err(|_| malformed("a negative number"))
    }

    pub(crate) fn bytes(&mut self) -> RedisResult<Vec<u8>> {
        match self.0.next() {
            Some(Value::BulkString(bytes)) => Ok(bytes),
            _ => Err(malformed("no string")),
        }
    }

    pub(crate) fn text(&mut self) -> RedisResult<String> {
        String::from_utf8(self.bytes()?).map_err(|_| malformed("no UTF-8"))
    }

    pub(crate) fn parts(&mut self) -> RedisResult<Self> {
        Self::of(self.0.next().ok_or_else(|| malformed("a missing part"))?)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_namespace_has_a_tag_of_its_own_that_is_not_empty() {
        let bases: Vec<String> =
            ["", "quorate", "}", "a}b", "a", "a/b"].map(|ns| Keys::new(ns, 0).base).into_iter().collect();
        for (i, base) in bases.iter().enumerate() {
            let open = base.find('{').unwrap();
            let close = base[open..].find('}').unwrap();
            assert!(close > 1, "{base}");
            assert!(!bases[..i].contains(base), "{base}");
        }
        assert_ne!(Keys::new("a", 0).base, Keys::new("a", 1).base);
    }

    #[test]
    fn channels_lead_back_to_their_directory() {
        let keys = Keys::new("app", 0);
        assert_eq!(keys.dir_of(&keys.dir_channel("lock/a")), Some("lock/a"));
        assert_eq!(keys.dir_of(&keys.client_channel("x")), None);
    }
}
