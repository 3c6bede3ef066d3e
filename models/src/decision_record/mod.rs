//! What quorate does: two-phase commit with presumed abort, whose decision is a record that is created at most once;
//! on request with a third phase, a record that all are in favour.
//!
//! Promise: with three participants, one driver and two recoverers the properties hold in every state that can be reached
//! although
//! - the driver and each recoverer may crash, or stop for any time, between any two steps;
//! - a recoverer may take over at any time, also from a driver that is only slow, and two may do so at once: the lock
//!   that keeps them apart is no part of the model;
//! - every call of a participant may be lost, come late and come again, its answers as well;
//! - a write to the store whose answer was lost may land at any later time, and again.
//!
//! A crash between two messages of one step is a message that is lost; a restart is a recoverer that had no part so far.

mod steps;

use stateright::{Model, Property};

use crate::Decision;

/// Two-phase commit over a store, with `N` participants.
#[derive(Debug, Clone, Default)]
pub struct DecisionRecord<const N: usize> {
    /// How many processes recover: none, one or two.
    pub recoverers: usize,
    /// Whether it is three-phase: before it decides to commit, the driver writes down that all are in favour, and from then
    /// on whoever recovers commits instead of aborting.
    pub pre_commits: bool,
    /// Whether an operator may decide by hand: to abort at any time, to commit if everyone is prepared.
    pub operator: bool,
    /// A rule that is broken.
    pub flaw: Option<Flaw>,
}

/// A rule that is broken, to see that it is needed and that the checker notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// The decision is created where there is none, without a look whether the transaction is over.
    DecidesUnchecked,
    /// It is forgotten before everyone has confirmed.
    ForgetsEarly,
    /// A recoverer commits when it finds somebody prepared.
    RecovererGuesses,
    /// The driver tells its decision without having created it.
    DriverDecidesAlone,
    /// A participant does not remember what it has aborted. Recoverers still look for what came late.
    NoTombstones,
    /// Nor does anyone look for what came late.
    NoTombstonesNoLook,
    /// A prepared participant aborts when it has waited for long.
    TimesOutAlone,
    /// Participants are asked before it is confirmed that the transaction is in the log.
    PreparesBeforeBegun,
    /// A begin whose answer was lost is sent again.
    BeginsAgain,
    /// Whoever looks for what came late asks the participant once, before the log, and not once more after it.
    LooksOnce,
    /// A driver that finds its transaction decided and forgotten by others takes it for aborted, without a look for a
    /// decision by hand, and although it has written that all are in favour.
    OverMeansAborted,
    /// The operator takes the decision by hand off the list while the driver may still look for it.
    AcknowledgesEarly,
    /// That all are in favour is written without a look whether the transaction is over.
    ReadyUnchecked,
    /// An abort is decided without a look whether all are in favour.
    AbortsTheReady,
}

/// The record of the transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tx {
    /// Not written yet.
    Ahead,
    /// Written.
    Stands,
    /// Deleted: forgotten.
    Over,
}

/// What a participant answers to a prepare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Vote {
    /// In favour, and durable.
    Yes,
    /// Against, and out.
    No,
    /// Nothing to do, and out.
    ReadOnly,
}

/// Where a participant's branch is. All of it is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    /// Nothing has come.
    Working,
    /// It has voted yes and waits.
    Prepared,
    /// The end; the branch is remembered.
    Committed,
    /// The end; the branch is remembered, so that a late prepare is refused.
    Aborted,
    /// It has voted no: the end.
    Refused,
    /// It has voted read-only: the end.
    Out,
}

/// How far a recoverer has come that looks for branches whose prepare came late.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Look {
    /// It has not looked.
    No,
    /// The participant has said that the branch is prepared.
    Prepared,
    /// There was no decision; whether the transaction is over is read next.
    NoDecision,
    /// It is over, or was never begun. The participant is to be asked again.
    Over,
    /// It still said so; an abort is on its way, and may arrive again for ever.
    Aborting,
}

/// A participant, its answers on the way, and what the driver has heard of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Branch {
    /// Where it is.
    pub status: Status,
    /// Votes on the way to the driver, as bits: a branch that was aborted meanwhile may have sent two.
    pub votes: u8,
    /// The driver counts this one, the first it has heard.
    pub heard: Option<Vote>,
    /// It has confirmed an outcome.
    pub confirmed: bool,
    /// Somebody looks whether its prepare came late.
    pub look: Look,
}

