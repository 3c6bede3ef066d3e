//! Three-phase commit: what timeouts can do, what they cannot, and what a record in the store changes.
//!
//! Promise: the checker says under which faults which rule for participants that hear nothing any more keeps all on one
//! side.
//!
//! | rule for who hears nothing | the coordinator crashes between phases | anybody crashes anywhere | partition |
//! |---|---|---|---|
//! | [`Rule::Alone`]: prepared aborts, pre-committed commits | safe | diverges | diverges |
//! | [`Rule::Termination`]: a backup coordinator levels all, then decides | safe | safe | diverges |
//! | [`Rule::Record`]: create the decision in the store, or follow the one there | safe | safe | safe |
//!
//! The first two need what no network promises: that who is silent is dead, and that every message arrives within a known
//! time. Here they get it as long as no partition is asked for: a timeout fires only when the coordinator is dead and
//! everything it has sent has arrived. Under the third rule it fires whenever it likes.
//!
//! Source: D. Skeen, "Nonblocking Commit Protocols" (1981), for the states, the timeouts and the termination protocol.

mod steps;

use stateright::{Model, Property};

use crate::Decision;

/// Three-phase commit with `N` participants.
#[derive(Debug, Clone)]
pub struct ThreePhase<const N: usize> {
    /// What participants do that hear nothing any more.
    pub rule: Rule,
    /// What may go wrong.
    pub faults: Faults,
}

/// What a participant does that has waited for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Prepared, it aborts; pre-committed, it commits.
    Alone,
    /// One of those that live becomes coordinator: it brings all others to its own state, then all to the end of it.
    Termination,
    /// It creates the decision in the store if there is none: commit if all have voted, which is on record, else abort.
    /// Then it follows what stands.
    Record,
}

/// What may go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// The coordinator crashes, but never while it tells: all hear it or none.
    BetweenPhases,
    /// The coordinator and participants crash, at any step, and stay dead.
    Crashes,
    /// Nobody crashes. The network falls in two, at any time and more than once, and is healed.
    Partition,
    /// Crashes and partitions.
    Both,
}

/// Where a participant is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Status {
    /// It has not voted.
    Working,
    /// It has voted yes.
    Prepared,
    /// It knows that all have voted yes.
    PreCommitted,
    /// The end.
    Committed,
    /// The end.
    Aborted,
}

/// A participant, what is on its way to it, and what the coordinator knows of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Participant {
    /// Where it is.
    pub status: Status,
    /// A pre-commit is on its way.
    pub pre_commit: bool,
    /// The outcome is on its way, behind that.
    pub outcome: Option<Decision>,
    /// It was told so much: nothing, the pre-commit, the outcome.
    pub told: u8,
    /// The coordinator has heard so much from it: nothing, a yes, that it has pre-committed.
    pub heard: u8,
    /// Crashed.
    pub dead: bool,
    /// On the side of a partition where the coordinator is not.
    pub far: bool,
    /// It has become coordinator, to this end.
    pub leads: Option<Decision>,
}

/// Where the coordinator is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Coordinator {
    /// Collecting votes.
    Asking,
    /// All have voted yes; that is to be recorded first ([`Rule::Record`]).
    Recording,
    /// Telling that all have voted yes.
    PreCommitting,
    /// It wants this decision on record ([`Rule::Record`]).
    Deciding(Decision),
    /// Telling the outcome.
    Telling(Decision),
    /// Crashed.
    Dead,
}

/// The store, for [`Rule::Record`]. Writes to it may land at any time after they were sent, and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Store {
    /// All have voted yes. Created only while there is no decision.
    pub ready: bool,
    /// The decision. Created once: commit at any time, abort only while it does not stand that all have voted yes.
    pub decision: Option<Decision>,
    /// On the far side of the partition.
    pub far: bool,
    /// On its way.
    pub sent_ready: bool,
    /// On its way, from the coordinator or a participant.
    pub sent_commit: bool,
    /// On its way, from the coordinator or a participant.
    pub sent_abort: bool,
}

/// A state of the whole. Participants are kept in order, because their names do not matter.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct State<const N: usize> {
    /// The coordinator.
    pub coordinator: Coordinator,
    /// The outcome that the coordinator has begun to tell, also its caller.
    pub said: Option<Decision>,
    /// The participants.
    pub participants: [Participant; N],
    /// The store.
    pub store: Store,
    /// There is a partition.
    pub cut: bool,
}

