//! The steps of a transaction, and a hook at each: for tests that stop or kill a process there.
//!
//! Promise: the hook is awaited at the step and nothing goes on before it returns, so a process that dies in it has done
//! what comes before the step and nothing of what comes after.

use std::{fmt, sync::Arc};

use futures_util::future::BoxFuture;

use super::{Decision, TxId};

/// A moment in the life of a transaction, as its driver, a recoverer or a serving participant passes it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// Before anything is written.
    Begin,
    /// The transaction is in the log; no participant has been asked.
    Begun,
    /// Before this participant is asked to prepare.
    Prepare(String),
    /// It has answered, or its answer was given up.
    Voted(String),
    /// With three phases: all are in favour, and that is not written.
    Ready,
    /// With three phases: that all are in favour stands in the log.
    Readied,
    /// All votes are in; the decision is not written.
    Decide(Decision),
    /// The decision stands in the log; nobody has been told.
    Decided(Decision),
    /// Before this participant is told.
    Deliver(String),
    /// It has confirmed.
    Acknowledged(String),
    /// All have confirmed; before the log forgets.
    Forget,
    /// The log has forgotten.
    Forgotten,
    /// A recoverer has taken the transaction over and done nothing yet.
    TakenOver,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Begin => f.write_str("begin"),
            Self::Begun => f.write_str("begun"),
            Self::Prepare(participant) => write!(f, "prepare {participant}"),
            Self::Voted(participant) => write!(f, "voted {participant}"),
            Self::Ready => f.write_str("ready"),
            Self::Readied => f.write_str("readied"),
            Self::Decide(decision) => write!(f, "decide {decision}"),
            Self::Decided(decision) => write!(f, "decided {decision}"),
            Self::Deliver(participant) => write!(f, "deliver {participant}"),
            Self::Acknowledged(participant) => write!(f, "acknowledged {participant}"),
            Self::Forget => f.write_str("forget"),
            Self::Forgotten => f.write_str("forgotten"),
            Self::TakenOver => f.write_str("taken over"),
        }
    }
}

/// Called at each step of each transaction.
#[derive(Clone, Default)]
pub(super) struct Hook(pub(super) Option<Call>);

type Call = Arc<dyn Fn(TxId, Step) -> BoxFuture<'static, ()> + Send + Sync>;

impl Hook {
    pub(super) async fn at(&self, id: TxId, step: impl FnOnce() -> Step) {
        if let Some(hook) = &self.0 {
            hook(id, step()).await;
        }
    }
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Hook(set)" } else { "Hook(none)" })
    }
}