/// Where the driver is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Driver {
    /// Nothing done.
    Ready,
    /// The record is on its way.
    Beginning,
    /// Participants are asked.
    Collecting,
    /// That all are in favour is on its way to the store.
    Readying,
    /// The decision is on its way to the store. Unsure: the answer of an earlier attempt was lost.
    Deciding {
        /// The decision it would make.
        wanted: Decision,
        /// An earlier attempt may land.
        unsure: bool,
    },
    /// The store has refused it; what stands there is to be read.
    Refused {
        /// The decision it would have made.
        wanted: Decision,
        /// An earlier attempt may have landed.
        unsure: bool,
    },
    /// Telling the decision until everyone has confirmed.
    Telling(Decision),
    /// Crashed, or through.
    Gone,
}

/// Where a recoverer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Recoverer {
    /// Crashed, or never there.
    Dead,
    /// It may take the transaction over.
    Idle,
    /// It has read that there is no decision; whether the transaction is over is read next.
    SawNoDecision,
    /// It has read that nothing is decided.
    SawUndecided,
    /// It has read that nothing is decided and all are in favour.
    SawReady,
    /// Telling the decision until everyone has confirmed.
    Telling(Decision),
}

/// What is on its way to participants and to the store. What was sent may arrive again for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct OnTheWay {
    /// The record of the transaction, to the store: once.
    pub begin: bool,
    /// To every participant.
    pub prepare: bool,
    /// To every participant.
    pub commit: bool,
    /// To every participant.
    pub abort: bool,
    /// To the store, from an attempt whose answer nobody waits for any more.
    pub decide_commit: bool,
    /// To the store, as before.
    pub decide_abort: bool,
    /// To the store, as before.
    pub ready: bool,
    /// To the store.
    pub forget: bool,
}

/// What has happened, for the properties alone: no rule looks at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct History {
    /// The decision to commit was made.
    pub commit: bool,
    /// The decision to abort was made.
    pub abort: bool,
    /// It was written down that all are in favour.
    pub ready: bool,
    /// A branch has left an end.
    pub moved_back: bool,
    /// A prepare was accepted after the abort of its branch.
    pub late_prepare: bool,
    /// A branch that has committed was told to abort, or the other way round.
    pub told_both: bool,
}

/// A state of the whole. Participants and recoverers are kept in order, because their names do not matter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State<const N: usize> {
    /// In the store.
    pub tx: Tx,
    /// In the store.
    pub decision: Option<Decision>,
    /// In the store: all are in favour.
    pub ready: bool,
    /// In the store, until the operator takes it away: the decision by hand.
    pub by_hand: Option<Decision>,
    /// In memory.
    pub driver: Driver,
    /// In memory.
    pub recoverers: [Recoverer; 2],
    /// The participants.
    pub branches: [Branch; N],
    /// In the network.
    pub on_the_way: OnTheWay,
    /// For the properties.
    pub history: History,
}

/// A step. Numbers are places in the lists of the state before the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The driver sends the record.
    SendBegin,
    /// It is written.
    BeginLands,
    /// The driver hears so, and asks all participants.
    Begun,
    /// A participant is asked to prepare, and would vote so.
    PrepareArrives(usize, Vote),
    /// The driver hears a vote.
    HearVote(usize, Vote),
    /// All are in favour.
    ChooseCommit,
    /// Somebody is not, or time is up.
    ChooseAbort,
    /// All are out: it is forgotten without a decision.
    NothingToDo,
    /// The driver hears that it is written down that all are in favour, or that it was refused.
    DriverIsReady,
    /// That all are in favour is written from an attempt given up.
    LateReady,
    /// The driver's attempt reaches the store, and the driver hears what came of it.
    DriverDecides,
    /// The driver does not hear what came of it, and tries again.
    DriverLosesReply,
    /// A decision from an attempt given up lands.
    LateDecide(Decision),
    /// The driver reads what stands.
    DriverLooks,
    /// The driver asks the store to forget.
    DriverForgets,
    /// The store is asked to forget.
    ForgetLands,
    /// A participant is told, by a message that may be as old as the decision.
    CommitArrives(usize),
    /// A participant is told, by a message that may be as old as the decision.
    AbortArrives(usize),
    /// The driver is dead from here on.
    DriverCrashes,
    /// A recoverer finds the transaction in the log and reads the decision.
    RecovererLooks(usize),
    /// It reads whether the transaction is still in the log.
    RecovererLooksAgain(usize),
    /// Its abort reaches the store, and it hears what came of it.
    RecovererAborts(usize),
    /// It does not hear what came of it, and begins again.
    RecovererLosesReply(usize),
    /// It tells the second, which hears it.
    RecovererTells(usize, usize),
    /// It asks the store to forget.
    RecovererForgets(usize),
    /// It is dead from here on.
    RecovererCrashes(usize),
    /// A recoverer that looks for late prepares goes one step on.
    Look(usize),
    /// It has found one, and the participant is told.
    OrphanAbortArrives(usize),
    /// The operator decides.
    OperatorDecides(Decision),
    /// The operator takes the decision by hand off the list.
    Acknowledge,
    /// Its commit reaches the store, because all are in favour, and it hears what came of it; or [`Flaw::RecovererGuesses`].
    RecovererCommits(usize),
    /// [`Flaw::TimesOutAlone`].
    TimesOut(usize),
}

