//! Participants in other processes, which are reached, and vote, through records of the store.
//!
//! Promise: what [`decision_record`](crate::decision_record) promises, also where votes and outcomes are records; and
//! nothing of a finished transaction stays in the store. A vote counts only while its work record is as it was.
//!
//! The faults are those of `decision_record`, for a driver, one recoverer and the processes that serve participants: these
//! may stop, die and be replaced between any two steps, so each call of the resource may come late and again.

mod steps;

use stateright::{Model, Property};

use crate::{
    Decision,
    decision_record::{Driver, Look, Recoverer, Status, Tx, Vote},
};

/// Atomic commit with `N` participants that are reached through the store.
#[derive(Debug, Clone, Default)]
pub struct Remote<const N: usize> {
    /// Work does not fit into the step of the begin, nor the outcome into that of the decision: each record is a step of
    /// its own.
    pub piecemeal: bool,
    /// A rule that is broken.
    pub flaw: Option<Flaw>,
}

/// A rule that is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// A vote is written although its work record has changed.
    VotesUnchecked,
    /// Work that did not fit is put although there is a decision.
    GivesWorkAfterDecision,
    /// An outcome that did not fit is put over whatever is there, also where the participant has confirmed.
    TellsTheConfirmed,
    /// A commit is forgotten although work records stand.
    ForgetsEarly,
}

/// A participant, and the records that stand for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Branch {
    /// Where it is: durable, in the resource.
    pub status: Status,
    /// Its work record.
    pub work: Option<Work>,
    /// Its answer in the driver's mailbox.
    pub mail: Option<Mail>,
    /// The driver has put its work record.
    pub given: bool,
    /// Calls of the resource that were sent and may arrive for ever: prepare, commit, abort, as bits.
    pub calls: u8,
    /// Answers of the resource to a prepare, on the way to whoever serves it.
    pub votes: u8,
    /// The driver has read this vote.
    pub heard: Option<Vote>,
    /// The driver knows that it has confirmed, or need not be waited for.
    pub done: bool,
    /// The recoverer knows so.
    pub passed: bool,
    /// Whether somebody looks for a late prepare.
    pub look: Look,
}

/// What a work record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Work {
    /// To be prepared.
    Prepare,
    /// To be ended so.
    End(Decision),
}

/// What a letter says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mail {
    /// A vote.
    Vote(Vote),
    /// It has committed.
    Done,
}

/// A state of the whole. Participants are kept in order, because their names do not matter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State<const N: usize> {
    /// In the store.
    pub tx: Tx,
    /// In the store.
    pub decision: Option<Decision>,
    /// In memory.
    pub driver: Driver,
    /// In memory.
    pub recoverer: Recoverer,
    /// The participants.
    pub branches: [Branch; N],
    /// A decision that was sent, and whose sender is not there any more, may land: commit, abort.
    pub late: [bool; 2],
    /// For the properties: commit was decided, abort was, somebody was told both.
    pub history: [bool; 3],
}

/// A step. Numbers are places in the list of the state before the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The driver's begin lands; it may hear so late.
    Begin,
    /// It hears so.
    Begun,
    /// The driver puts a work record that did not fit into the begin.
    Give(usize),
    /// The driver reads a vote.
    Hear(usize),
    /// All are in favour.
    ChooseCommit,
    /// Somebody is not, or time is up.
    ChooseAbort,
    /// The driver's decision lands and it hears what came of it; or it reads what stands after it was refused.
    DriverDecides,
    /// The driver puts an outcome that did not fit into the decision.
    Tell(usize),
    /// The driver learns that a participant has confirmed.
    DriverPasses(usize),
    /// The driver takes everything away.
    DriverForgets,
    /// The driver is dead from here on; what it has sent last may land.
    DriverCrashes,
    /// A decision lands late.
    LateDecide(Decision),
    /// The recoverer goes one step on towards a decision.
    RecovererLooks,
    /// Its abort lands, and it hears what came of it.
    RecovererAborts,
    /// It tells one whose record waits, or learns that it has confirmed.
    RecovererPasses(usize),
    /// It takes everything away.
    RecovererForgets,
    /// It begins again, as another one would; what it has sent last may land.
    RecovererRestarts,
    /// Whoever serves the participant sees its work record and calls the resource.
    Serve(usize),
    /// A prepare arrives at the resource, which would vote so.
    PrepareArrives(usize, Vote),
    /// The outcome arrives at the resource.
    EndArrives(usize, Decision),
    /// The vote is written.
    Votes(usize, Vote),
    /// The confirmation is written.
    Confirms(usize),
    /// Whoever serves it looks for a prepare that came late, one step on.
    Look(usize),
}