/// A step. Numbers are places in the list of the state before the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// A participant that is asked votes yes.
    VoteYes(usize),
    /// A participant that is asked votes no, or gives up before.
    VoteNo(usize),
    /// The coordinator hears how far it is.
    Hear(usize),
    /// All have voted yes.
    ChoosePreCommit,
    /// Somebody has voted no, or is silent.
    ChooseAbort,
    /// All that live have pre-committed.
    ChooseCommit,
    /// The coordinator tells one what there is to be told.
    Tell(usize),
    /// The coordinator tells all.
    TellAll,
    /// A message arrives.
    Deliver(usize),
    /// The coordinator dies.
    CoordinatorDies,
    /// A participant dies.
    Dies(usize),
    /// The network falls in two: these participants, as bits, are cut off from the coordinator, perhaps with the store.
    Cut(u8, bool),
    /// And is whole again.
    Heal,
    /// [`Rule::Alone`]: it ends by itself.
    EndsAlone(usize),
    /// [`Rule::Termination`]: it becomes coordinator.
    Leads(usize),
    /// [`Rule::Termination`]: the first brings the second to its own state.
    Levels(usize, usize),
    /// [`Rule::Termination`]: the first brings the second to the end.
    Ends(usize, usize),
    /// [`Rule::Record`]: the coordinator reads the store.
    CoordinatorLooks,
    /// [`Rule::Record`]: a participant reads the store, and follows the decision or sends one.
    Consults(usize),
    /// [`Rule::Record`]: a write lands.
    ReadyLands,
    /// [`Rule::Record`]: a write lands.
    DecisionLands(Decision),
}

impl Action {
    /// Whether participants do it without the coordinator.
    pub fn is_of_participants(&self) -> bool {
        matches!(
            self,
            Self::EndsAlone(_)
                | Self::Leads(_)
                | Self::Levels(..)
                | Self::Ends(..)
                | Self::Consults(_)
                | Self::DecisionLands(_)
                | Self::Deliver(_)
                | Self::VoteNo(_)
        )
    }
}

impl<const N: usize> State<N> {
    /// Whether any participant is there.
    pub fn any(&self, status: Status) -> bool {
        self.participants.iter().any(|p| p.status == status)
    }

    /// Whether everyone who lives has come to an end.
    pub fn is_over(&self) -> bool {
        self.participants.iter().all(|p| p.dead || p.is_at_end())
    }

    /// Whether some have committed and others aborted.
    pub fn is_split(&self) -> bool {
        self.any(Status::Committed) && self.any(Status::Aborted)
    }

    /// Whether some have ended otherwise than the coordinator says.
    fn is_belied(&self) -> bool {
        match self.said {
            Some(Decision::Commit) => self.any(Status::Aborted),
            Some(Decision::Abort) => self.any(Status::Committed),
            None => false,
        }
    }
}

impl Participant {
    /// Whether nothing can be asked of it any more.
    pub fn is_at_end(&self) -> bool {
        matches!(self.status, Status::Committed | Status::Aborted)
    }
}

impl<const N: usize> Model for ThreePhase<N> {
    type State = State<N>;
    type Action = Action;

    fn init_states(&self) -> Vec<State<N>> {
        let participant = Participant {
            status: Status::Working,
            pre_commit: false,
            outcome: None,
            told: 0,
            heard: 0,
            dead: false,
            far: false,
            leads: None,
        };
        vec![State {
            coordinator: Coordinator::Asking,
            said: None,
            participants: [participant; N],
            store: Store::default(),
            cut: false,
        }]
    }

    fn actions(&self, state: &State<N>, actions: &mut Vec<Action>) {
        self.of_coordinator(state, actions);
        self.of_faults(state, actions);
        self.of_participants(state, actions);
    }

    fn next_state(&self, last: &State<N>, action: Action) -> Option<State<N>> {
        let mut state = last.clone();
        self.step(&mut state, action);
        state.participants.sort_unstable();
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("P27 no participant commits while another aborts", |_, s: &State<N>| !s.is_split()),
            Property::always("P27 nobody ends otherwise than the coordinator says", |_, s: &State<N>| !s.is_belied()),
            Property::always("P28 nobody commits before all have voted", |_, s: &State<N>| {
                !s.any(Status::Working) || !(s.any(Status::Committed) || s.said == Some(Decision::Commit))
            }),
            Property::always("P32 what is ready on record is never aborted", |_, s: &State<N>| {
                !(s.store.ready && s.store.decision == Some(Decision::Abort))
            }),
            Property::sometimes("P28 commit is reached", |_, s: &State<N>| {
                s.participants.iter().all(|p| p.status == Status::Committed)
            }),
            Property::sometimes("P28 abort is reached", |_, s: &State<N>| {
                s.participants.iter().all(|p| p.status == Status::Aborted)
            }),
            Property::sometimes("P32 commit is reached without the coordinator", |_, s: &State<N>| {
                s.said.is_none() && s.participants.iter().all(|p| p.status == Status::Committed)
            }),
        ]
    }
}