impl Action {
    /// Whether it is of those that finish what a driver left: steps of recoverers and of participants that they reach.
    /// The driver does not help, nor does a message of old that happens to arrive.
    pub fn recovers(&self) -> bool {
        matches!(
            self,
            Self::ForgetLands
                | Self::RecovererTells(..)
                | Self::RecovererLooks(_)
                | Self::RecovererLooksAgain(_)
                | Self::RecovererAborts(_)
                | Self::RecovererCommits(_)
                | Self::RecovererForgets(_)
                | Self::Look(_)
                | Self::OrphanAbortArrives(_)
        )
    }
}

impl<const N: usize> State<N> {
    /// Whether any branch is there.
    pub fn any(&self, status: Status) -> bool {
        self.branches.iter().any(|b| b.status == status)
    }

    /// Whether a recoverer lives.
    pub fn is_recovered(&self) -> bool {
        self.recoverers.iter().any(|r| *r != Recoverer::Dead)
    }

    /// Whether nothing is left to do: not begun and nobody asked; or forgotten, and every branch at an end.
    pub fn is_settled(&self) -> bool {
        match self.tx {
            Tx::Ahead => self.branches.iter().all(|b| b.status == Status::Working),
            Tx::Stands => false,
            Tx::Over => {
                self.decision.is_none() && !self.ready && !self.any(Status::Working) && !self.any(Status::Prepared)
            }
        }
    }
}

impl<const N: usize> Model for DecisionRecord<N> {
    type State = State<N>;
    type Action = Action;

    fn init_states(&self) -> Vec<State<N>> {
        let mut recoverers = [Recoverer::Dead; 2];
        recoverers[2 - self.recoverers..].fill(Recoverer::Idle);
        let branch = Branch { status: Status::Working, votes: 0, heard: None, confirmed: false, look: Look::No };
        vec![State {
            tx: Tx::Ahead,
            decision: None,
            ready: false,
            by_hand: None,
            driver: Driver::Ready,
            recoverers,
            branches: [branch; N],
            on_the_way: OnTheWay::default(),
            history: History::default(),
        }]
    }

    fn actions(&self, state: &State<N>, actions: &mut Vec<Action>) {
        self.of_driver(state, actions);
        self.of_recoverers(state, actions);
        self.of_network(state, actions);
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
            Property::always("P26 a branch that has ended stays as it is", |_, s: &State<N>| !s.history.moved_back),
            Property::always("P27 no participant commits while another aborts", |_, s: &State<N>| {
                !(s.any(Committed) && (s.any(Aborted) || s.any(Refused)))
            }),
            Property::always("P27 nobody is told both", |_, s: &State<N>| !s.history.told_both),
            Property::always("P28 commit is decided only if all are in favour", |_, s: &State<N>| {
                !s.history.commit || s.branches.iter().all(|b| matches!(b.status, Prepared | Committed | Out))
            }),
            Property::always("P30 nobody prepared ends undecided", |_, s: &State<N>| {
                (s.history.commit || !s.any(Committed)) && (s.history.abort || !s.any(Aborted))
            }),
            Property::always("P30 a prepare that comes late is refused", |_, s: &State<N>| !s.history.late_prepare),
            Property::always("P32 what all are in favour of is not aborted", |_, s: &State<N>| {
                !(s.history.ready && s.history.abort)
            }),
            Property::always("P33 there is one decision", |_, s: &State<N>| !(s.history.commit && s.history.abort)),
            Property::always("P33 nothing is decided that is over", |_, s: &State<N>| {
                s.tx != Tx::Over || s.decision.is_none()
            }),
            Property::sometimes("P28 commit is reached", |_, s: &State<N>| {
                s.is_settled() && s.branches.iter().all(|b| b.status == Committed)
            }),
            Property::sometimes("P28 abort is reached", |_, s: &State<N>| s.is_settled() && s.any(Aborted)),
            Property::sometimes("P28 commit is reached with somebody read-only", |_, s: &State<N>| {
                s.is_settled() && s.any(Committed) && s.any(Out)
            }),
        ]
    }
}