impl Action {
    /// Whether it is of those that finish what a driver left: steps of the recoverer and of those that serve.
    pub fn recovers(&self) -> bool {
        matches!(
            self,
            Self::RecovererLooks
                | Self::RecovererAborts
                | Self::RecovererPasses(_)
                | Self::RecovererForgets
                | Self::Serve(_)
                | Self::EndArrives(..)
                | Self::Confirms(_)
                | Self::Look(_)
        )
    }
}

impl<const N: usize> State<N> {
    /// Whether any participant is there.
    pub fn any(&self, status: Status) -> bool {
        self.branches.iter().any(|b| b.status == status)
    }

    /// Whether nothing is left to do and nothing is left in the store.
    pub fn is_settled(&self) -> bool {
        let swept = self.decision.is_none() && self.branches.iter().all(|b| b.work.is_none() && b.mail.is_none());
        self.tx != Tx::Stands && swept && !self.any(Status::Prepared)
    }
}

impl<const N: usize> Model for Remote<N> {
    type State = State<N>;
    type Action = Action;

    fn init_states(&self) -> Vec<State<N>> {
        let branch = Branch {
            status: Status::Working,
            work: None,
            mail: None,
            given: false,
            calls: 0,
            votes: 0,
            heard: None,
            done: false,
            passed: false,
            look: Look::No,
        };
        vec![State {
            tx: Tx::Ahead,
            decision: None,
            driver: Driver::Ready,
            recoverer: Recoverer::Idle,
            branches: [branch; N],
            late: [false; 2],
            history: [false; 3],
        }]
    }

    fn actions(&self, state: &State<N>, actions: &mut Vec<Action>) {
        self.of_driver(state, actions);
        self.of_recoverer(state, actions);
        self.of_participants(state, actions);
    }

    fn next_state(&self, last: &State<N>, action: Action) -> Option<State<N>> {
        let mut state = last.clone();
        self.step(&mut state, action);
        state.tidy();
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        use Status::{Aborted, Committed, Out, Prepared, Refused};
        vec![
            Property::always("P27 no participant commits while another aborts", |_, s: &State<N>| {
                !(s.any(Committed) && (s.any(Aborted) || s.any(Refused)))
            }),
            Property::always("P27 nobody is told both", |_, s: &State<N>| !s.history[2]),
            Property::always("P28 commit is decided only if all are in favour", |_, s: &State<N>| {
                !s.history[0] || s.branches.iter().all(|b| matches!(b.status, Prepared | Committed | Out))
            }),
            Property::always("P30 nobody prepared ends undecided", |_, s: &State<N>| {
                (s.history[0] || !s.any(Committed)) && (s.history[1] || !s.any(Aborted))
            }),
            Property::always("P33 there is one decision", |_, s: &State<N>| !(s.history[0] && s.history[1])),
            Property::sometimes("P28 commit is reached", |_, s: &State<N>| {
                s.is_settled() && s.branches.iter().all(|b| b.status == Committed)
            }),
            Property::sometimes("P28 abort is reached", |_, s: &State<N>| s.is_settled() && s.any(Aborted)),
        ]
    }
}
